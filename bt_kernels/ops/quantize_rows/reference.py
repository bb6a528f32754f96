"""Definition of quantize_rows in plain PyTorch. Legend: n rows, I width."""

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_AMAX = 1e-12
"""Least largest element of a row that a scale is made for, so that rows of zeros are not divided by 0."""


def forward(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows in float8, ``[n, I]``, and their scales in float32, ``[n, 1]``."""
    # The product with 1/448 has the same bits on every device; CUDA divides by a number so, a CPU does not.
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=SMALLEST_AMAX) * (1 / LARGEST)
    return (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn, memory_format=torch.contiguous_format), scale
