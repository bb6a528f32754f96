"""Copy tensors from the host to a device without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device | str) -> Tensor:
    """Return ``values`` on a device.

    A copy from the host's memory goes through pinned memory, so that the host does not wait for the work that the
    device has still to do. Other copies are those of ``Tensor.to``.
    """
    device = torch.device(device)
    if values.device.type != "cpu" or device.type == "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def tensor_on(values: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor from numbers, as ``torch.tensor``, on a device and without waiting for it."""
    return to_device(torch.tensor(values, dtype=dtype), device)
