"""Reads the vision tower of a Hugging Face CLIP."""

from __future__ import annotations

from typing import Any

from torch import nn

from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.found import FoundTower
from bt_adapter.towers.names import to_own

MODEL_TYPES = ("clip_vision_model",)


def read(clip: Any, config: Any) -> FoundTower:
    """Read the tower of a ``CLIPModel``, ``CLIPVisionModelWithProjection`` or ``CLIPVisionModel``; see ``read_tower``.

    Activation, epsilon and sizes come from ``config``, its ``CLIPVisionConfig``. Parameters unknown in a CLIP (of an
    adapter) keep their names, so that loading them raises an error.
    """
    published, projection = {}, None
    # remove_duplicate=False: a layer used in several places is listed in each of them
    for name, tensor in (*clip.named_parameters(remove_duplicate=False), *clip.named_buffers()):
        if name.startswith(("text_model.", "text_projection", "logit_scale")) or name.endswith("position_ids"):
            continue
        for part in ("vision_model.", "embeddings.", "encoder."):
            name = name.removeprefix(part)
        published[name] = tensor
        if name == "visual_projection.weight":
            projection = tensor.shape[0]
    values = {**vars(config), "projection_dim": projection, "model_type": "clip_vision_model"}
    tensors = {(to_own(name, False) or name).removeprefix("tower."): tensor for name, tensor in published.items()}
    return FoundTower(name_of(clip), tensors, TowerConfig.of(values))


def name_of(model: nn.Module) -> str | None:
    """Return the folder or hub name that a model was loaded from, or None if it is unknown."""
    return getattr(model, "name_or_path", "") or None
