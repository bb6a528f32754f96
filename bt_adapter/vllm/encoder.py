"""The part of a video chat model that encodes stills and videos, without its language model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from bt_adapter.chat.families import family_of
from bt_adapter.chat.native.modeling import NATIVE_CLASSES
from bt_adapter.chat.native.video_features import encode_videos
from bt_adapter.vllm.names import SERVED


class VisualEncoder(nn.Module):
    """Tower, branch and projector of a video chat model, with the code that computes them everywhere else.

    The weights are random until they are loaded. The attribute ``chat`` is the model of transformers with its language
    model and output layer removed.

    Args:
        config: the model's configuration, of a family in ``SERVED``.

    Raises:
        ValueError: another family, or a configuration without a branch.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        kinds = {NATIVE_CLASSES[name].config_class.model_type: NATIVE_CLASSES[name] for name in SERVED}
        if config.model_type not in kinds:
            raise ValueError(f"config.model_type must be one of {', '.join(kinds)}, but is {config.model_type}")
        config = copy.copy(config)
        # Only its width is needed, for the projector. A language model of one token and no layer is built and dropped.
        width = config.text_config.hidden_size
        config.text_config = LlamaConfig(
            hidden_size=width, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1, vocab_size=1,
            pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        self.chat = kinds[config.model_type](config)
        del self.chat.lm_head, self.chat.model.language_model
        self.chat.model.bt_adapter.alignment_head = None  # not in the model's files: only pretraining needs it
        self.chat.requires_grad_(False).eval()

    def videos(self, videos: Sequence[Tensor]) -> list[Tensor]:
        """Encode normalised frames, ``[T, 3, h, w]`` each, as the language model's embeddings, ``[P+1, W]`` each."""
        with torch.no_grad():
            return encode_videos(self.chat.model, [self._placed(video) for video in videos], None)

    def stills(self, pixels: Sequence[Tensor], sizes: Sequence[tuple[int, int] | None]) -> list[Tensor]:
        """Encode stills as the image chat model does it, as embeddings ``[tokens, W]`` each.

        Args:
            pixels: normalised stills ``[3, h, w]``, or ``[tiles, 3, h, w]`` for LLaVA-NeXT.
            sizes: (height, width) of each picture for LLaVA-NeXT, else None.
        """
        with torch.no_grad():
            return family_of(self.chat).stills([self._placed(one) for one in pixels], list(sizes), {})

    def _placed(self, pixels: Tensor) -> Tensor:
        device, dtype = family_of(self.chat).tower_place()
        return pixels.to(device, dtype)
