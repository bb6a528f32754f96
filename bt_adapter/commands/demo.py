"""``bt-adapter demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bt_adapter.training.settings import COUNT, check_numbers


@dataclass(frozen=True)
class Demo:
    """Ask the small stack about short clips and a real one, with the branch on and off, and show measured results."""

    clips: int = 9
    """Clips to ask about, 1 to 9; default: all nine that come with the small stack."""
    keep: Path | None = None
    """Folder to which the clips are copied; default: they are not copied."""


def run(command: Demo) -> int:
    """Run the demo. Returns the exit code."""
    check_numbers(command, {"clips": COUNT})
    from bt_adapter.demo import run_demo

    return run_demo(command)
