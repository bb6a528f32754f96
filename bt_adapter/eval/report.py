"""Results as files, with what made them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bt_adapter
from bt_adapter.errors import CommandError


def versions() -> dict[str, Any]:
    """Of this package (with the commit, in a checkout of it) and of torch."""
    return {"bt_adapter": bt_adapter.__version__, "commit": _commit(), "torch": torch.__version__}


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write ``result``; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".writing")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """The JSON value of a file. Raises ValueError where it is none."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_overwriting(
    path: Path,
    settings: dict[str, Any],
    advice: str,
    part: str | None = None,
    option: str = "out",
    read: Callable[[Path], Any] = read_json,
) -> None:
    """See that a result that is there already was made with the same settings: only such a one may be overwritten.

    Args:
        path: of the result, which need not be there.
        settings: JSON values that stand in the result too. Weights, data and options, but not the machine.
        advice: ends the message of the error: what to do.
        part: name of the object inside the result that holds the settings; None: the result itself.
        option: which names the file on the command line.
        read: returns what a file holds, or raises ValueError where it is no such result.

    Raises:
        CommandError: the file was made with other settings, each of which is named; or it is no such result.
    """
    if path.is_dir():
        raise CommandError(f"--{option} {path}: is a folder, but a file is written")
    if not path.exists():
        return
    try:
        before = read(path)
    except ValueError:
        before = None
    if part is not None and isinstance(before, dict):
        before = before.get(part)
    if not isinstance(before, dict) or not settings.keys() & before.keys():
        raise CommandError(f"--{option} {path} is there already and holds no result of this command: {advice}")
    now = json.loads(json.dumps(settings))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        told = ", ".join(f"{name} {before.get(name)!r}, now {now[name]!r}" for name in changed)
        raise CommandError(f"--{option} {path} holds a result that was made with {told}: {advice}")


def _commit() -> str | None:
    root = Path(bt_adapter.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout it will not touch
        return None
    return done.stdout.strip()
