"""mlp in Triton: two products forward; in backward one product and torch's for the gradients of x and the weights."""

import torch
from torch import Tensor

from bt_kernels._triton_product import flat, multiply, row_blocks
from bt_kernels.ops.linear_add.triton import forward as linear_add
from bt_kernels.ops.mlp import reference


def forward(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stream, scale, act, keep) -> tuple[Tensor, Tensor]:
    activated = x.new_empty(*x.shape[:-1], fc1_weight.shape[0])
    hidden = torch.empty_like(activated) if keep else None
    multiply(flat(x), fc1_weight, activated, bias=fc1_bias, act=act, hidden=hidden)
    kept = x.new_empty(0) if hidden is None else hidden
    if stream is not None:
        return linear_add(activated, fc2_weight, fc2_bias, stream, scale), kept
    out = x.new_empty(*x.shape[:-1], fc2_weight.shape[0])
    multiply(flat(activated), fc2_weight, out, bias=fc2_bias, scale=scale)
    return out, kept


def hidden_grad(grad, fc2_weight, hidden, act) -> tuple[Tensor, Tensor, Tensor]:
    rows, hidden = flat(grad), hidden.contiguous()
    grad_hidden, activated = torch.empty_like(hidden), torch.empty_like(hidden)
    sums = hidden.new_empty(row_blocks(rows), hidden.shape[-1], dtype=torch.float32)
    multiply(rows, fc2_weight, grad_hidden, act=act, before=hidden, activated=activated, sums=sums, by_columns=True)
    return grad_hidden, activated, sums.sum(0)


def backward(*args) -> tuple[Tensor | None, ...]:
    return reference.backward_by(hidden_grad, *args)
