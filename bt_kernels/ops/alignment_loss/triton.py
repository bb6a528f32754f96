"""alignment_loss in Triton: the two passes over rows. The rest is in ``chunks.py``.

Legend: B, T, P, N, D; F width of the shared space, C rows of a chunk, W the next power of two of a row.
"""

import torch
import triton
import triton.language as tl

from bt_kernels._triton import launch
from bt_kernels._triton_rows import adjacent, row_options
from bt_kernels.ops.alignment_loss import chunks, gradients

_ROWS = 8  # rows of one program of _cosine


@triton.jit
def _gather_norm(
    target, places, weight, bias, out, stride_b, stride_t, stride_p, first, rows, T, D, eps,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Normalise one token of the tower by LayerNorm."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, W)
    inside = d < D
    place = tl.load(places + first + i)
    real = place >= 0
    b = (first + i) // rows
    at = target + b * stride_b + (place % T) * stride_t + (1 + place // T) * stride_p
    x = tl.load(at + d, mask=inside & real, other=0.0).to(ACC)
    centred = tl.where(inside, x - tl.sum(x, 0) / D, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    gain = tl.load(weight + d, mask=inside, other=0.0)
    row = centred * scale * gain + tl.load(bias + d, mask=inside, other=0.0)
    tl.store(out + i * D + d, tl.where(real, row, 0.0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _cosine(
    y, b, places, gain, shift, losses, grad_y, partials, C, F, R, eps,
    GRADS: tl.constexpr, W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the loss 2 - 2·â·b̂ of R rows, a = LayerNorm(y), and its gradient in y from d/da = -2·(b̂ - cos·â)/|a|."""
    pid = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, W)
    inside = f < F
    weight = tl.load(gain + f, mask=inside, other=0.0)
    bias = tl.load(shift + f, mask=inside, other=0.0)
    bias_sum, weight_sum, shift_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    for i in range(pid * R, tl.minimum(pid * R + R, C)):
        real = tl.load(places + i) >= 0
        used = inside & real
        x = tl.load(y + i * F + f, mask=used, other=0.0)
        other = tl.load(b + i * F + f, mask=used, other=0.0)
        centred = tl.where(inside, x - tl.sum(x, 0) / F, 0.0)
        scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / F + eps)
        normed = centred * scale
        a = normed * weight + bias
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 0)), 1e-12)
        unit = a / length
        other = other / tl.maximum(tl.sqrt(tl.sum(other * other, 0)), 1e-12)
        cosine = tl.sum(unit * other, 0)
        tl.store(losses + i, tl.where(real, 2 - 2 * cosine, 0.0))
        if GRADS:
            grad = tl.where(used, (cosine * unit - other) * (2 / length), 0.0)
            scaled = grad * weight
            back = scale * (scaled - tl.sum(scaled, 0) / F - normed * (tl.sum(scaled * normed, 0) / F))
            back = tl.where(used, back, 0.0)
            tl.store(grad_y + i * F + f, back.to(grad_y.dtype.element_ty), mask=inside)
            bias_sum += back
            weight_sum += grad * normed
            shift_sum += grad
    if GRADS:
        programs = tl.num_programs(0)
        to = partials + pid * F + f
        tl.store(to, bias_sum, mask=inside)
        tl.store(to + programs * F, weight_sum, mask=inside)
        tl.store(to + 2 * programs * F, shift_sum, mask=inside)


class _Rows:
    @staticmethod
    def product_dtype(branch: torch.Tensor) -> torch.dtype:
        # In the interpreter torch multiplies on the CPU, where it does not sum 16-bit operands in float32.
        return torch.promote_types(branch.dtype, torch.float32) if branch.device.type == "cpu" else branch.dtype

    @staticmethod
    def gather_norm(target, places, first, weight, bias, eps, dtype):
        target = adjacent(target)
        width = target.shape[3]
        rows = len(places) // max(target.shape[0], 1)
        count = min(chunks.CHUNK, len(places) - first)
        out = target.new_empty(count, width, dtype=dtype)
        launch(
            _gather_norm, count, target, places, weight, bias, out, *target.stride()[:3], first, rows, target.shape[1],
            width, eps, **row_options(width, target.dtype),
        )  # fmt: skip
        return out

    @staticmethod
    def cosine(y, b, places, gain, shift, eps, grads, dtype):
        count, shared = y.shape
        losses = y.new_empty(count)
        programs = triton.cdiv(count, _ROWS)
        grad_y = y.new_empty(y.shape, dtype=dtype) if grads else None
        partials = y.new_empty(3, programs, shared) if grads else None
        launch(
            _cosine, programs, y, b, places, gain, shift, losses, grad_y, partials, count, shared, _ROWS, eps,
            GRADS=grads, **row_options(shared, y.dtype),
        )  # fmt: skip
        return losses, grad_y, partials.sum(1) if grads else None


def forward(*args):
    return chunks.forward(_Rows, *args)


backward = gradients.scale_gradients
