"""pool_video_tokens in Triton: one program for each token of the result, or of the gradient.

Legend: B videos, T frames of the tower, S frames of the branch, P patches, N visible rows, D width, W the
next power of two.
"""

import torch
import triton
import triton.language as tl

from bt_kernels._triton import launch
from bt_kernels._triton_rows import (
    FRAMES_AT_ONCE,
    LENGTHS,
    adjacent,
    mean_over_frames,
    real_frames,
    row_options,
    rows_by_place,
)


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    tower, branch, rows, frame_counts, out, tower_b, tower_t, tower_p, branch_b, branch_n, T, S, P, D,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Compute ½(mean over the tower's frames + mean over the branch's rows of the patch); CLS is written last."""
    pid = tl.program_id(0).to(tl.int64)
    b, token = pid // (1 + P), pid % (1 + P)  # token 0 is CLS
    d = tl.arange(0, W)
    inside = d < D
    count = real_frames(frame_counts, b, T)
    value = mean_over_frames(tower + b * tower_b + token * tower_p, tower_t, count, d, inside, ACC)
    if token == 0:
        value += tl.load(branch + b * branch_b + d, mask=inside, other=0.0).to(ACC)
    else:
        t = tl.arange(0, FRAMES_AT_ONCE)
        total = tl.zeros([W], ACC)
        number = tl.zeros([], tl.int32)
        for first in range(0, S, FRAMES_AT_ONCE):
            inside_list = first + t < S
            n = tl.load(rows + b * (P * S + 1) + (token - 1) * S + first + t, mask=inside_list, other=-1)
            visible = inside_list & (n >= 0)
            at = branch + b * branch_b + (1 + n)[:, None] * branch_n + d[None, :]
            values = tl.load(at, mask=visible[:, None] & inside[None, :], other=0.0)
            total += tl.sum(values.to(ACC), 0)
            number += tl.sum(visible.to(tl.int32), 0)
        value += total / tl.maximum(number, 1).to(ACC)
    place = tl.where(token == 0, P, token - 1)
    tl.store(out + (b * (1 + P) + place) * D + d, (0.5 * value).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_branch(
    grad, index, counts, grad_branch, grad_b, grad_p, index_b, N, S, P, D,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Divide half the patch's gradient equally among its rows; CLS gets half of its gradient."""
    pid = tl.program_id(0).to(tl.int64)
    b, r = pid // (1 + N), pid % (1 + N)
    d = tl.arange(0, W)
    inside = d < D
    place = tl.load(index + b * index_b + r - 1, mask=r > 0, other=0)
    patch = tl.where(r > 0, place // S, P)
    share = tl.load(counts + b * P + patch, mask=(r > 0) & (place >= 0), other=1)
    at = grad + b * grad_b + patch * grad_p + d
    value = tl.load(at, mask=inside & (place >= 0), other=0.0).to(ACC) * 0.5 / tl.maximum(share, 1).to(ACC)
    tl.store(grad_branch + pid * D + d, value.to(grad_branch.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _backward_tower(
    grad, frame_counts, grad_tower, grad_b, grad_p, T, P, D,
    W: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Divide half the token's gradient equally among the real frames; padding frames get zeros."""
    pid = tl.program_id(0).to(tl.int64)
    frame, token = pid // (1 + P), pid % (1 + P)
    b, t = frame // T, frame % T
    d = tl.arange(0, W)
    inside = d < D
    count = real_frames(frame_counts, b, T)
    place = tl.where(token == 0, P, token - 1)
    value = tl.load(grad + b * grad_b + place * grad_p + d, mask=inside & (t < count), other=0.0).to(ACC)
    value = value * 0.5 / tl.maximum(count, 1).to(ACC)
    tl.store(grad_tower + pid * D + d, value.to(grad_tower.dtype.element_ty), mask=inside)


def forward(backbone, branch, index, frame_counts, patches, frames, slots):
    backbone, branch = adjacent(backbone), adjacent(branch)
    batch, _, width = branch.shape
    out = branch.new_empty(batch, patches + 1, width)
    launch(
        _forward, batch * (1 + patches), backbone, branch, rows_by_place(index, patches * frames), frame_counts, out,
        *backbone.stride()[:3], *branch.stride()[:2], backbone.shape[1], frames, patches, width,
        **row_options(width, branch.dtype, FRAMES_AT_ONCE.value),
    )  # fmt: skip
    return out


def backward(grad, backbone, branch, index, frame_counts, patches, frames, slots, needs):
    grad = adjacent(grad)
    batch, rows, width = branch.shape
    grad_backbone = grad_branch = None
    if needs[0]:
        grad_backbone = torch.empty(backbone.shape, dtype=backbone.dtype, device=backbone.device)
        launch(
            _backward_tower, batch * backbone.shape[1] * (1 + patches), grad, frame_counts, grad_backbone,
            *grad.stride()[:2], backbone.shape[1], patches, width,
            **row_options(width, branch.dtype),
        )  # fmt: skip
    if needs[1]:
        index = adjacent(index)
        patch = torch.where(index < 0, patches, index // frames)
        counts = torch.zeros(batch, patches + 1, dtype=torch.int32, device=index.device)
        counts.scatter_add_(1, patch, torch.ones_like(patch, dtype=torch.int32))
        grad_branch = torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
        launch(
            _backward_branch, batch * rows, grad, index, counts[:, :patches].contiguous(), grad_branch,
            *grad.stride()[:2], index.stride(0), rows - 1, frames, patches, width, **row_options(width, branch.dtype),
        )  # fmt: skip
    return grad_backbone, grad_branch
