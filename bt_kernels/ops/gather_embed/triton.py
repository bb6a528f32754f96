"""gather_embed in Triton. ``bt_kernels/_triton_gather.py`` has the legend and what it shares with gather_merge."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_gather import plan_rows, row_places, write_rows
from bt_kernels._triton_gather_backward import spread, sum_by_list
from bt_kernels._triton_rows import LENGTHS, RowLists, adjacent, mean_over_frames, real_frames, sum_dtype


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    tower, cls_token, pos, time, index, frame_counts, out,
    tower_b, tower_t, tower_p, index_b, N, T, D,
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
        write_rows(value, out, b, n, N, d, inside, D)


def forward(backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots) -> Tensor:
    tower, index = adjacent(backbone), adjacent(index)
    (batch, tokens), width = index.shape, tower.shape[3]
    out = time.new_empty(batch, 1 + tokens, width)
    programs, options = plan_rows(index, width, time.dtype, {80: 24, 90: 32, 100: 24})  # more spill a few registers
    launch(
        _forward, programs, tower, cls_token.contiguous(), pos.contiguous(), time.contiguous(), index, frame_counts,
        out, *tower.stride()[:3], index.stride(0), tokens, tower.shape[1], width, **options,
    )  # fmt: skip
    return out


def backward(grad, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs):
    """Compute the gradients. If the tower and its position table are frozen, each row is read once, summed by frame."""
    grad = adjacent(grad)
    dtype, tokens = grad.dtype, index.shape[1]
    half_cls = 0.5 * grad[:, 0].to(sum_dtype(dtype))
    grad_backbone = grad_cls = grad_pos = grad_time = None
    if needs[0]:
        grad_backbone = spread(grad, None, index, frame_counts, frames, patches, backbone.dtype, 0.5)
    if needs[1]:
        grad_cls = half_cls.sum(0).to(dtype)
    if needs[2]:
        by_patch = sum_by_list(grad, RowLists.by_patch(index, patches, frames), tokens)
        grad_pos = torch.cat([half_cls.sum(0, keepdim=True), by_patch]).to(dtype)
    if needs[3]:
        by_frame = sum_by_list(grad, RowLists.by_frame(index, patches, frames), tokens)
        grad_time = torch.nn.functional.pad(by_frame.to(dtype), (0, 0, 0, len(time) - frames))
    return grad_backbone, grad_cls, grad_pos, grad_time
