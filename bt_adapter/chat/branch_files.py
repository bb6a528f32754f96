"""A branch from disk or the hub, for a chat model whose tower serves where the branch comes alone."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bt_adapter.chat.families import Family
from bt_adapter.chat.pairing import beside, check_shapes, in_whole_tower, mismatch
from bt_adapter.checkpoint import load_exactly, read_safetensors, read_settings
from bt_adapter.config import TowerConfig
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.names import pack_qkv
from bt_adapter.published import load_reference_checkpoint
from bt_adapter.time_steps import read_branch_config


def load_branch(source: str | os.PathLike[str], family: Family, require_same_tower: bool) -> BTAdapterVisionModel:
    """A folder of ``save_pretrained``, its hub name, or a published checkpoint.

    Raises:
        FileNotFoundError: it is not there. OSError: the hub has no such repository, or there is no network.
        CheckpointError: it cannot be read. ValueError: it does not belong to the chat model.
    """
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise FileNotFoundError(f"branch {source} is not there, and is no hub name (owner/name)")
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(source)))
    if not path.is_dir():
        clip: nn.Module | None = None if family.tower_config.is_eva else family.vision_tower
        return load_reference_checkpoint(path, clip=clip)
    settings = read_settings(path)
    if settings["includes_tower"]:
        return BTAdapterVisionModel.from_pretrained(path)
    return _alone(path, settings, family, require_same_tower)


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
    tensors, theirs = family.tower()
    saved = dict(settings.get("tower_fingerprint") or {})
    wrong = []
    if config.image_size != theirs.image_size:
        saved.pop("position", None)
        wrong.append(
            f"it was trained at {config.image_size} px, image_chat_model takes {theirs.image_size} px, and the folder "
            "holds no tower to tell whether both are one CLIP (save_pretrained(..., include_tower=True))"
        )
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
