"""A branch from disk or the hub, for a chat model whose tower serves where the branch comes alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bt_adapter.chat.families import Family
from bt_adapter.chat.pairing import beside, check_shapes, in_whole_tower, mismatch
from bt_adapter.checkpoint import load_exactly, read_safetensors, read_settings
from bt_adapter.config import TowerConfig
from bt_adapter.hugging_face import locate_branch
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.names import pack_qkv
from bt_adapter.published import load_reference_checkpoint, read_sizes
from bt_adapter.time_steps import read_branch_config


def load_branch(source: str | os.PathLike[str], family: Family, require_same_tower: bool) -> BTAdapterVisionModel:
    """A folder of ``save_pretrained``, its hub name, or a published checkpoint.

    Raises:
        FileNotFoundError, OSError: as `locate_branch`.
        CheckpointError: it cannot be read. ValueError: it does not belong to the chat model.
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
    """Raise a ValueError where a branch cannot stand beside a chat model, as far as sizes tell, without its weights.

    path: of `locate_branch`. family: of the chat model, which may be on the meta device.
    """
    if not path.is_dir():
        sizes, depth = read_sizes(path)
        if isinstance(sizes, dict):  # the branch alone says nothing but its own widths
            sizes = replace(family.tower_config, **sizes)
        check_shapes(sizes, depth, family)
        return
    settings = read_settings(path)
    config, adapter = TowerConfig(**settings["tower"]), read_branch_config(settings["branch"], path)
    check_shapes(config, adapter.depth, family)
    if require_same_tower and not settings["includes_tower"] and (wrong := _other_resolution(config, family)):
        mismatch(f"the branch in {path} does not fit image_chat_model: {wrong}", True)


def _other_resolution(config: TowerConfig, family: Family) -> str:
    """Why a branch saved without its tower cannot be told to fit a tower of another image size; "" where they agree."""
    size = family.tower()[1].image_size
    if config.image_size == size:
        return ""
    return (
        f"it was trained at {config.image_size} px, image_chat_model takes {size} px, and the folder holds no tower to "
        "tell whether both are one CLIP (save_pretrained(..., include_tower=True))"
    )


def _alone(path: Path, settings: dict[str, Any], family: Family, require_same_tower: bool) -> BTAdapterVisionModel:
    """A branch saved without its tower, beside the chat model's."""
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
        if not name.startswith("branch.alignment_head.")  # it needs the shared space, which chat models lack
    }
    saved.branch.to_empty(device="cpu").float()
    load_exactly(saved.branch, wanted, str(path))
    return beside(family, saved.branch, settings["tower_name"]).eval()


def _check_fingerprint(
    path: Path, settings: dict[str, Any], config: TowerConfig, family: Family, require_same_tower: bool
) -> None:
    """All that a branch without its tower can be held to: lengths of some of the tower's weights, its resolution."""
    tensors, _ = family.tower()
    saved = dict(settings.get("tower_fingerprint") or {})
    wrong = []
    if resolution := _other_resolution(config, family):
        saved.pop("position", None)
        wrong.append(resolution)
    first = config.num_hidden_layers - settings["branch"]["depth"] if settings["stored_features"] else 0
    off = []
    for name, before in saved.items():
        tensor = tensors.get(in_whole_tower(name, first))
        if tensor is not None and not abs(before - (length := tensor.detach().float().norm().item())) <= 1e-2 * before:
            off.append(f"{name} {length:.4g}, expected {before:.4g}")
    if off:
        wrong.append(f"it was trained beside another CLIP (lengths of weights: {', '.join(off)})")
    if wrong:
        mismatch(f"the branch in {path} does not fit image_chat_model: {'; '.join(wrong)}", require_same_tower)
