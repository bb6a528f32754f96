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
from bt_adapter.chat.pairing import beside, check_shapes, mismatch
from bt_adapter.checkpoint import load_exactly, read_safetensors, read_settings
from bt_adapter.config import BTAdapterConfig, TowerConfig
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.names import pack_qkv
from bt_adapter.published import load_reference_checkpoint


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
    config, adapter = TowerConfig(**settings["tower"]), BTAdapterConfig(**settings["branch"])
    check_shapes(config, adapter.depth, family)
    chat_only = settings["stored_features"] or settings.get("chat_only", False)
    with torch.device("meta"):
        saved = BTAdapterVisionModel(replace(config, projection_dim=None), adapter, chat_only=chat_only)
    state = pack_qkv(read_safetensors(path / "model.safetensors"))
    wanted = {
        name.removeprefix("branch."): tensor.float()
        for name, tensor in state.items()
        if not name.startswith("branch.alignment_head.")  # it needs the shared space, which chat models lack
    }
    saved.branch.to_empty(device="cpu")
    load_exactly(saved.branch, wanted, str(path))
    saved.tower_name = settings["tower_name"]
    model = beside(family, saved).eval()
    _check_fingerprint(model, config, settings.get("tower_fingerprint") or {}, path, require_same_tower)
    return model


def _check_fingerprint(
    model: BTAdapterVisionModel, config: TowerConfig, saved: dict[str, float], path: Path, require_same_tower: bool
) -> None:
    """All that a branch without its tower can be held to: lengths of some of the tower's weights, its resolution."""
    size = model.vision_config.image_size
    found = model.tower.fingerprint()
    wrong = []
    if config.image_size != size:
        found.pop("position")
        wrong.append(
            f"it was trained at {config.image_size} px, image_chat_model takes {size} px, and the folder holds no "
            "tower to tell whether both are one CLIP (save_pretrained(..., include_tower=True))"
        )
    off = [
        name for name, value in found.items() if abs((before := saved.get(name, value)) - value) > 1e-2 * abs(before)
    ]
    if off:
        lengths = ", ".join(f"{name} {found[name]:.4g}, expected {saved[name]:.4g}" for name in off)
        wrong.append(f"it was trained beside another CLIP (lengths of weights: {lengths})")
    if wrong:
        mismatch(f"the branch in {path} does not fit image_chat_model: {'; '.join(wrong)}", require_same_tower)
