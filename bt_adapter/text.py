"""The frozen text tower: captions to vectors of the space that videos are compared in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.hugging_face import load_clip_model
from bt_adapter.image_settings import read_image_settings


class TextEncoder(nn.Module):
    """A CLIP's text tower and tokenizer, frozen, in evaluation mode.

    Args:
        clip: a Hugging Face ``CLIPModel`` or ``CLIPTextModelWithProjection``; its parameters are shared.
        tokenizer: its tokenizer.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        model: Any = clip
        self.text_model, self.projection = model.text_model, model.text_projection
        self.tokenizer = tokenizer
        self.context: int = getattr(model.config, "text_config", model.config).max_position_embeddings
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TextEncoder:
        """Nothing: it stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[n, F]``, not normalised; captions longer than the tower's context are cut."""
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        ).to(self.projection.weight.device)
        out = self.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return self.projection(out.pooler_output)

    def too_long(self, captions: Sequence[str]) -> list[int]:
        """Which of the captions have more tokens than the tower reads."""
        lengths = (len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"])
        return [number for number, length in enumerate(lengths) if length > self.context]


def load_clip(name: str | os.PathLike[str]) -> tuple[nn.Module, TextEncoder]:
    """A CLIP with both towers, float32, and its text encoder.

    Args:
        name: "mini" (the small CLIP of this package), a local folder, or a hub name.

    Raises:
        OSError: it is not there. CheckpointError: it holds no CLIP, or one that lacks weights.
    """
    if os.fspath(name) == "mini":
        from bt_adapter.mini.clip import load_clip as load_mini

        clip, tokenizer = load_mini()
    else:
        from transformers import AutoTokenizer, CLIPModel

        clip: Any = load_clip_model(CLIPModel, name)  # type: ignore[no-redef]
        clip.image_settings = read_image_settings(name, clip.config.vision_config.image_size)
        tokenizer = AutoTokenizer.from_pretrained(os.fspath(name))
    return clip, TextEncoder(clip, tokenizer)
