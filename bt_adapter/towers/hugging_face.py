"""Find models of transformers by folder or hub name, and load them with all weights and in the requested dtype.

Importing this module does not import torch, because the command line checks names with it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from bt_adapter.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_SHOWN = 8  # maximum number of tensor names in an error


def load_pretrained(
    model_class: Any, name: str | os.PathLike[str], dtype: torch.dtype | str | None = "float32", **options: Any
) -> Any:
    """Load a model of transformers in evaluation mode, and check that every weight comes from the files.

    transformers itself initialises missing weights at random and only logs a warning, and without a dtype it uses that
    of the files.

    Args:
        model_class: a class with ``from_pretrained``. name: local folder or hub name.
        dtype: dtype of the weights, or its name; None: as stored.
        **options: options of ``from_pretrained``.

    Raises:
        CheckpointError: tensors are missing or have wrong shapes, which are listed, or a file is damaged.
        OSError: the folder or hub name does not exist; a mistyped local path is never requested from the hub.
    """
    name = check_place(name)
    try:
        model, report = model_class.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report lists them, and they are an error below
            **options,
        )
    except SafetensorError as error:
        raise CheckpointError(f"{name} holds a damaged safetensors file: {error}") from error
    wrong = []
    if missing := sorted(report["missing_keys"]):
        wrong.append(f"missing: {_some(missing)}")
    if mismatched := sorted(report["mismatched_keys"]):
        shapes = [f"{key} is {list(found)}, expected {list(expected)}" for key, found, expected in mismatched]
        wrong.append(f"wrong shape: {_some(shapes)}")
    if report["error_msgs"]:
        wrong.append("; ".join(report["error_msgs"]))
    if wrong:
        raise CheckpointError(f"the weights of {name} do not make a whole {model_class.__name__}; {'; '.join(wrong)}")
    return model.eval()


def load_clip_model(model_class: Any, name: str | os.PathLike[str]) -> Any:
    """Load a CLIP, or only its vision tower, in float32 with :func:`load_pretrained`.

    Raises:
        CheckpointError: the model is of another type (SigLIP, a chat model); see also there.
        OSError: see there.
    """
    kind = model_kind(name)
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{name} is a model of type {kind!r}, expected a CLIP ('clip' or 'clip_vision_model')")
    return load_pretrained(model_class, name)


def model_kind(name: str | os.PathLike[str]) -> str | None:
    """Read the ``model_type`` from the configuration of a folder or hub name of transformers.

    Raises:
        OSError: the folder or hub name does not exist, or has no ``config.json``.
    """
    from transformers import PreTrainedConfig

    name = check_place(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"no config.json found in directory {name}")
    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")


def is_hub_name(text: str | os.PathLike[str]) -> bool:
    """Whether a name has the form of a hub name (owner/name), and neither it nor its folder exists locally."""
    match = re.fullmatch(r"([\w-][\w.-]*)/[\w-][\w.-]*", os.fspath(text))
    return match is not None and not Path(text).exists() and not Path(match[1]).is_dir()


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object of a file; empty if there is none, because loading the folder reports the error."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_place(name: str | os.PathLike[str]) -> str:
    """Return the name as a string if it is an existing file or folder, or can be a hub name (owner/name).

    Raises:
        FileNotFoundError: it is a local path that does not exist (every path whose first folder exists is local); the
            message suggests a similar name.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists():
        return str(path)
    if not is_hub_name(text):
        hint = "" if path.parent != Path() else ", and is no hub name (owner/name)"
        raise FileNotFoundError(f"{text} is not there{hint}{_near(path)}")
    return text


def locate_branch(source: str | os.PathLike[str]) -> Path:
    """Return the path of a branch: a folder of ``save_pretrained``, or the file of a published checkpoint.

    source: that folder or file, or a hub name (owner/name), which is downloaded.

    Raises:
        FileNotFoundError: it does not exist; a mistyped local path is never requested from the hub.
        OSError: the hub has no such repository, or there is no network.
        CheckpointError: the repository holds no branch.
    """
    path = Path(check_place(source))
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(str(source)))
    except Exception as error:  # errors of the hub's client, the network or the cache have no common class
        raise FileNotFoundError(f"branch {source} is no folder or file here, nor found on the hub: {error}") from error
    if (path / "config.json").is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".bin", ".pt", ".safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{source} on the hub has neither a config.json nor one single file of weights")
    return files[0]


def branch_path(source: str | os.PathLike[str]) -> Path:
    """Return the path of a branch: a hub name is downloaded (:func:`locate_branch`), a local path need not exist."""
    return locate_branch(source) if is_hub_name(source) else Path(source)


def _near(path: Path) -> str:
    """Suggest an existing path with a similar name in the same folder."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    found = difflib.get_close_matches(path.name, sorted(os.listdir(parent)), 1)
    return f"; did you mean {parent / found[0]}?" if found else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
