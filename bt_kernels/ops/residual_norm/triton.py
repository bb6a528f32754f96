"""residual_norm in Triton: forward and backward read and write each row once.

Backward adds up the gradients of weight and bias in two stages, the second by torch, so their bits are always the same.

Legend: B sequences, R rows of each, D width, W the next power of two, N rows that a program processes at a time, M rows
that a program of the backward adds up.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_rows import (
    accumulator,
    adjacent,
    layer_norm,
    layer_norm_grad,
    outer_strides,
    rows_per_sum,
    sum_dtype,
)
from bt_kernels.ops.residual_norm import reference

_ROWS = 2  # N


@triton.jit(do_not_specialize=["rows", "first", "parts"])
def _forward(
    x, update, scale, weight, bias, summed, normed, mean, rstd, x_b, x_r, update_b, update_r, rows, first, D, parts,
    eps, W: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add the update to N rows of a sequence, write the sum and its LayerNorm. The update begins at row ``first``."""
    pid = tl.program_id(0)
    b, r = (pid // parts).to(tl.int64), (pid % parts) * N + tl.arange(0, N)
    d = tl.arange(0, W)
    inside, exists = d < D, r < rows
    used = exists[:, None] & inside[None, :]
    at = ((b * rows + r) * D)[:, None] + d[None, :]
    value = tl.load(x + b * x_b + (r.to(tl.int64) * x_r)[:, None] + d[None, :], mask=used, other=0.0)
    gain = tl.load(weight + d, mask=inside, other=0.0).to(ACC)
    shift = tl.load(bias + d, mask=inside, other=0.0).to(ACC)
    if update is not None:
        u = r - first
        has_update = exists & (u >= 0)
        from_update = update + b * update_b + (u.to(tl.int64) * update_r)[:, None] + d[None, :]
        added = tl.load(from_update, mask=has_update[:, None] & inside[None, :], other=0.0).to(ACC)
        if scale is not None:
            added *= tl.load(scale + b * (rows - first) + u, mask=has_update, other=0.0).to(ACC)[:, None]
        value = (value.to(ACC) + added).to(summed.dtype.element_ty)
        tl.store(summed + at, value, mask=used)
    row, centre, deviation = layer_norm(value.to(ACC), inside, D, eps)
    tl.store(normed + at, (row * gain[None, :] + shift[None, :]).to(normed.dtype.element_ty), mask=used)
    tl.store(mean + b * rows + r, centre, mask=exists)
    tl.store(rstd + b * rows + r, deviation, mask=exists)


@triton.jit(do_not_specialize=["rows", "first", "parts", "M", "sums_apart"])
def _backward(
    grad_summed, grad_normed, stream, scale, weight, mean, rstd, grad_x, grad_update, sums, summed_b, summed_r,
    normed_b, normed_r, stream_b, stream_r, rows, first, D, parts, M, sums_apart,
    W: tl.constexpr, ACC: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of M rows of a sequence, N at a time, and their share of those of weight and bias."""
    pid = tl.program_id(0)
    b, begin = (pid // parts).to(tl.int64), (pid % parts) * M
    d = tl.arange(0, W)
    inside = d < D
    columns = d[None, :]
    gain = tl.load(weight + d, mask=inside, other=0.0).to(ACC)
    weight_sum, bias_sum = tl.zeros([N, W], ACC), tl.zeros([N, W], ACC)
    for r0 in range(begin, tl.minimum(begin + M, rows), N):
        r = r0 + tl.arange(0, N)
        exists = r < rows
        far = r.to(tl.int64)[:, None]
        used = exists[:, None] & inside[None, :]
        row = tl.load(stream + b * stream_b + far * stream_r + columns, mask=used, other=0.0).to(ACC)
        given = tl.load(grad_normed + b * normed_b + far * normed_r + columns, mask=used, other=0.0).to(ACC)
        centre = tl.load(mean + b * rows + r, mask=exists, other=0.0)
        deviation = tl.load(rstd + b * rows + r, mask=exists, other=0.0)
        if grad_summed is not None:  # loaded before the sums over a row, which wait for the others
            passed = tl.load(grad_summed + b * summed_b + far * summed_r + columns, mask=used, other=0.0)
        grad, row = layer_norm_grad(given, row, centre, deviation, gain, inside, D, ACC)
        if grad_summed is not None:
            grad += passed.to(ACC)
        if grad_x is not None:
            tl.store(grad_x + ((b * rows + r) * D)[:, None] + columns, grad.to(grad_x.dtype.element_ty), mask=used)
        if grad_update is not None:
            u = r - first
            has_update = exists & (u >= 0)
            at = b * (rows - first) + u
            if scale is not None:
                grad *= tl.load(scale + at, mask=has_update, other=0.0).to(ACC)[:, None]
            to_update = grad_update + (at * D)[:, None] + columns
            tl.store(to_update, grad.to(grad_update.dtype.element_ty), mask=has_update[:, None] & inside[None, :])
        if sums is not None:
            weight_sum += given * row
            bias_sum += given
    if sums is not None:
        tl.store(sums + pid.to(tl.int64) * D + d, tl.sum(weight_sum, 0), mask=inside)
        tl.store(sums + (pid.to(tl.int64) + sums_apart) * D + d, tl.sum(bias_sum, 0), mask=inside)


def _row_options(width: int, dtype: torch.dtype, per_thread: int, warps_per_sm: int) -> dict:
    """Choose block width and warps for N whole rows at a time, so that a thread has ``per_thread`` elements of each."""
    block = triton.next_power_of_2(max(width, 16))
    warps = max(1, min(16, block * _ROWS // (32 * per_thread)))
    return {"W": block, "ACC": accumulator(dtype), "N": _ROWS, "warps": warps, "warps_per_sm": warps_per_sm}


def _joins(tensor: Tensor | None) -> bool:
    """Return whether the sequences of ``tensor`` follow each other as its rows do."""
    return tensor is None or tensor.shape[0] <= 1 or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def forward(x, update, scale, weight, bias, eps, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, update = adjacent(x), None if update is None else adjacent(update)
    batch, rows, width = x.shape
    summed = x.new_empty(0 if update is None else x.shape)
    normed = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    mean, rstd = (x.new_empty(batch, rows, dtype=sum_dtype(x.dtype)) for _ in range(2))
    parts = triton.cdiv(rows, _ROWS)
    launch(
        _forward, batch * parts, x, update, None if scale is None else scale.contiguous(), weight.contiguous(),
        bias.contiguous(), summed, normed, mean, rstd, *x.stride()[:2], *outer_strides(update, 2), rows,
        0 if update is None else rows - update.shape[1], width, parts, eps,
        **_row_options(width, x.dtype, 16, 32),
    )  # fmt: skip
    return summed, normed, mean, rstd


def backward(grad_summed, grad_normed, x, update, scale, weight, bias, eps, dtype, summed, mean, rstd, needs):
    if grad_normed is None:  # only the sum had a use: nothing of a LayerNorm
        return reference.backward(
            grad_summed, grad_normed, x, update, scale, weight, bias, eps, dtype, summed, mean, rstd, needs
        )
    stream = adjacent(x if update is None else summed)
    grad_summed = reference.gradient_of_stream(grad_summed, x)
    grad_normed, grad_summed = adjacent(grad_normed), None if grad_summed is None else adjacent(grad_summed)
    batch, rows, width = stream.shape
    wants_update = needs[1] and update is not None
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    grad_update = torch.empty(update.shape, dtype=update.dtype, device=x.device) if wants_update else None
    first = rows - update.shape[1] if wants_update else 0
    tensors = (grad_summed, grad_normed, stream)
    if first == 0 and all(map(_joins, tensors)):
        batch, rows = 1, batch * rows  # sequences may be short
    each = rows_per_sum(batch * rows)
    parts = triton.cdiv(rows, each)
    programs = batch * parts
    wants_sums = needs[2] or needs[3]
    sums = torch.empty(2, programs, width, dtype=mean.dtype, device=x.device) if wants_sums else None
    launch(
        _backward, programs, grad_summed, grad_normed, stream, None if scale is None else scale.contiguous(),
        weight.contiguous(), mean, rstd, grad_x, grad_update, sums, *(s for t in tensors for s in outer_strides(t, 2)),
        rows, first, width, parts, each, programs, **_row_options(width, x.dtype, 8, 16),
    )  # fmt: skip
    of_weights = [None, None] if sums is None else sums.sum(1).to(weight.dtype).unbind(0)
    return grad_x, grad_update, *(each if need else None for each, need in zip(of_weights, needs[2:], strict=True))
