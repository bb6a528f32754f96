"""Loads the text tower contained in a published pretraining checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from bt_adapter.errors import CheckpointError
from bt_adapter.model.checkpoint import load_exactly
from bt_adapter.towers.names import rename
from bt_adapter.towers.text import ClipText, OpenClipText, TextEncoder

_PREFIX = "text_backbone."
_HEAD_WIDTH = 64
# EVA's name (regex) → Hugging Face's.
_EVA = [
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"transformer\.resblocks\.(\d+)\.ln_", r"text_model.encoder.layers.\1.layer_norm"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"text_model.encoder.layers.\1.self_attn.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"text_model.encoder.layers.\1.mlp.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"text_model.encoder.layers.\1.mlp.fc2."),
    (r"ln_final\.", "text_model.final_layer_norm."),
]
_EVA_QKV = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def published_text(tensors: Mapping[str, Tensor], text: TextEncoder) -> TextEncoder:
    """Return the text encoder of a checkpoint, or ``text`` if the checkpoint has none.

    Args:
        tensors: tensors of the checkpoint under their published names.
        text: text encoder of the checkpoint's CLIP; its tokenizer is used. A CLIP checkpoint's tensors are loaded into
            it; an EVA checkpoint (GELU, heads of width 64) defines its text tower completely, and its tensors are
            loaded into open_clip's EVA01-g-14 too.

    Raises:
        CheckpointError: names or shapes do not fit, or ``text`` is of another kind.
    """
    tower = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    if not tower:
        return text
    is_eva = "ln_final.weight" in tower
    if isinstance(text, OpenClipText) and is_eva:
        load_exactly(text.text_model, tower, "the checkpoint's text tower")
        return text
    if not isinstance(text, ClipText):
        raise CheckpointError(
            f"the checkpoint contains a text tower of {'EVA-CLIP' if is_eva else 'CLIP'}, but that of clip is a "
            f"{type(text).__name__}: give the Hugging Face CLIP that the checkpoint belongs to"
        )
    if is_eva:
        return _eva_text(tower, text)
    state = {
        name.replace("text_projection.", "projection."): tensor
        for name, tensor in tower.items()
        if not name.endswith("position_ids")
    }
    load_exactly(text, state, "the checkpoint's text tower")
    return text


def _eva_text(tower: Mapping[str, Tensor], text: TextEncoder) -> TextEncoder:
    state: dict[str, Tensor] = {}
    for name, tensor in tower.items():
        if match := _EVA_QKV.fullmatch(name):
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[f"text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = piece
        elif name == "text_projection":
            state["text_projection.weight"] = tensor.T
        else:
            state[rename(name, _EVA)] = tensor
    model = CLIPTextModelWithProjection(_eva_config(state, text))
    load_exactly(model, state, "the checkpoint's text tower")
    return ClipText(model, text.tokenizer)


def _eva_config(state: Mapping[str, Tensor], text: TextEncoder) -> CLIPTextConfig:
    try:
        vocabulary, width = state["text_model.embeddings.token_embedding.weight"].shape
        context = state["text_model.embeddings.position_embedding.weight"].shape[0]
        inner = state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        projection = state["text_projection.weight"].shape[0]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint's text tower lacks {error.args[0]}") from error
    tokenizer = text.tokenizer
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len({name.split(".")[3] for name in state if ".layers." in name}),
        num_attention_heads=max(1, width // _HEAD_WIDTH),
        vocab_size=vocabulary,
        max_position_embeddings=context,
        projection_dim=projection,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
