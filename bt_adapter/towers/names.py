"""Mappings between our tensor names and those of published checkpoints and Hugging Face's CLIP towers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Inside a layer: published name (regex) → own name.
_LAYER_CLIP = [
    (r"layer_norm([12])\.", r"norm\1."),
    (r"self_attn\.", "attention."),
    (r"mlp\.", ""),
]
_LAYER_EVA = [
    (r"attn\.qkv\.weight", "attention.qkv_weight"),
    (r"attn\.proj\.", "attention.out_proj."),
    (r"attn\.", "attention."),
    (r"mlp\.", ""),
]
TOP_CLIP = {
    "class_embedding": "tower.class_embedding",
    "patch_embedding.weight": "tower.patch_embedding.weight",
    "position_embedding.weight": "tower.position",
    "pre_layrnorm.weight": "tower.pre_norm.weight",
    "pre_layrnorm.bias": "tower.pre_norm.bias",
    "post_layernorm.weight": "tower.final_norm.weight",
    "post_layernorm.bias": "tower.final_norm.bias",
    "visual_projection.weight": "tower.projection.weight",
    "btadapter_cls_token": "branch.cls_token",
    "btadapter_time_embed.weight": "branch.time",
    "balance1": "branch.output_gate",
    "balance2": "branch.merge_gate",
}
TOP_EVA = {
    "cls_token": "tower.class_embedding",
    "pos_embed": "tower.position",
    "patch_embed.proj.weight": "tower.patch_embedding.weight",
    "patch_embed.proj.bias": "tower.patch_embedding.bias",
    "norm.weight": "tower.final_norm.weight",
    "norm.bias": "tower.final_norm.bias",
    "head.weight": "tower.projection.weight",
    "head.bias": "tower.projection.bias",
    "btadapter_cls": "branch.cls_token",
    "btadapter_position.weight": "branch.time",
}
HEAD = {
    "extra_proj.0.weight": "branch.alignment_head.0.weight",
    "extra_proj.0.bias": "branch.alignment_head.0.bias",
    "extra_proj.1.weight": "branch.alignment_head.1.weight",
    "extra_proj.1.bias": "branch.alignment_head.1.bias",
}
# Published names of the stacks: (tower layers, spatial layers, temporal layers)
STACKS_CLIP = ("layers", "btadapter_S_layers", "btadapter_T_layers")
STACKS_EVA = ("blocks", "btadapter_S", "btadapter_T")
OWN_STACKS = ("tower.layers", "branch.spatial", "branch.temporal")
RESHAPED = {"cls_token": (1, 1, -1), "btadapter_cls_token": (1, 1, -1), "btadapter_cls": (1, 1, -1)}


def to_own(name: str, eva: bool) -> str | None:
    """Convert a published name to ours; None if there is no equivalent. Tower layers keep their index in the file."""
    top = TOP_EVA if eva else TOP_CLIP
    if name in top:
        return top[name]
    if name in HEAD:
        return HEAD[name]
    for stack, own in zip(STACKS_EVA if eva else STACKS_CLIP, OWN_STACKS, strict=True):
        match = re.fullmatch(rf"{stack}\.(\d+)\.(.+)", name)
        if match:
            return f"{own}.{match[1]}.{_layer_to_own(match[2], eva, own == 'branch.temporal')}"
    return None


def _layer_to_own(name: str, eva: bool, temporal: bool) -> str:
    if temporal:
        name = re.sub(r"^(layer_norm1|norm1)\.", "norm.", name)
        name = name.replace("temporal_fc.", "fc.")
    return rename(name, _LAYER_EVA if eva else _LAYER_CLIP)


def rename(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Replace the first pattern (a regular expression) that matches the start of ``name``."""
    for pattern, replacement in patterns:
        found, changed = re.subn(rf"^{pattern}", replacement, name)
        if changed:
            return found
    return name


def pack_qkv(state: Mapping[str, Tensor], under: str = "branch.") -> dict[str, Tensor]:
    """Concatenate q, k and v of CLIP's attentions in ``state`` for names that begin with ``under``."""
    packed = {}
    for name, tensor in state.items():
        match = re.fullmatch(rf"({re.escape(under)}.*attention\.)([qkv])_proj\.(weight|bias)", name)
        if match is None:
            packed[name] = tensor
        elif match[2] == "q":
            parts = [state.get(f"{match[1]}{part}_proj.{match[3]}") for part in "qkv"]
            if all(part is not None for part in parts):
                packed[f"{match[1]}qkv_{match[3]}"] = torch.cat([part for part in parts if part is not None])
    return packed


def unpack_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo :func:`pack_qkv` for a CLIP branch."""
    unpacked = {}
    for name, tensor in state.items():
        head, found, kind = name.rpartition("attention.qkv_")
        if found:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                unpacked[f"{head}attention.{part}_proj.{kind}"] = piece
        else:
            unpacked[name] = tensor
    return unpacked


def layer_to_reference(own: str, eva: bool) -> str:
    """Convert our name of a layer's tensor to its published name."""
    layer, name = own.split(".", 1)
    part, _, rest = name.partition(".")
    if part == "attention":
        if eva:
            rest = rest.replace("qkv_weight", "qkv.weight").replace("out_proj.", "proj.")
        part = "attn" if eva else "self_attn"
    elif part in ("fc1", "fc2"):
        part = f"mlp.{part}"
    elif part == "fc":
        part = "temporal_fc"
    elif part == "norm":
        part = "norm1" if eva else "layer_norm1"
    elif part.startswith("norm") and not eva:
        part = f"layer_{part}"
    return f"{layer}.{part}.{rest}"
