"""Checks of shape, dtype and device that the public functions share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bt_kernels.visible import VisibleTokens


def check_tensor(
    name: str,
    tensor: Tensor,
    legend: str,
    sizes: Sequence[int | None],
    like: tuple[str, Tensor] | None = None,
    any_dtype: bool = False,
) -> None:
    """Raise unless ``tensor`` is a floating-point tensor of shape ``sizes`` (None allows any size).

    ``legend`` names the dimensions in the message. ``like`` (name, tensor) has the required dtype and device; with
    ``any_dtype`` the device alone.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {legend}, but is {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor {legend}, but is {tensor.dtype}")
    if tensor.ndim != len(sizes):
        raise ValueError(f"{name} must have {len(sizes)} dimensions {legend}, but its shape is {list(tensor.shape)}")
    for size, expected in zip(tensor.shape, sizes, strict=True):
        if expected is not None and size != expected:
            wanted = ", ".join("any" if s is None else str(s) for s in sizes)
            raise ValueError(f"{name} must be {legend} = [{wanted}], but its shape is {list(tensor.shape)}")
    if like is not None:
        other_name, other = like
        # Under autocast the op brings its inputs to one dtype itself.
        if not any_dtype and tensor.dtype != other.dtype and not torch.is_autocast_enabled(other.device.type):
            raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, but is {tensor.dtype}")
        if tensor.device != other.device:
            raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, but is on {tensor.device}")


def check_is_visible(visible: VisibleTokens) -> None:
    """Raise unless ``visible`` is a VisibleTokens. Call this first: the shape checks of the tensors read its sizes."""
    if not isinstance(visible, VisibleTokens):
        raise TypeError(f"visible must be a VisibleTokens, but is {type(visible).__name__}")


def check_visible(visible: VisibleTokens, name: str, tensor: Tensor) -> None:
    """Raise unless ``visible`` has the batch size and the device of ``tensor``."""
    if visible.batch != tensor.shape[0]:
        raise ValueError(f"visible is for {visible.batch} videos, but {name} holds {tensor.shape[0]}")
    if visible.device != tensor.device:
        raise ValueError(f"visible must be on the device of {name}, {tensor.device}, but is on {visible.device}")
