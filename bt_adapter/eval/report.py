"""Results as files, with what made them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

import bt_adapter


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


def _commit() -> str | None:
    root = Path(bt_adapter.__file__).parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a checkout it will not touch
        return None
    return done.stdout.strip()
