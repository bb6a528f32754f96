"""spatial_attention in Triton: each frame's CLS and visible patches are read in place (rows S apart).

The CLS result of each frame is stored in float32 and averaged afterwards. The gradients of CLS are one float32 partial
sum per frame, added afterwards in a fixed order, so results are deterministic. ``triton_forward.py`` (with the legend)
and ``triton_backward.py`` have the kernels.
"""

import torch
import triton

from bt_kernels._triton import launch
from bt_kernels._triton_heads import cut_columns, cut_strides
from bt_kernels._triton_rows import RowLists, adjacent
from bt_kernels.ops.spatial_attention import triton_backward, triton_forward


def forward(qkv, frame_weight, index, frame_counts, patches, frames, slots):
    qkv = adjacent(qkv)
    batch, rows, _, heads, width = qkv.shape
    steps, groups = _grid(rows, patches, frames, slots)
    out = qkv.new_empty(batch, rows, heads, width)
    # Entries of patches that are not visible must be zeros.
    lse = (qkv.new_zeros if slots is None else qkv.new_empty)(batch, steps, heads, 1 + groups, dtype=torch.float32)
    cls_out = qkv.new_empty(batch, steps, heads, width, dtype=torch.float32)
    lists = _frame_lists(index, patches, frames, slots)
    tiles = _forward_tiles(qkv, groups, slots)
    blocks = triton.cdiv(1 + groups, tiles["M"])
    columns = cut_columns((qkv,))
    launch(
        triton_forward.forward, batch * steps * heads * blocks, qkv, *lists, out, lse, cls_out,
        *cut_strides(qkv, columns), blocks, heads, steps, groups, rows - 1, 1 + groups, width**-0.5,
        RAGGED=slots is None, **columns, **tiles,
    )  # fmt: skip
    _sum_frames(cls_out, out, frame_weight, frame_counts, mean=True)
    if slots is None:
        _clear_padding(out, index)
    return out, lse, cls_out


def backward(grad, qkv, frame_weight, index, frame_counts, patches, frames, slots, out, lse, cls_out, needs):
    qkv, grad = adjacent(qkv), adjacent(grad)
    batch, rows, _, heads, width = qkv.shape
    steps, groups = _grid(rows, patches, frames, slots)
    grad_qkv = qkv.new_empty(qkv.shape)
    cls_grad = qkv.new_empty(batch, steps, 3, heads, width, dtype=torch.float32)
    lists = _frame_lists(index, patches, frames, slots)
    columns = cut_columns((qkv, grad))
    lse = lse.contiguous()
    weights, weight_strides = _frame_weights(frame_weight, frame_counts, lse)
    strides = (*cut_strides(qkv, columns), *cut_strides(grad, columns), *weight_strides)
    sizes = (heads, steps, groups, rows - 1, 1 + groups, width**-0.5)
    results = (grad_qkv, cls_grad)
    if tiles := _whole_tiles(qkv, groups):
        launch(
            triton_backward.backward_whole, batch * steps * heads, grad, qkv, *lists, lse, *weights, *results,
            *strides, *sizes, RAGGED=slots is None, **columns, **tiles,
        )  # fmt: skip
    else:
        tiles = _backward_tiles(qkv)
        blocks = triton.cdiv(1 + groups, tiles["M"])
        launch(
            triton_backward.backward_blocks, 2 * batch * steps * heads * blocks, grad, qkv, *lists, out.contiguous(),
            lse, cls_out.contiguous(), *weights, *results, *strides, blocks, *sizes,
            RAGGED=slots is None, **columns, **tiles,
        )  # fmt: skip
    _sum_frames(cls_grad, grad_qkv)
    if slots is None:
        _clear_padding(grad_qkv, index)
    return (grad_qkv,)


def _frame_lists(index, patches: int, frames: int, slots: int | None) -> tuple:
    """Return the rows of each frame, their patches and their number; three None for a grid (kernels compute them)."""
    if slots is not None:
        return None, None, None
    lists = RowLists.by_frame(index, patches, frames, name_patches=True)
    return lists.order, lists.patches, lists.counts


def _sum_frames(partial, out, frame_weight=None, frame_counts=None, mean: bool = False) -> None:
    """Sum or average ``partial`` [B, S, ...] over the frames into the first row of ``out`` [B, 1+N, ...]."""
    batch, steps = partial.shape[:2]
    width = partial[0, 0].numel() if batch else 1
    weights, weight_strides = _frame_weights(frame_weight, frame_counts, partial)
    launch(
        triton_forward.sum_frames, batch * triton.cdiv(width, 256), partial, *weights, out, *weight_strides,
        out.stride(0), steps, width, MEAN=mean, C=256, warps=2, stages=1,
    )  # fmt: skip


def _clear_padding(out, index) -> None:
    index = adjacent(index)
    batch, tokens = index.shape
    width = out[0, 0].numel() if batch else 1
    launch(
        triton_forward.clear_padding, batch * triton.cdiv(tokens, 16), index, out, index.stride(0), tokens, width,
        R=16, C=256, stages=1,
    )  # fmt: skip


# Tiles: M tokens of a program, J tokens of the other side at a time, TAIL tokens of a small last block. Chosen so that
# bench/resources.py finds no spills on any target, with H = 16 and E = 64 or 88. Wide heads take few queries at a time,
# because every warp holds all of them.


def _forward_tiles(qkv, groups: int, slots) -> dict:
    if qkv.dtype == torch.float32:
        return dict(M=32, J=32, TAIL=0, warps=8 if qkv.shape[4] > 64 else 4)
    # 77 patches, for example, waste less of three tiles of 32 than of two tiles of 64.
    fits = slots is None or triton.cdiv(groups, 64) * 2 == triton.cdiv(groups, 32)
    return dict(M=64, J=64 if fits else 32, TAIL=16, warps=4)


def _whole_tiles(qkv, groups: int) -> dict | None:
    """Return the options of a backward whose programs take whole frames; None if frames are too long for that."""
    tile = max(32, triton.next_power_of_2(1 + groups))
    split = qkv.shape[4] > 64
    if qkv.dtype == torch.float32 or tile > (64 if split else 128):
        return None
    if tile == 128:
        return dict(M=tile, J=16, warps={80: 8, 90: 16, 100: 8}, warps_per_sm={80: 8, 90: 16, 100: 8})
    return dict(M=tile, J=16, warps=8 if split and tile == 64 else 4)


def _backward_tiles(qkv) -> dict:
    split = qkv.shape[4] > 64
    if qkv.dtype == torch.float32:
        return dict(M=16, J=32, TAIL=0, warps=4) if split else dict(M=32, J=32, TAIL=0, warps=8)
    if split:
        return dict(M=64, J=16, TAIL=0, warps=8, stages=1)  # a second body for tails spills on sm_100
    return dict(M=64, J=32, TAIL=16, warps=8, warps_per_sm={80: 8, 90: 16})


def _grid(rows: int, patches: int, frames: int, slots: int | None) -> tuple[int, int]:
    """Return the number of steps and the largest number of patch tokens of a step."""
    return (frames, patches) if slots is None else (slots, (rows - 1) // slots)


def _frame_weights(frame_weight, frame_counts, stand_in) -> tuple[tuple, tuple[int, int]]:
    """Return the arguments weight, weighted and frame_counts of the kernels, and the strides of weight.

    ``stand_in``, any float32 tensor, takes the place of a weight that is not given; it is not read.
    """
    if frame_weight is None:
        return (stand_in, 0, frame_counts), (0, 0)
    return (frame_weight, 1, frame_counts), frame_weight.stride()
