"""Load a branch from disk or the hub; a branch saved without its tower uses the chat model's."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bt_adapter.chat.families import Family
from bt_adapter.chat.families.pairing import check_shapes, in_whole_tower, join_tower, mismatch
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import load_exactly, read_safetensors, read_settings
from bt_adapter.model.published import load_reference_checkpoint, read_sizes
from bt_adapter.model.time_steps import read_branch_config
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.hugging_face import locate_branch
from bt_adapter.towers.names import pack_qkv


def load_branch(source: str | os.PathLike[str], family: Family, require_same_tower: bool) -> BTAdapterVisionModel:
    """Load a branch from a folder of ``save_pretrained``, its hub name, or a published checkpoint.

    Raises:
        FileNotFoundError, OSError: see `locate_branch`.
        CheckpointError: it cannot be read. ValueError: it does not fit the chat model.
    """
    path = locate_branch(source)
    if not path.is_dir():
        clip: nn.Module | None = None if family.tower_config.is_eva else family.vision_tower
        return load_reference_checkpoint(path, clip=clip)
    settings = read_settings(path)
    if settings["includes_tower"]:
        return BTAdapterVisionModel.from_pretrained(path)
    return _alone(path, settings, family, require_same_tower)


def check_branch(path: Path, family: Family, require_same_tower: bool) -> None:
    """Raise a ValueError if the sizes of a branch do not fit a chat model; reads no weights.

    path: from `locate_branch`. family: the chat model's, which may be on the meta device.
    """
    if not path.is_dir():
        sizes, depth = read_sizes(path)
        if isinstance(sizes, dict):  # a file without a tower holds the branch's widths only
            sizes = replace(family.tower_config, **sizes)
        check_shapes(sizes, depth, family)
        return
    settings = read_settings(path)
    config, adapter = TowerConfig(**settings["tower"]), read_branch_config(settings["branch"], path)
    check_shapes(config, adapter.depth, family)
    if require_same_tower and not settings["includes_tower"] and (wrong := _other_resolution(config, family)):
        mismatch(f"the branch in {path} does not fit image_chat_model: {wrong}", True)


def _other_resolution(config: TowerConfig, family: Family) -> str:
    """Return why a branch saved without its tower cannot be checked at another image size; "" for the same size."""
    size = family.tower()[1].image_size
    if config.image_size == size:
        return ""
    return (
        f"it was trained at {config.image_size} px, image_chat_model takes {size} px, and the folder holds no tower to "
        "check that both have the same CLIP (save_pretrained(..., include_tower=True) stores it)"
    )


def _alone(path: Path, settings: dict[str, Any], family: Family, require_same_tower: bool) -> BTAdapterVisionModel:
    """Load a branch that was saved without its tower, and join it with the chat model's tower."""
    config, adapter = TowerConfig(**settings["tower"]), read_branch_config(settings["branch"], path)
    check_shapes(config, adapter.depth, family)
    _check_fingerprint(path, settings, config, family, require_same_tower)
    chat_only = settings["stored_features"] or settings.get("chat_only", False)
    with torch.device("meta"):
        saved = BTAdapterVisionModel(replace(config, projection_dim=None), adapter, chat_only=chat_only)
    state = pack_qkv(read_safetensors(path / "model.safetensors"))
    wanted = {
        name.removeprefix("branch."): tensor.float()
        for name, tensor in state.items()
        if not name.startswith("branch.alignment_head.")  # chat models have no shared embedding space for it
    }
    saved.branch.to_empty(device="cpu").float()
    load_exactly(saved.branch, wanted, str(path))
    return join_tower(family, saved.branch, settings["tower_name"]).eval()


def _check_fingerprint(
    path: Path, settings: dict[str, Any], config: TowerConfig, family: Family, require_same_tower: bool
) -> None:
    """Compare the stored fingerprint (norms of some tower weights) and the resolution with the chat model's tower."""
    tensors, _ = family.tower()
    saved = dict(settings.get("tower_fingerprint") or {})
    wrong = []
    if resolution := _other_resolution(config, family):
        saved.pop("position", None)
        wrong.append(resolution)
    first = config.num_hidden_layers - settings["branch"]["depth"] if settings["stored_features"] else 0
    different = []
    for name, before in saved.items():
        tensor = tensors.get(in_whole_tower(name, first))
        if tensor is not None and not abs(before - (norm := tensor.detach().float().norm().item())) <= 1e-2 * before:
            different.append(f"{name} {norm:.4g}, expected {before:.4g}")
    if different:
        wrong.append(f"it was trained with another CLIP (norms of weights: {', '.join(different)})")
    if wrong:
        mismatch(f"the branch in {path} does not fit image_chat_model: {'; '.join(wrong)}", require_same_tower)
