"""Models of transformers by folder or hub name: loaded in the dtype that is asked for, whole, or not at all."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from bt_adapter.errors import CheckpointError
from bt_adapter.model_folders import is_hub_name

_SHOWN = 8  # names of tensors in an error


def load_pretrained(
    model_class: Any, name: str | os.PathLike[str], dtype: torch.dtype | None = torch.float32, **options: Any
) -> Any:
    """A model of transformers with every one of its weights read from the files, in evaluation mode.

    transformers itself draws weights at random where the files lack them, and says so in a log; and it takes the dtype
    of the files where none is given.

    Args:
        model_class: a class with ``from_pretrained``. name: local folder or hub name.
        dtype: of the weights; None: as stored.
        **options: of ``from_pretrained``.

    Raises:
        CheckpointError: tensors are missing or have other shapes, which are listed, or a file is damaged.
        OSError: the folder or hub name is not there; a local path that is mistyped is never looked for on the hub.
    """
    name = check_place(name)
    try:
        model, report = model_class.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come in the report, and are an error below
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


def load_clip_model(model_class: Any, name: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """A CLIP, or its vision tower alone, by :func:`load_pretrained`.

    Raises:
        CheckpointError: the name stands for a model of another type (SigLIP, a chat model), or as there.
        OSError: as there.
    """
    kind = model_kind(name)
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(f"{name} is a model of type {kind!r}, expected a CLIP ('clip' or 'clip_vision_model')")
    return load_pretrained(model_class, name, dtype)


def model_kind(name: str | os.PathLike[str]) -> str | None:
    """The ``model_type`` in the configuration of a folder or hub name of transformers.

    Raises:
        OSError: the folder or hub name is not there, or has no ``config.json``.
    """
    from transformers import PreTrainedConfig

    name = check_place(name)
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"no config.json found in directory {name}")
    return PreTrainedConfig.get_config_dict(name)[0].get("model_type")


def check_place(name: str | os.PathLike[str]) -> str:
    """The name as a string, where it is a file or folder that is there, or can be a hub name (owner/name).

    Raises:
        FileNotFoundError: it is a local path that is not there (as every path is whose first folder is there); the
            message names what lies near it.
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
    """Where a branch lies: a folder of ``save_pretrained``, or the file of a published checkpoint.

    source: that folder or file, or a name on the hub (owner/name) that is fetched.

    Raises:
        FileNotFoundError: it is not there; a mistyped local path is never looked for on the hub.
        OSError: the hub has no such repository, or there is no network.
        CheckpointError: the repository holds no branch.
    """
    path = Path(check_place(source))
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    try:
        path = Path(snapshot_download(str(source)))
    except Exception as error:  # of the hub's client, the network, or a cache without it
        raise FileNotFoundError(f"branch {source} is no folder or file here, nor found on the hub: {error}") from error
    if (path / "config.json").is_file():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".bin", ".pt", ".safetensors"))
    if len(files) != 1:
        raise CheckpointError(f"{source} on the hub has neither a config.json nor one single file of weights")
    return files[0]


def _near(path: Path) -> str:
    """What lies beside a path and has almost its name."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    found = difflib.get_close_matches(path.name, sorted(os.listdir(parent)), 1)
    return f"; did you mean {parent / found[0]}?" if found else ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
