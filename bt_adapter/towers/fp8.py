"""Multiply by frozen weights in 8 bits, on GPUs with float8 tensor cores (Ada, Hopper and later)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


class Fp8Weight(nn.Module):
    """A weight ``[O, I]`` as float8 (e4m3) with a scale per output, which replaces an ``nn.Linear``'s weight.

    Input rows are quantised dynamically with one scale per row, so no calibration is needed. The weight takes half the
    bytes of one in bfloat16.

    Raises:
        ValueError: O or I is not a multiple of 16, which the hardware requires.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            raise ValueError(f"weight must have sides that are multiples of 16, but is {list(weight.shape)}")
        values, scale = quantize(weight.detach())
        # as integers, so that a module's .to(dtype) does not convert them
        self.register_buffer("bytes", values.view(torch.uint8))
        self.register_buffer("scale_bits", scale.t().view(torch.int32))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x·weightᵀ + bias`` in the dtype of ``x``, ``[..., I]`` to ``[..., O]``."""
        rows, scale = quantize(x.flatten(0, -2))
        weight, of_weight = self.get_buffer("bytes").view(_FP8).t(), self.get_buffer("scale_bits").view(torch.float32)
        # row-wise and column-wise scales are supported only for results in bfloat16
        out = torch._scaled_mm(rows, weight, scale, of_weight, out_dtype=torch.bfloat16)
        out = out.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if bias is None else out.add_(bias.to(x.dtype))


def quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise ``[n, I]`` to float8 of the same shape and float32 scales ``[n, 1]``."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (rows / scale).clamp(-_LARGEST, _LARGEST).to(_FP8), scale
