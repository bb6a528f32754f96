"""alignment_loss in Triton: the two passes over rows. The rest is in ``chunks.py``.

Legend: B, T, P, N, D; F width of the shared space, W the next power of two of a row.
"""

import triton
import triton.language as tl

from bt_kernels._triton import launch
from bt_kernels._triton_rows import LENGTHS, adjacent, layer_norm, layer_norm_grad, row_options
from bt_kernels.ops.alignment_loss import chunks, gradients

_ROWS = 8  # rows of one program of _cosine


@triton.jit
def _load_place(index, i, rows_of_video):
    """Load the place p·T + t of row ``i`` of the branch; -1 for padding and for a video's first row, CLS."""
    video, row = i // rows_of_video, i % rows_of_video
    return tl.load(index + video * (rows_of_video - 1) + row - 1, mask=row > 0, other=-1)


@triton.jit(do_not_specialize=LENGTHS)
def _gather_norm(
    target, index, weight, bias, out, stride_b, stride_t, stride_p, first, rows_of_video, T, D, eps,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Normalise one token of the tower by LayerNorm."""
    i = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, W)
    inside = d < D
    place = _load_place(index, first + i, rows_of_video)
    real = place >= 0
    b = (first + i) // rows_of_video
    at = target + b * stride_b + (place % T) * stride_t + (1 + place // T) * stride_p
    x = tl.load(at + d, mask=inside & real, other=0.0).to(ACC)
    normed, _, _ = layer_norm(x[None, :], inside, D, eps)
    gain = tl.load(weight + d, mask=inside, other=0.0)[None, :]
    row = normed * gain + tl.load(bias + d, mask=inside, other=0.0)[None, :]
    row = tl.where(real, row, 0.0).to(out.dtype.element_ty)
    tl.store(out + i * D + d[None, :], row, mask=inside[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _cosine(
    y, b, index, gain, shift, losses, grad_y, partials, first, row_count, rows_of_video, F, rows_each, eps,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute the loss 2 - 2·â·b̂ of rows, a = LayerNorm(y), and its gradient in y from d/da = -2·(b̂ - cos·â)/|a|."""
    pid = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, W)
    inside = f < F
    weight = tl.load(gain + f, mask=inside, other=0.0)
    bias = tl.load(shift + f, mask=inside, other=0.0)
    bias_sum, weight_sum, shift_sum = tl.zeros([W], ACC), tl.zeros([W], ACC), tl.zeros([W], ACC)
    for i in range(pid * rows_each, tl.minimum((pid + 1) * rows_each, row_count)):
        real = _load_place(index, first + i, rows_of_video) >= 0
        used = inside & real
        x = tl.load(y + i * F + f, mask=used, other=0.0)[None, :]
        other = tl.load(b + i * F + f, mask=used, other=0.0)[None, :]
        normed, mean, rstd = layer_norm(x, inside, F, eps)
        a = normed * weight[None, :] + bias[None, :]
        length = tl.maximum(tl.sqrt(tl.sum(a * a, 1)), 1e-12)[:, None]
        unit = a / length
        other = other / tl.maximum(tl.sqrt(tl.sum(other * other, 1)), 1e-12)[:, None]
        cosine = tl.sum(unit * other, 1)[:, None]
        tl.store(losses + i, tl.where(real, 2 - 2 * tl.sum(tl.sum(cosine, 1), 0), 0.0))
        if grad_y is not None:
            grad = tl.where(used[None, :], (cosine * unit - other) * (2 / length), 0.0)
            back, _ = layer_norm_grad(grad, x, mean, rstd, weight, inside, F, ACC)
            back = tl.where(used[None, :], back, 0.0)
            tl.store(grad_y + i * F + f[None, :], back.to(grad_y.dtype.element_ty), mask=inside[None, :])
            bias_sum += tl.sum(back, 0)
            weight_sum += tl.sum(grad * normed, 0)
            shift_sum += tl.sum(grad, 0)
    if grad_y is not None:
        programs = tl.num_programs(0)
        to = partials + pid * F + f
        tl.store(to, bias_sum, mask=inside)
        tl.store(to + programs * F, weight_sum, mask=inside)
        tl.store(to + 2 * programs * F, shift_sum, mask=inside)


class _Rows:
    @staticmethod
    def gather_norm(target, index, first, count, weight, bias, eps, dtype):
        target = adjacent(target)
        width, rows = target.shape[3], 1 + index.shape[1]
        out = target.new_empty(count, width, dtype=dtype)
        launch(
            _gather_norm, count, target, index, weight, bias, out, *target.stride()[:3], first, rows, target.shape[1],
            width, eps, **row_options(width, weight.dtype),
        )  # fmt: skip
        return out

    @staticmethod
    def cosine(y, b, index, first, gain, shift, eps, grads, dtype):
        count, shared = y.shape
        losses = y.new_empty(count)
        programs = triton.cdiv(count, _ROWS)
        grad_y = y.new_empty(y.shape, dtype=dtype) if grads else None
        partials = y.new_empty(3, programs, shared) if grads else None
        launch(
            _cosine, programs, y, b, index, gain, shift, losses, grad_y, partials, first, count, 1 + index.shape[1],
            shared, _ROWS, eps, **row_options(shared, y.dtype),
        )  # fmt: skip
        return losses.sum(), grad_y, partials.sum(1) if grads else None


def forward(*args):
    return chunks.forward(_Rows, *args)


backward = gradients.scale_gradients
