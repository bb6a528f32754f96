"""BLIP-2 and InstructBLIP: a Q-Former reads the tokens of an EVA-CLIP and returns a fixed number of tokens.

Their tower is EVA-CLIP-g without its last layer (39 of 40). They read the output of layer 38 (0-based), which is X of
layer L-2 in the full tower, the layer that video tokens are computed from. A LayerNorm that was trained with the
Q-Former follows (``post_layernorm``, not the CLIP's own final norm); video tokens pass it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration
from transformers.models.blip_2 import modeling_blip_2
from transformers.models.instructblip import modeling_instructblip

from bt_adapter.chat.families.base import Family, plain_tensors, read_table
from bt_adapter.towers.config import TowerConfig

_TOP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding": "position",
    "embeddings.patch_embedding.weight": "patch_embedding.weight",
    "embeddings.patch_embedding.bias": "patch_embedding.bias",
}
_LAYER = {
    "self_attn.qkv.weight": "attention.qkv_weight",
    "self_attn.projection.weight": "attention.out_proj.weight",
    "self_attn.projection.bias": "attention.out_proj.bias",
    "layer_norm1.weight": "norm1.weight",
    "layer_norm1.bias": "norm1.bias",
    "layer_norm2.weight": "norm2.weight",
    "layer_norm2.bias": "norm2.bias",
    "mlp.fc1.weight": "fc1.weight",
    "mlp.fc1.bias": "fc1.bias",
    "mlp.fc2.weight": "fc2.weight",
    "mlp.fc2.bias": "fc2.bias",
}


class Blip2(Family):
    """BLIP-2. The Q-Former is invariant to the order of video tokens."""

    name, model_class = "blip-2", Blip2ForConditionalGeneration
    layers_removed = 1
    has_qformer = True

    @property
    def vision_tower(self) -> nn.Module:
        return self.chat.vision_model

    @property
    def tower_parts(self) -> tuple[type[nn.Module], ...]:
        return (
            modeling_blip_2.Blip2VisionModel, modeling_blip_2.Blip2VisionEmbeddings, modeling_blip_2.Blip2Encoder,
            modeling_blip_2.Blip2EncoderLayer, modeling_blip_2.Blip2Attention, modeling_blip_2.Blip2MLP,
        )  # fmt: skip

    def position_table(self) -> Tensor:
        return read_table(self.plain_tower.embeddings, "position_embedding").flatten(0, 1)

    def call_layer(self, layer: int, tokens: Tensor) -> Tensor:
        return self.plain_tower.encoder.layers[layer](tokens)

    def tower(self) -> tuple[dict[str, Tensor], TowerConfig]:
        """Return the tower's tensors, as views if shapes differ; the key bias, which softmax cancels, is left out."""
        config: Any = self.plain_tower.config
        width = config.hidden_size
        tensors: dict[str, Tensor] = {}
        # a layer that is used at several positions has a name for each
        named = self.plain_tower.named_parameters(remove_duplicate=False)
        for name, tensor in plain_tensors(dict(named)).items():
            if name in _TOP:
                shape = {"class_embedding": (width,), "position": (-1, width)}.get(_TOP[name], tensor.shape)
                tensors[_TOP[name]] = tensor if shape == tensor.shape else tensor.detach().view(shape)
            elif name.startswith("encoder.layers."):
                layer, _, inside = name.removeprefix("encoder.layers.").partition(".")
                if inside == "self_attn.qkv.bias":
                    tensors[f"layers.{layer}.attention.q_bias"] = tensor.detach()[:width]
                    tensors[f"layers.{layer}.attention.v_bias"] = tensor.detach()[2 * width :]
                elif inside in _LAYER:  # leaves out the tensors of adapters
                    tensors[f"layers.{layer}.{_LAYER[inside]}"] = tensor
        return tensors, TowerConfig.of({**vars(config), "model_type": "eva", "projection_dim": None})

    @property
    def feature_layers(self) -> tuple[int, ...]:
        return (self.chat.config.vision_config.num_hidden_layers,)

    @property
    def video_length(self) -> int:
        return self.chat.config.num_query_tokens

    def image_length(self, height: int | None = None, width: int | None = None) -> int:
        return self.chat.config.num_query_tokens

    def project(self, tokens: Tensor, question: Mapping[str, Tensor] | None = None) -> Tensor:
        # CLS first as in the tower, and through the norm that the Q-Former was trained with
        normed = self.chat.vision_model.post_layernorm(torch.cat([tokens[:, -1:], tokens[:, :-1]], 1))
        table = self.chat.query_tokens
        queries = (read_table(self.chat, "query_tokens") if table.is_meta else table).expand(len(normed), -1, -1)
        output = self.chat.qformer(
            **self._instruct(queries, question),
            query_embeds=queries,
            encoder_hidden_states=normed,
            encoder_attention_mask=normed.new_ones(normed.shape[:2], dtype=torch.long),
        )
        read = output.last_hidden_state[:, : queries.shape[1]]
        projection = self.chat.language_projection
        # the weight of a quantised layer has an integer dtype; it accepts any input dtype
        return projection(read.to(projection.weight.dtype) if projection.weight.is_floating_point() else read)

    def _instruct(self, queries: Tensor, question: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {}

    @property
    def language_model(self) -> nn.Module:
        """The decoder of a decoder-only model. Raises ValueError with an encoder (Flan-T5): use ``generator``."""
        if not self.chat.config.use_decoder_only_language_model:
            raise ValueError("this model's language model has an encoder and a decoder; expected only a decoder")
        return self.chat.language_model.base_model

    @property
    def generator(self) -> Any:
        return self.chat.language_model


class InstructBlip(Blip2):
    """InstructBLIP: BLIP-2 with a Q-Former that also reads the question."""

    name, model_class = "instructblip", InstructBlipForConditionalGeneration
    needs_question = True

    @property
    def tower_parts(self) -> tuple[type[nn.Module], ...]:
        return (
            modeling_instructblip.InstructBlipVisionModel, modeling_instructblip.InstructBlipVisionEmbeddings,
            modeling_instructblip.InstructBlipEncoder, modeling_instructblip.InstructBlipEncoderLayer,
            modeling_instructblip.InstructBlipAttention, modeling_instructblip.InstructBlipMLP,
        )  # fmt: skip

    def _instruct(self, queries: Tensor, question: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        if question is None:
            raise ValueError("question must be given: InstructBLIP's Q-Former reads it with the video")
        ids = question["input_ids"]
        mask = question.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        return {"input_ids": ids, "attention_mask": torch.cat([mask.new_ones(queries.shape[:2]), mask], 1)}
