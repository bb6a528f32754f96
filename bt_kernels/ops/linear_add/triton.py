"""linear_add in Triton: one product, which reads the stream and writes the sum. Backward is products of torch."""

import torch
from torch import Tensor

from bt_kernels._triton_product import flat, multiply
from bt_kernels.ops.linear_add import reference

backward = reference.backward


def forward(x, weight, bias, stream, scale, offset=None) -> Tensor:
    out = torch.empty(stream.shape, dtype=stream.dtype, device=stream.device)
    first = stream.shape[1] - x.shape[1]
    if first:
        out[:, :first] = stream[:, :first]
    multiply(
        flat(x), weight.contiguous(), out, bias=None if bias is None else bias.contiguous(), stream=stream.contiguous(),
        scale=None if scale is None else scale.contiguous(), offset=None if offset is None else offset.contiguous(),
    )  # fmt: skip
    return out
