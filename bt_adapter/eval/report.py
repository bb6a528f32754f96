"""Record what produced a result, and refuse to overwrite a result of other settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bt_adapter.errors import CommandError
from bt_adapter.files import VERSION


def versions() -> dict[str, Any]:
    """Return the versions of this package (with the git commit of a checkout) and of torch."""
    return {"bt_adapter": VERSION, "commit": _commit(), "torch": torch.__version__}


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the device type, such as "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def read_json(path: Path) -> Any:
    """Read the JSON value of a file. Raises ValueError if it is not JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def check_overwriting(
    path: Path,
    settings: dict[str, Any],
    advice: str,
    part: str | None = None,
    option: str = "out",
    read: Callable[[Path], Any] = read_json,
) -> None:
    """Check that an existing result has the same settings: only such a result may be overwritten.

    Args:
        path: path of the result, which may not exist yet.
        settings: JSON values that the result also stores: weights, data and options, but not the machine.
        advice: end of the error message, saying what to do.
        part: name of the object inside the result that holds the settings; None: the result itself.
        option: name of the option that names the file.
        read: returns the content of a file, or raises ValueError if it is not such a result.

    Raises:
        CommandError: the file has other settings, each of which is named, or is not such a result.
    """
    if path.is_dir():
        raise CommandError(f"--{option} {path}: is a folder; name a file")
    if not path.exists():
        return
    try:
        old = read(path)
    except ValueError:
        old = None
    if part is not None and isinstance(old, dict):
        old = old.get(part)
    if not isinstance(old, dict) or not settings.keys() & old.keys():
        raise CommandError(f"--{option} {path} exists and holds no result of this command: {advice}")
    new = json.loads(json.dumps(settings))
    changed = [name for name in new if old.get(name) != new[name]]
    if changed:
        changes = ", ".join(f"{name} {old.get(name)!r}, now {new[name]!r}" for name in changed)
        raise CommandError(f"--{option} {path} holds a result that was made with {changes}: {advice}")


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # git is missing or refuses to read the checkout
        return None
    return done.stdout.strip()
