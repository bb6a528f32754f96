"""Frozen text encoders, which embed captions in the shared video-text space."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.data.devices import to_device
from bt_adapter.mini import weights_folder
from bt_adapter.towers import open_clip
from bt_adapter.towers.image_models import load_image_model


class TextEncoder(nn.Module):
    """A frozen text tower with its tokenizer, in evaluation mode. It shares its parameters with the image model.

    Attributes:
        tokenizer: the text tower's tokenizer.
        context: maximum length of a caption in tokens.
        width: F, the width of an embedding.
    """

    tokenizer: Any
    context: int
    width: int

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode."""
        return super().train(False)

    @abstractmethod
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[n, F]``, not normalised; captions longer than the tower's context are cut."""

    def too_long(self, captions: Sequence[str]) -> list[int]:
        """Return the indices of captions with more tokens than the tower reads."""
        return [number for number, length in enumerate(self._lengths(list(captions))) if length > self.context]

    def _lengths(self, captions: list[str]) -> list[int]:
        """Count the tokens of each caption."""
        return [len(ids) for ids in self.tokenizer(captions, verbose=False)["input_ids"]]


class ClipText(TextEncoder):
    """The text tower of a Hugging Face CLIP.

    Args:
        clip: a ``CLIPModel`` or ``CLIPTextModelWithProjection``.
        tokenizer: its tokenizer.
    """

    def __init__(self, clip: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        model: Any = clip
        self.text_model, self.projection = model.text_model, model.text_projection
        self.tokenizer = tokenizer
        self.context = getattr(model.config, "text_config", model.config).max_position_embeddings
        self.width = self.projection.weight.shape[0]
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[n, F]``, not normalised; captions longer than the tower's context are cut."""
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self.context, return_tensors="pt"
        )
        device = self.projection.weight.device
        ids, mask = (to_device(tokens[name], device) for name in ("input_ids", "attention_mask"))
        out = self.text_model(input_ids=ids, attention_mask=mask)
        return self.projection(out.pooler_output)


class SiglipText(TextEncoder):
    """The text tower of a Hugging Face SigLIP, which reads captions padded to its context, without a mask.

    Args:
        model: a ``SiglipModel``.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.text_model, self.tokenizer = model.text_model, tokenizer
        self.context = model.config.text_config.max_position_embeddings
        self.width = self.text_model.head.out_features
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[n, F]``, not normalised; captions longer than the tower's context are cut."""
        tokens = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.context, return_tensors="pt"
        )
        ids = to_device(tokens["input_ids"], self.text_model.head.weight.device)
        return self.text_model(input_ids=ids).pooler_output


class OpenClipText(TextEncoder):
    """The text tower of an open_clip model.

    Args:
        model: an open_clip model.
        tokenizer: result of ``open_clip.get_tokenizer``.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        tower = getattr(model, "text", None)
        if tower is None:  # open_clip's class CLIP holds the parts of its text tower itself
            tower = nn.Module()
            for name in ("token_embedding", "transformer", "ln_final"):
                tower.add_module(name, getattr(model, name))
            tower.positional_embedding, tower.text_projection = model.positional_embedding, model.text_projection
        self.text_model, self.tokenizer = tower, tokenizer
        self._model = [model]  # in a list, so that its image tower is not a submodule
        self.context = int(tokenizer.context_length)
        self.requires_grad_(False).eval()
        self.width = self.forward(["a"]).shape[1]

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``[n, F]``, not normalised; captions longer than the tower's context are cut."""
        tokens = to_device(self.tokenizer(list(captions)), next(self.text_model.parameters()).device)
        mask = getattr(self._model[0], "attn_mask", None)
        if mask is not None and mask.device != tokens.device:  # a buffer of the whole model, which was not moved
            self._model[0].attn_mask = mask.to(tokens.device)
        return self._model[0].encode_text(tokens)

    def _lengths(self, captions: list[str]) -> list[int]:
        inner = getattr(self.tokenizer, "tokenizer", None)  # a Hugging Face tokenizer, for some models
        if inner is not None:
            return [len(ids) for ids in inner(captions)["input_ids"]]
        return [len(self.tokenizer.encode(caption)) + 2 for caption in captions]  # beginning and end


def load_clip(name: str | os.PathLike[str]) -> tuple[nn.Module, TextEncoder]:
    """Load an image model with both towers in float32, and its text encoder.

    name: as for `load_image_model`, whose errors are raised.
    """
    from transformers import AutoTokenizer, SiglipModel

    name = os.fspath(name)
    model: Any = load_image_model(name, with_text=True)
    if open_clip.is_model(model):
        return model, OpenClipText(model, open_clip.load_tokenizer(name))
    tokenizer = AutoTokenizer.from_pretrained(weights_folder("clip") if name == "mini" else name)
    return model, SiglipText(model, tokenizer) if isinstance(model, SiglipModel) else ClipText(model, tokenizer)
