"""Reads the vision tower of a SigLIP or a SigLIP 2 of fixed resolution, which has a pooling head instead of a CLS.

The classes are Hugging Face's; the models are described in arXiv 2303.15343 and 2502.14786.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bt_adapter.towers.clip import name_of
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.found import FoundTower
from bt_adapter.towers.names import rename

MODEL_TYPES = ("siglip_vision_model",)
# Hugging Face's name (regex) → this package's name.
_NAMES = [
    (r"patch_embedding\.", "patch_embedding."),
    (r"layers\.(\d+)\.layer_norm([12])\.", r"layers.\1.norm\2."),
    (r"layers\.(\d+)\.self_attn\.", r"layers.\1.attention."),
    (r"layers\.(\d+)\.mlp\.", r"layers.\1."),
    (r"post_layernorm\.", "final_norm."),
    (r"head\.attention\.out_proj\.", "projection.attention.out_proj."),
    (r"head\.layernorm\.", "projection.norm."),
    (r"head\.mlp\.", "projection."),
]


def read(clip: Any, config: Any) -> FoundTower:
    """Read the tower of a ``SiglipModel`` or ``SiglipVisionModel``; see ``read_tower``.

    For a model without a pooling head (``vision_use_head`` false) the tower has no projection.
    """
    state = {}
    for name, tensor in clip.named_parameters(remove_duplicate=False):
        if name.startswith(("text_model.", "logit_")):
            continue
        state[re.sub(r"^(vision_model\.)*(embeddings\.|encoder\.)?", "", name)] = tensor
    tensors = own_tensors(state)
    has_head = "projection.probe" in tensors
    values = {
        **vars(config), "model_type": "siglip_vision_model", "projection_dim": config.hidden_size if has_head else None
    }  # fmt: skip
    return FoundTower(name_of(clip), tensors, TowerConfig.of(values), frozenset({"position"}))


def own_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of Hugging Face's SigLIP vision tower (without ``vision_model.``) to this package's names.

    The position embeddings get a row of zeros for the CLS.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name == "position_embedding.weight":
            tensors["position"] = torch.cat([torch.zeros_like(tensor[:1]), tensor]).detach()
        elif name == "head.probe":
            tensors["projection.probe"] = tensor.detach().flatten()
        elif match := re.fullmatch(r"head\.attention\.in_proj_(weight|bias)", name):
            for part, piece in zip("qkv", tensor.detach().chunk(3), strict=True):
                tensors[f"projection.attention.{part}_proj.{match[1]}"] = piece
        else:
            tensors[rename(name, _NAMES)] = tensor
    return tensors
