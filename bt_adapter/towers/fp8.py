"""Multiply by frozen weights in 8 bits, on GPUs with float8 tensor cores (Ada, Hopper and later)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt_kernels import quantize_rows

_FP8 = torch.float8_e4m3fn


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
        values, scale = quantize_rows(weight.detach())
        # as integers, so that a module's .to(dtype) does not convert them
        self.register_buffer("bytes", values.view(torch.uint8))
        self.register_buffer("scale_bits", scale.t().view(torch.int32))

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute ``x·weightᵀ + bias`` in the dtype of ``x``, ``[..., I]`` to ``[..., O]``."""
        rows, scale = quantize_rows(x.flatten(0, -2))
        weight, of_weight = self.get_buffer("bytes").view(_FP8).t(), self.get_buffer("scale_bits").view(torch.float32)
        # Row-wise and column-wise scales are supported only for results in bfloat16, and so is a bias in the product.
        in_product = bias.to(torch.bfloat16) if bias is not None and x.dtype == torch.bfloat16 else None
        out = torch._scaled_mm(rows, weight, scale, of_weight, bias=in_product, out_dtype=torch.bfloat16)
        out = out.to(x.dtype).unflatten(0, x.shape[:-1])
        return out if bias is None or in_product is not None else out.add_(bias.to(x.dtype))
