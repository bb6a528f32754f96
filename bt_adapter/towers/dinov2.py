"""Reads the vision tower of a DINOv2, with or without registers (arXiv 2304.07193, 2309.16588); it has no text tower.

Each layer scales the outputs of attention and MLP per channel (LayerScale). The scales are multiplied into the linear
layers before them, so the tower's layers equal CLIP's. Registers pass through every layer, placed after the patches
(attention is independent of the order), and the branch does not read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.data.image_settings import read_crop_size, read_image_settings
from bt_adapter.errors import CheckpointError
from bt_adapter.towers.clip import name_of
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.found import FoundTower
from bt_adapter.towers.hugging_face import load_pretrained
from bt_adapter.towers.names import rename

MODEL_TYPES = ("dinov2", "dinov2_with_registers")
# Hugging Face's name (regex) → this package's name; versions of transformers name the attention layers differently.
_NAMES = [
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embedding."),
    (r"encoder\.layer\.(\d+)\.norm([12])\.", r"layers.\1.norm\2."),
    (r"encoder\.layer\.(\d+)\.attention\.(?:attention\.)?(query|key|value)\.", r"layers.\1.attention.\2."),
    (r"encoder\.layer\.(\d+)\.attention\.(?:output\.dense|o_proj)\.", r"layers.\1.attention.out_proj."),
    (r"encoder\.layer\.(\d+)\.attention\.([qkv])_proj\.", r"layers.\1.attention.\2_proj."),
    (r"encoder\.layer\.(\d+)\.mlp\.", r"layers.\1."),
    (r"layernorm\.", "final_norm."),
]
_PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
_LEFT_OUT = ("embeddings.mask_token", "embeddings.position_embeddings", "classifier.")
_SCALE = re.compile(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1")


def load(name: str, kind: str) -> nn.Module:
    """Load a DINOv2 from a folder or hub name, float32, with its ``image_settings``."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    model: Any = load_pretrained(Dinov2WithRegistersModel if kind == MODEL_TYPES[1] else Dinov2Model, name)
    model.image_settings = read_image_settings(name, read_crop_size(name) or model.config.image_size)
    return model


def read(model: Any, config: Any) -> FoundTower:
    """Read the tower of a ``Dinov2Model`` or ``Dinov2WithRegistersModel``; see ``read_tower``.

    Pictures have the size of its image processor (224 pixels, while the position embeddings are for 518); the position
    embeddings are interpolated to it once, by the model's own method.

    Raises:
        CheckpointError: the MLPs are gated (``use_swiglu_ffn``, the giant models).
    """
    if getattr(config, "use_swiglu_ffn", False):
        raise CheckpointError(
            f"{name_of(model) or 'clip'} is a DINOv2 with gated MLPs (use_swiglu_ffn, the giant models), which are not "
            "supported; use small, base or large"
        )
    size = _picture_size(model, config)
    state = {
        re.sub(r"^(?:dinov2|dinov2_with_registers)\.", "", n): t
        for n, t in model.named_parameters(remove_duplicate=False)
    }
    tensors, scaled = own_tensors(state)
    tensors["position"] = _position(model, config, size)
    values = {
        **vars(config), "image_size": size, "intermediate_size": int(config.hidden_size * config.mlp_ratio),
        "projection_dim": None, "model_type": "dinov2",
        "num_register_tokens": len(tensors["registers"]) if "registers" in tensors else 0,
    }  # fmt: skip
    return FoundTower(name_of(model), tensors, TowerConfig.of(values), scaled | {"position"})


def own_tensors(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Convert Hugging Face's DINOv2 tensors to this package's names with the scales multiplied in.

    Returns the tensors and the names of those that changed. Position embeddings are left out: their number depends on
    the size of the pictures.
    """
    tensors: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _SCALE.fullmatch(name):
            scales[f"layers.{match[1]}." + ("attention.out_proj" if match[2] == "1" else "fc2")] = tensor.detach()
        elif name == "embeddings.cls_token":
            tensors["class_embedding"] = tensor.detach().flatten()
        elif name == "embeddings.register_tokens":
            tensors["registers"] = tensor.detach()[0]
        elif not name.startswith(_LEFT_OUT):
            tensors[_own_name(name)] = tensor
    changed = set()
    for layer, scale in scales.items():
        for leaf in ("weight", "bias"):
            name = f"{layer}.{leaf}"
            if name in tensors:
                factor = scale[:, None] if leaf == "weight" else scale
                tensors[name] = tensors[name].detach().float() * factor.float()  # float32, to round only once
                changed.add(name)
    return tensors, frozenset(changed)


def _own_name(name: str) -> str:
    return re.sub(r"\.(query|key|value)\.", lambda match: f".{_PROJECTIONS[match[1]]}.", rename(name, _NAMES))


def _picture_size(model: Any, config: Any) -> int:
    """Return the picture size of the image processor in pixels or, if it is unknown, of the configuration."""
    if (settings := getattr(model, "image_settings", None)) is not None:
        return settings.size
    place = name_of(model)
    return (read_crop_size(place, local=True) if place else None) or config.image_size


def _position(model: Any, config: Any, size: int) -> Tensor:
    """Interpolate the position embeddings to pictures of ``size`` pixels by the model's own method: ``[1+P, D]``."""
    embeddings = getattr(model, "embeddings", None) or getattr(model, model.base_model_prefix).embeddings
    rows = 1 + (size // config.patch_size) ** 2
    like = embeddings.position_embeddings.new_empty(1, rows, config.hidden_size)
    with torch.no_grad():
        return embeddings.interpolate_pos_encoding(like, size, size)[0].detach().clone()
