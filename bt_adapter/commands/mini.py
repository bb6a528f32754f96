"""``bt-adapter mini``: a part of the small stack, by its own command."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

PARTS = {
    "items": ("bt_adapter.mini.items", "write the shipped test items"),
    "clip": ("bt_adapter.mini.clip", "train the small CLIP"),
    "branch": ("bt_adapter.mini.pretrain", "pretrain the branch beside it"),
    "projector": ("bt_adapter.mini.tune", "train projector and adapters on questions about stills"),
    "tuned": ("bt_adapter.mini.tune", "tune projector, adapters and branch on questions about clips"),
    "control": ("bt_adapter.mini.tune", "the same with the branch off"),
    "retrieval": ("bt_adapter.mini.retrieval", "evaluate retrieval of motion captions"),
}


@dataclass(frozen=True)
class Mini:
    """Make a part of the small stack; further arguments go to the part's own command (bt-adapter mini clip --help)."""

    part: Positional[Literal["items", "clip", "branch", "projector", "tuned", "control", "retrieval"]]
    """Which part."""
    rest: Annotated[tuple[str, ...], tyro.conf.Suppress] = field(default=())


def run(command: Mini) -> int:
    """Hand over to the part."""
    return run_part(command.part, list(command.rest))


def run_part(part: str, rest: list[str]) -> int:
    """The part's own command line, with arguments of its own. Returns 0."""
    module = importlib.import_module(PARTS[part][0])
    before = sys.argv
    stage = [part] if PARTS[part][0].endswith(".tune") else []
    sys.argv = [module.__file__ or part, *stage, *rest]
    try:
        module.main()
    finally:
        sys.argv = before
    return 0
