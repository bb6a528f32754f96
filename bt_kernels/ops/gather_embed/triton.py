"""gather_embed in Triton. ``bt_kernels/_triton_gather.py`` has the legend and what it shares with gather_merge."""

import torch
import triton
import triton.language as tl

from bt_kernels._triton import launch
from bt_kernels._triton_gather import RowResults, row_places, write_rows
from bt_kernels._triton_gather_backward import RowGrads, spread, sum_by_list
from bt_kernels._triton_rows import LENGTHS, RowLists, adjacent, mean_over_frames, real_frames, sum_dtype


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    tower, cls_token, pos, time, index, frame_counts, out, norm_weight, norm_bias, normed, mean, rstd,
    tower_b, tower_t, tower_p, index_b, N, T, D, eps,
    W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write ½(mean of the tower's CLS + cls_token + pos[0]), or tower + pos[1+p] + time[t] of R patch rows."""
    pid = tl.program_id(0).to(tl.int64)
    parts = 1 + tl.cdiv(N, R)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    video = tower + b * tower_b
    if part == 0:
        cls = mean_over_frames(video, tower_t, real_frames(frame_counts, b, T), d, inside, ACC)
        cls += tl.load(pos + d, mask=inside, other=0.0).to(ACC)
        cls = 0.5 * (cls + tl.load(cls_token + d, mask=inside, other=0.0).to(ACC))
        tl.store(out + b * (1 + N) * D + d, cls.to(out.dtype.element_ty), mask=inside)
    else:
        columns = d[None, :]
        n = (part - 1) * R + tl.arange(0, R)
        token, t, visible = row_places(index, index_b, b, n, N, T)
        used = visible[:, None] & inside[None, :]
        at = t.to(tl.int64) * tower_t + token.to(tl.int64) * tower_p
        value = tl.load(video + at[:, None] + columns, mask=used, other=0.0).to(ACC)
        value += tl.load(pos + (token * D)[:, None] + columns, mask=used, other=0.0).to(ACC)
        value += tl.load(time + (t * D)[:, None] + columns, mask=used, other=0.0).to(ACC)
        write_rows(
            value, out, norm_weight, norm_bias, normed, mean, rstd, b, n, visible, N, d, inside, D, eps, ACC
        )  # fmt: skip


def _run_forward(backbone, cls_token, pos, time, index, frame_counts, norm=None):
    tower, index = adjacent(backbone), adjacent(index)
    # More spill a few registers.
    results = RowResults(time, index, norm, {80: 24, 90: 32, 100: 24} if norm is None else 32)
    launch(
        _forward, results.programs, tower, cls_token.contiguous(), pos.contiguous(), time.contiguous(), index,
        frame_counts, *results.arguments(), *tower.stride()[:3], index.stride(0), index.shape[1], tower.shape[1],
        tower.shape[3], results.eps, **results.options,
    )  # fmt: skip
    return results.returned()


def forward(backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots):
    return _run_forward(backbone, cls_token, pos, time, index, frame_counts)[0]


def backward(grad, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs):
    return _backward(RowGrads(grad), grad, backbone, pos, time, index, frame_counts, patches, frames, needs)[:4]


def forward_norm(
    backbone, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, patches, frames, slots, norm_eps
):  # fmt: skip
    norm = (norm_weight, norm_bias, norm_eps)
    return _run_forward(backbone, cls_token, pos, time, index, frame_counts, norm)


def backward_norm(
    grad_out, grad_normed, backbone, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, patches,
    frames, slots, norm_eps, out, mean, rstd, needs,
):  # fmt: skip
    if grad_normed is None:
        zeros = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        grads = backward(
            grad_out, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs[:4]
        )
        return *grads, *zeros
    rows = RowGrads(grad_out, grad_normed, norm_weight, (out, mean, rstd))
    return _backward(rows, grad_out, backbone, pos, time, index, frame_counts, patches, frames, needs)


def _backward(rows: RowGrads, grad, backbone, pos, time, index, frame_counts, patches, frames, needs):
    """Return the gradients of backbone, cls_token, pos, time, norm weight and norm bias.

    If the tower and its position table are frozen (training), each gradient row is read once and summed by frame.
    """
    dtype, acc = rows.dtype, sum_dtype(rows.dtype)
    batch, tokens = index.shape
    half_cls = rows.empty(batch, rows.width, dtype=acc).zero_() if grad is None else 0.5 * grad[:, 0].to(acc)
    total = None
    if rows.norm and (needs[0] or needs[2]):
        total = rows.empty(batch, 1 + tokens, rows.width, dtype=acc).zero_()
        total[:, 0] = 2 * half_cls
    by_frame, *norm_grads = sum_by_list(rows, RowLists.by_frame(index, patches, frames), tokens, total)
    total_rows = rows if total is None else RowGrads(total)
    grad_backbone = grad_cls = grad_pos = grad_time = None
    if needs[0]:
        grad_backbone = spread(total_rows.grad, None, index, frame_counts, frames, patches, backbone.dtype, 0.5)
    if needs[1]:
        grad_cls = half_cls.sum(0).to(dtype)
    if needs[2]:
        by_patch = sum_by_list(total_rows, RowLists.by_patch(index, patches, frames), tokens)[0]
        grad_pos = torch.cat([half_cls.sum(0, keepdim=True), by_patch]).to(dtype)
    if needs[3]:
        grad_time = torch.nn.functional.pad(by_frame.to(dtype), (0, 0, 0, len(time) - frames))
    return grad_backbone, grad_cls, grad_pos, grad_time, *(g.to(dtype) for g in norm_grads)
