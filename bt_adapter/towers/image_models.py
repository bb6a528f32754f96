"""Loads image models that can be the frozen tower, and converts their tensors to the tower's."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from bt_adapter.data.image_settings import read_image_settings
from bt_adapter.errors import CheckpointError
from bt_adapter.mini import quiet, weights_folder
from bt_adapter.towers import clip as _clip
from bt_adapter.towers import dinov2, open_clip, siglip
from bt_adapter.towers.found import FoundTower as FoundTower
from bt_adapter.towers.hugging_face import load_clip_model, load_pretrained, model_kind

SUPPORTED = (
    "a CLIP of Hugging Face (CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel), a SigLIP (SiglipModel, "
    "SiglipVisionModel), a DINOv2 (Dinov2Model, Dinov2WithRegistersModel), or a model of open_clip"
)
# Values of model_type in config.json.
CLIP, SIGLIP, DINOV2 = ("clip", "clip_vision_model"), ("siglip", "siglip_vision_model"), dinov2.MODEL_TYPES


def read_tower(clip: nn.Module) -> FoundTower:
    """Read the vision tower of a loaded image model.

    Args:
        clip: a Hugging Face CLIP, SigLIP or DINOv2, or a model of open_clip.

    Raises:
        TypeError: ``clip`` is none of these.
        CheckpointError: the structure of the model is not supported.
    """
    if open_clip.is_model(clip):
        return open_clip.read(clip)
    config: Any = getattr(clip, "config", None)
    config = getattr(config, "vision_config", config)
    kind = getattr(config, "model_type", None)
    for reader in (_clip, siglip, dinov2):
        if kind in reader.MODEL_TYPES:
            return reader.read(clip, config)
    hint = ", whose pictures have no fixed size" if kind == "siglip2_vision_model" else ""
    raise TypeError(f"clip must be {SUPPORTED}, but is a {type(clip).__name__} of model_type {kind!r}{hint}")


def load_image_model(name: str | os.PathLike[str], with_text: bool = False) -> nn.Module:
    """Load the frozen image model for a branch, float32.

    Args:
        name: "mini" (the small CLIP of this package), a local folder, a hub name, or a name of open_clip (see
            ``bt_adapter.towers.open_clip``).
        with_text: load its text tower too, which is left out otherwise, where possible.

    Raises:
        OSError: the model is not found.
        CheckpointError: the model is of another type, lacks weights, or has no text tower (a DINOv2) to load.
        CommandError: the model needs open_clip, which is not installed.
        MiniError: the small stack's weights are not installed.
    """
    from transformers import CLIPModel, CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel

    name = os.fspath(name)
    if name == "mini":
        with quiet():
            model: Any = load_image_model(weights_folder("clip"), with_text)
        model.name_or_path = name
        return model
    if open_clip.is_name(name):
        return open_clip.load(name)
    kind = model_kind(name)
    if kind in CLIP:
        model = load_clip_model(CLIPModel if with_text else CLIPVisionModelWithProjection, name)
    elif kind in SIGLIP:
        model = load_pretrained(SiglipModel if with_text else SiglipVisionModel, name)
    elif kind in DINOV2 and not with_text:
        return dinov2.load(name, kind)
    elif kind in DINOV2:
        raise CheckpointError(
            f"{name} is a DINOv2, which has no text tower: its branch can be neither pretrained on captions nor "
            "evaluated, and gives only video tokens (BTAdapterVisionModel.from_clip). Give a CLIP or a SigLIP"
        )
    else:
        hint = "; of SigLIP 2, models of fixed resolution are supported, not NaFlex" if kind == "siglip2" else ""
        raise CheckpointError(f"{name} is a model of type {kind!r}, expected {SUPPORTED}{hint}")
    config = getattr(model.config, "vision_config", model.config)
    model.image_settings = read_image_settings(name, config.image_size)
    return model
