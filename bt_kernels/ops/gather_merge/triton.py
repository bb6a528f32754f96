"""gather_merge in Triton. ``bt_kernels/_triton_gather.py`` has the legend and what it shares with gather_embed."""

import torch
import triton
import triton.language as tl

from bt_kernels._triton import launch
from bt_kernels._triton_gather import RowResults, row_places, write_rows
from bt_kernels._triton_gather_backward import RowGrads, merge_backward
from bt_kernels._triton_rows import LENGTHS, adjacent, mean_over_frames, real_frames


@triton.jit
def _merged(value, x, gate, d, inside, ACC: tl.constexpr):
    """Merge the tower's value and the branch's x; the gate applies along the last dimension."""
    if gate is not None:
        w = tl.load(gate + d, mask=inside, other=0.0).to(ACC)
        value = (1 - w) * x + w * value
    else:
        value += x
    return value


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    tower, branch, gate, index, frame_counts, out, norm_weight, norm_bias, normed, mean, rstd,
    tower_b, tower_t, tower_p, branch_b, branch_n, index_b, N, T, D, eps,
    W: tl.constexpr, ACC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Write (1 - gate)·branch + gate·m of CLS, where m is the mean of the tower's CLS, or of R patch rows."""
    pid = tl.program_id(0).to(tl.int64)
    parts = 1 + tl.cdiv(N, R)
    b, part = pid // parts, pid % parts
    d = tl.arange(0, W)
    inside = d < D
    video, rows = tower + b * tower_b, branch + b * branch_b
    if part == 0:
        cls = mean_over_frames(video, tower_t, real_frames(frame_counts, b, T), d, inside, ACC)
        cls = _merged(cls, tl.load(rows + d, mask=inside, other=0.0).to(ACC), gate, d, inside, ACC)
        tl.store(out + b * (1 + N) * D + d, cls.to(out.dtype.element_ty), mask=inside)
    else:
        columns = d[None, :]
        n = (part - 1) * R + tl.arange(0, R)
        token, t, visible = row_places(index, index_b, b, n, N, T)
        used = visible[:, None] & inside[None, :]
        at = t.to(tl.int64) * tower_t + token.to(tl.int64) * tower_p
        value = tl.load(video + at[:, None] + columns, mask=used, other=0.0).to(ACC)
        x = tl.load(rows + ((1 + n) * branch_n)[:, None] + columns, mask=used, other=0.0).to(ACC)
        value = _merged(value, x, gate, columns, inside[None, :], ACC)
        write_rows(
            value, out, norm_weight, norm_bias, normed, mean, rstd, b, n, visible, N, d, inside, D, eps, ACC
        )  # fmt: skip


def _run_forward(backbone, branch, gate, index, frame_counts, norm=None):
    tower, branch, index = adjacent(backbone), adjacent(branch), adjacent(index)
    gate = None if gate is None else gate.contiguous()
    results = RowResults(branch, index, norm)
    launch(
        _forward, results.programs, tower, branch, gate, index, frame_counts, *results.arguments(),
        *tower.stride()[:3], *branch.stride()[:2], index.stride(0), index.shape[1], tower.shape[1], tower.shape[3],
        results.eps, **results.options,
    )  # fmt: skip
    return results.returned()


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots):
    return _run_forward(backbone, branch, gate, index, frame_counts)[0]


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    return merge_backward(RowGrads(grad), backbone, branch, gate, index, frame_counts, needs)[:3]


def forward_norm(
    backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots, norm_eps
):  # fmt: skip
    return _run_forward(backbone, branch, gate, index, frame_counts, (norm_weight, norm_bias, norm_eps))


def backward_norm(
    grad_out, grad_normed, backbone, branch, gate, norm_weight, norm_bias, index, frame_counts, patches, frames, slots,
    norm_eps, out, mean, rstd, needs,
):  # fmt: skip
    if grad_normed is None:
        zeros = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        grads = backward(grad_out, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs[:3])
        return *grads, *zeros
    rows = RowGrads(grad_out, grad_normed, norm_weight, (out, mean, rstd))
    return merge_backward(rows, backbone, branch, gate, index, frame_counts, needs[:3])
