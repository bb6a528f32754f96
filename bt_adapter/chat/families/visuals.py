"""Containers for the stills and videos of one call, in the order of their image tokens in the prompts."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class SizedStill(Tensor):
    """A still in tiles that carries the size of its picture, (height, width).

    Trainers, data loaders and pickling rebuild lists from their items, which would lose a size stored in the list. A
    result of the same shape (moved, cast, cloned, pinned) keeps the size; any other result is a plain tensor.
    """

    image_size: tuple[int, int] | None = None

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if not isinstance(result, cls) or result.image_size is not None:
            return result
        source = args[0] if args else None
        if isinstance(source, cls) and source.shape == result.shape:
            result.image_size = source.image_size
            return result
        return result.as_subclass(Tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> SizedStill:
        size = self.image_size
        new = copy.deepcopy(self.as_subclass(Tensor), memo)
        memo[id(self)] = new if size is None else SizedStill.of(new, size)
        return memo[id(self)]

    @staticmethod
    def of(pieces: Tensor, size: tuple[int, int] | Tensor) -> SizedStill:
        """Make a still of ``pieces`` (same memory) and the size of its picture."""
        still = pieces.as_subclass(SizedStill)
        height, width = (int(side) for side in size)
        still.image_size = (height, width)
        return still


class Visuals(list[Tensor]):
    """A list passed as ``pixel_values`` when stills and videos, or videos of different length, are mixed.

    ``Visuals([video, still])`` with the video ``[T, 3, h, w]`` and the still ``[3, h, w]``, normalised. The order is
    that of the image tokens: prompt by prompt, and inside a prompt from left to right.

    Args:
        items: the stills and videos.
        image_sizes: only for LLaVA-NeXT, one entry per item: the picture's (height, width) if the item is a still
            ``[pieces, 3, h, w]`` from its processor, None if it is a video. The sizes are stored with the items, so a
            list that a trainer or data loader builds of them keeps them. None: use the sizes stored with the items.

    Raises:
        TypeError, ValueError: an item is not a float tensor of such a shape, or the lengths differ.
    """

    def __init__(self, items: Iterable[Tensor], image_sizes: Sequence[tuple[int, int] | None] | None = None) -> None:
        super().__init__(items)
        if image_sizes is not None:
            if len(image_sizes) != len(self):
                raise ValueError(
                    f"image_sizes must have an entry for each of the {len(self)} items, but has {len(image_sizes)}"
                )
            for i, size in enumerate(image_sizes):
                if isinstance(self[i], Tensor):
                    self[i] = self[i].as_subclass(Tensor) if size is None else SizedStill.of(self[i], size)
        for i, item in enumerate(self):
            if not isinstance(item, Tensor) or not item.is_floating_point():
                raise TypeError(f"items[{i}] must be a float tensor, but is {type(item).__name__}")
            if item.ndim not in (3, 4):
                raise ValueError(
                    f"items[{i}] must be a still [3, h, w] or a video [T, 3, h, w], but is {list(item.shape)}"
                )

    @property
    def image_sizes(self) -> list[tuple[int, int] | None]:
        """The picture's (height, width) for each still in tiles; None for the other items."""
        return [getattr(item, "image_size", None) for item in self]

    def __getitem__(self, places: Any) -> Any:
        found = super().__getitem__(places)
        return Visuals(found) if isinstance(places, slice) else found

    def __add__(self, other: Any) -> Any:
        return Visuals([*self, *other])

    def copy(self) -> Visuals:
        """Return a shallow copy."""
        return Visuals(self)

    def is_video(self, i: int) -> bool:
        """Whether item i is a video."""
        return self[i].ndim == 4 and self.image_sizes[i] is None

    @staticmethod
    def of(items: Iterable[Tensor]) -> Visuals:
        """Convert a plain list of stills and videos."""
        return items if isinstance(items, Visuals) else Visuals(items)

    @property
    def shape(self) -> torch.Size:
        """The number of items, as a one-dimensional size; chat models read ``pixel_values.shape``."""
        return torch.Size([len(self)])

    def size(self, dim: int) -> int:
        """Return one dimension of :attr:`shape`."""
        return self.shape[dim]

    def to(self, *args: Any, **kwargs: Any) -> Visuals:
        """Move or cast all items, like ``Tensor.to``."""
        return Visuals(item.to(*args, **kwargs) for item in self)

    def pin_memory(self, device: Any = None) -> Visuals:
        """Copy all items to pinned memory, like ``Tensor.pin_memory``."""
        return Visuals(item.pin_memory() for item in self)
