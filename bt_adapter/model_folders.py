"""What the folder of a chat model says of itself, read without torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from bt_adapter.tune import is_tuned

NATIVE_PREFIX = "bt_adapter_"  # of the model types of video chat models (``bt_adapter.native``)


def needs_branch(model: str) -> bool:
    """Whether a chat model is known to bring no branch of its own. A hub name is found out when it is loaded."""
    brings_one = model.partition(":")[0] == "mini" or is_tuned(model) or is_native(model)
    return not brings_one and not is_hub_name(model)


def is_hub_name(text: str | os.PathLike[str]) -> bool:
    """Whether a name can be one on the hub (owner/name) and is no local path: there is neither it nor its folder."""
    match = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*", os.fspath(text))
    return match is not None and not Path(text).exists() and not Path(match[1]).is_dir()


def is_native(model: str) -> bool:
    """Whether a folder holds a video chat model, as its ``save_pretrained`` writes it."""
    return str(read_json(Path(model) / "config.json").get("model_type")).startswith(NATIVE_PREFIX)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none: who loads the folder says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
