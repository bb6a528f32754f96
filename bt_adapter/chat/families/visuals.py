"""Stills and videos of one call, in the order in which they stand in the prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class Visuals(list[Tensor]):
    """Goes in the place of ``pixel_values`` where stills and videos, or videos of different length, come together.

    ``Visuals([video, still])`` with the video ``[T, 3, h, w]`` and the still ``[3, h, w]``, normalised. The order is
    that of the image tokens: prompt by prompt, and inside a prompt from left to right.

    Args:
        items: the stills and videos.
        image_sizes: for LLaVA-NeXT alone, one entry an item: the picture's (height, width) where the item is a still
            ``[pieces, 3, h, w]`` as its processor cuts it, None where it is a video.

    Raises:
        TypeError, ValueError: an item is no float tensor of such a shape, or the lengths differ.
    """

    def __init__(self, items: Iterable[Tensor], image_sizes: Sequence[tuple[int, int] | None] | None = None) -> None:
        super().__init__(items)
        for i, item in enumerate(self):
            if not isinstance(item, Tensor) or not item.is_floating_point():
                raise TypeError(f"items[{i}] must be a float tensor, but is {type(item).__name__}")
            if item.ndim not in (3, 4):
                raise ValueError(
                    f"items[{i}] must be a still [3, h, w] or a video [T, 3, h, w], but is {list(item.shape)}"
                )
        sizes = [None] * len(self) if image_sizes is None else list(image_sizes)
        if len(sizes) != len(self):
            raise ValueError(f"image_sizes must have an entry for each of the {len(self)} items, but has {len(sizes)}")
        self.image_sizes = sizes

    def is_video(self, i: int) -> bool:
        """Whether item i is a video."""
        return self[i].ndim == 4 and self.image_sizes[i] is None

    @staticmethod
    def of(items: Iterable[Tensor]) -> Visuals:
        """A plain list of stills and videos as one."""
        return items if isinstance(items, Visuals) else Visuals(items)

    @property
    def shape(self) -> torch.Size:
        """How many there are: what chat models ask ``pixel_values`` for."""
        return torch.Size([len(self)])

    def size(self, dim: int) -> int:
        """As :attr:`shape`."""
        return self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Visuals:
        """All items moved or cast, as ``Tensor.to`` does."""
        return Visuals([item.to(*args, **kwargs) for item in self], self.image_sizes)
