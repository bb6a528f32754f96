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
    multiply(flat(x), weight, out, bias=bias, stream=stream, scale=scale, offset=offset)
    return out
