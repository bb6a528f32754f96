"""LLaVA-1.5, LLaVA-NeXT and ViP-LLaVA: a projector maps the tokens of a CLIP to the language model's embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    VipLlavaForConditionalGeneration,
    VipLlavaModel,
)
from transformers.models.clip import modeling_clip
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from bt_adapter.chat.families.base import Family, plain_tensors, read_table
from bt_adapter.chat.families.layers import video_tokens_of_layers
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.time_steps import Long
from bt_adapter.progress import Progress
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.image_models import read_tower


class Llava(Family):
    """LLaVA-1.5 and models of the same structure: P tokens per still, P+1 per video, each through the projector."""

    name, model_class, inner_class = "llava", LlavaForConditionalGeneration, LlavaModel

    @property
    def vision_tower(self) -> nn.Module:
        return self.home.vision_tower

    @property
    def tower_parts(self) -> tuple[type[nn.Module], ...]:
        return (
            modeling_clip.CLIPVisionModel, modeling_clip.CLIPVisionEmbeddings, modeling_clip.CLIPEncoder,
            modeling_clip.CLIPEncoderLayer, modeling_clip.CLIPAttention, modeling_clip.CLIPMLP,
        )  # fmt: skip

    def position_table(self) -> Tensor:
        table = self.plain_tower.embeddings.position_embedding
        if hasattr(table.weight, "full_tensor"):
            return read_table(table, "weight")
        return table(torch.arange(1 + self.patches, device=self.tower_place()[0]))

    def call_layer(self, layer: int, tokens: Tensor) -> Tensor:
        return self.plain_tower.encoder.layers[layer](tokens, attention_mask=None)

    def tower(self) -> tuple[dict[str, Tensor], TowerConfig]:
        found = read_tower(self.plain_tower)
        if found.config.model_type != "clip_vision_model":
            raise TypeError(
                f"image_chat_model's vision tower must be a CLIP, but is a {type(self.plain_tower).__name__}: "
                "this chat model accepts only branches for a CLIP"
            )
        return plain_tensors(found.tensors), found.config

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """From ``vision_feature_layer``, which indexes the tower's hidden states, its input first."""
        config = self.chat.config
        # transformers 5.17 uses the plural name for ViP-LLaVA; newer versions accept both.
        chosen = getattr(config, "vision_feature_layers", None)
        chosen = config.vision_feature_layer if chosen is None else chosen
        layers = self.chat.config.vision_config.num_hidden_layers
        chosen = (chosen,) if isinstance(chosen, int) else tuple(chosen)
        return tuple(layer + layers + 1 if layer < 0 else layer for layer in chosen)

    @property
    def home(self) -> Any:
        return self.chat if isinstance(self.chat, cast(type, self.inner_class)) else self.chat.model

    @property
    def video_length(self) -> int:
        return self.patches + 1

    def image_length(self, height: int | None = None, width: int | None = None) -> int:
        """P, or P+1 where the model keeps CLS (``vision_feature_select_strategy`` "full")."""
        return self.patches + (getattr(self.chat.config, "vision_feature_select_strategy", "default") == "full")

    def project(self, tokens: Tensor, question: Mapping[str, Tensor] | None = None) -> Tensor:
        return self.home.multi_modal_projector(tokens)

    def video_tokens(
        self,
        model: BTAdapterVisionModel,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        start_layer: int | None = None,
        branch: bool = True,
        progress: Progress | None = None,
        long: Long = "average",
        draws: Iterable[Tensor] | None = None,
    ) -> Tensor:
        layers = self.feature_layers
        if len(layers) == 1:
            return super().video_tokens(model, pixel_values, features, start_layer, branch, progress, long, draws)
        if pixel_values is None:
            raise ValueError(
                f"this model reads its tower after layers {layers}: give pixel_values (stored features hold one)"
            )
        return video_tokens_of_layers(model, pixel_values, layers, branch, progress, long, draws)

    @property
    def language_model(self) -> nn.Module:
        return self.home.language_model

    @property
    def generator(self) -> Any:
        return self.chat


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6): stills are split into tiles with newline tokens; a video has only P+1 tokens.

    A 5-d tensor holds stills if ``image_sizes`` is given, else videos.
    """

    name, model_class, inner_class = "llava_next", LlavaNextForConditionalGeneration, LlavaNextModel

    def image_length(self, height: int | None = None, width: int | None = None) -> int:
        """Return the number of tokens of a picture of that size. Raises ValueError without a size."""
        if height is None or width is None:
            raise ValueError("height and width must be given: a still's tokens depend on them in LLaVA-NeXT")
        config = self.chat.config
        tile = config.vision_config.image_size
        pieces = image_size_to_num_patches((height, width), config.image_grid_pinpoints, tile)
        blank = torch.empty(pieces, self.patches, 1, device="meta")  # only the number of tokens is needed
        packed, _ = self.home.pack_image_features(
            [blank], [(height, width)], config.vision_feature_select_strategy, torch.empty(1, device="meta")
        )
        return len(packed[0])

    def stills(self, pixels: list[Tensor], sizes: list, kwargs: dict[str, Any]) -> list[Tensor]:
        if None in sizes:
            raise ValueError("image_sizes must have (height, width) for every still, but has None for one")
        most = max(len(pieces) for pieces in pixels)
        padded = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p in pixels]
        return list(self.home.get_image_features(torch.stack(padded), torch.tensor(sizes), **kwargs).pooler_output)

    def takes_videos(self, pixel_values: Tensor, image_sizes: Any = None) -> bool:
        return pixel_values.ndim == 5 and image_sizes is None


class VipLlava(Llava):
    """ViP-LLaVA: its projector reads several concatenated tower layers. See ``layers.video_tokens_of_layers``."""

    name, model_class, inner_class = "vipllava", VipLlavaForConditionalGeneration, VipLlavaModel
