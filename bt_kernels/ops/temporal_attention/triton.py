"""temporal_attention in Triton: many short sequences packed into one tile of rows.

A program takes R neighbouring rows of one head. They are whole sequences, so each softmax is complete in the tile and
the backward needs only q, k, v and the gradient. Rows of sequences that belong to another tile are not read. Short
tiles are processed at once (``triton_tile.py``), long ones some queries at a time (``triton_blocks.py``).

Legend: B videos, N rows of a video, S steps of a sequence (T frames when ragged), H heads, E head width, D = H·E,
R rows of a tile, U rows by which tiles advance, J queries at a time.
"""

import torch
import triton

from bt_kernels._triton import launch
from bt_kernels._triton_heads import cut_columns, cut_strides
from bt_kernels._triton_rows import adjacent
from bt_kernels.ops.temporal_attention import triton_blocks, triton_tile
from bt_kernels.ops.temporal_attention.limits import rows_needed

# The largest tile that is processed at once, by (float32, wider than 64 columns). Chosen so that bench/resources.py
# finds no spills on any target.
_LARGEST_WHOLE = {(False, False): 64, (False, True): 64, (True, False): 32, (True, True): 16}


def forward(qkv, index, frame_counts, patches, frames, slots):
    qkv = adjacent(qkv)
    batch, rows, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, rows, heads, width)
    columns = cut_columns((qkv,))
    steps, advance, tile = _tiles(qkv, frames, slots)
    module, options = _kernels(qkv, tile, backward=False)
    tiles = triton.cdiv(rows, advance)
    launch(
        module.forward, batch * tiles * heads, qkv, out, index, *cut_strides(qkv, columns), *index.stride(), rows,
        steps, advance, tiles, heads, width**-0.5, RAGGED=slots is None, **columns, **options,
    )  # fmt: skip
    return out


def backward(grad, qkv, index, frame_counts, patches, frames, slots, needs):
    qkv, grad = adjacent(qkv), adjacent(grad)
    batch, rows, _, heads, width = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    columns = cut_columns((qkv, grad))
    steps, advance, tile = _tiles(qkv, frames, slots)
    module, options = _kernels(qkv, tile, backward=True)
    tiles = triton.cdiv(rows, advance)
    launch(
        module.backward, batch * tiles * heads, grad, qkv, grad_qkv, index, *cut_strides(qkv, columns),
        *cut_strides(grad, columns), *index.stride(), rows, steps, advance, tiles, heads, width**-0.5,
        RAGGED=slots is None, **columns, **options,
    )  # fmt: skip
    return (grad_qkv,)


def _tiles(qkv, frames: int, slots: int | None) -> tuple[int, int, int]:
    """Return the steps of a sequence, the rows by which tiles advance, and the rows of a tile."""
    steps = frames if slots is None else slots
    smallest = 16 if qkv.dtype == torch.float32 and qkv.shape[4] > 64 else 32
    tile = max(smallest, triton.next_power_of_2(rows_needed(frames, slots)))  # limits.py refuses larger ones
    return steps, tile - (steps - 1) if slots is None else tile // steps * steps, tile


def _kernels(qkv, tile: int, backward: bool) -> tuple:
    """Return the module whose kernels take tiles of this size, and their constants and options."""
    is_float32, is_split = qkv.dtype == torch.float32, qkv.shape[4] > 64
    if tile <= _LARGEST_WHOLE[is_float32, is_split]:
        warps = tile // (8 if is_float32 else 16)
        resident_warps = 8 if is_float32 or is_split or tile > 32 else 16  # 255 or 128 registers a thread
        return triton_tile, dict(R=tile, warps=warps, stages=1, resident=resident_warps // warps)
    options = dict(R=tile, J=16, warps=8, stages=1, resident=1)
    return triton_blocks, options | (dict(TWICE=is_float32 or is_split) if backward else {})
