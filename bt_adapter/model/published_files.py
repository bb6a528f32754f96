"""Read the tensors of published checkpoints without running code, and normalise the prefixes of their names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_adapter.errors import CheckpointError
from bt_adapter.model.checkpoint import read_safetensors
from bt_adapter.towers.hugging_face import branch_path


def read_tensors(source: str | os.PathLike | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Read all tensors of a published checkpoint by published name. Raises FileNotFoundError, CheckpointError."""
    state: Any = source
    if not isinstance(source, Mapping):
        path = branch_path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if path.suffix == ".safetensors":
            state = read_safetensors(path)
        else:
            state = _read_pickle(path)
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        name = "the checkpoint" if isinstance(source, Mapping) else source
        raise CheckpointError(f"{name} must hold a dict of tensors, or one under 'state_dict'")
    return state


def _read_pickle(path: Path) -> Any:
    """Load a pickle, memory-mapped if possible."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for bad files
        raise CheckpointError(
            f"{path} cannot be read with weights_only=True (it would run code, or is damaged): {error}"
        ) from error


def strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of the different kinds of files from names, and the text encoder's tensors."""
    result = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.vision_tower.").removeprefix("backbone.").replace("timesFPN", "btadapter")
        if not name.startswith("text_backbone."):
            result[name] = tensor
    return result
