"""gather_merge in Triton. ``bt_kernels/_triton_gather.py`` has the legend and what it shares with gather_embed."""

import triton
import triton.language as tl
from torch import Tensor

from bt_kernels._triton import launch
from bt_kernels._triton_gather import plan_rows, row_places, write_rows
from bt_kernels._triton_gather_backward import merge_backward
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
    tower, branch, gate, index, frame_counts, out,
    tower_b, tower_t, tower_p, branch_b, branch_n, index_b, N, T, D,
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
        write_rows(value, out, b, n, N, d, inside, D)


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots) -> Tensor:
    tower, branch, index = adjacent(backbone), adjacent(branch), adjacent(index)
    gate = None if gate is None else gate.contiguous()
    out = branch.new_empty(branch.shape)
    programs, options = plan_rows(index, branch.shape[-1], branch.dtype)
    launch(
        _forward, programs, tower, branch, gate, index, frame_counts, out, *tower.stride()[:3], *branch.stride()[:2],
        index.stride(0), index.shape[1], tower.shape[1], tower.shape[3], **options,
    )  # fmt: skip
    return out


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    return merge_backward(grad, backbone, branch, gate, index, frame_counts, needs)
