"""temporal_attention in Triton: many short sequences packed into one tile of rows.

A program takes R neighbouring rows of one head. They are whole sequences, so each softmax is complete in the tile and
the backward needs only q, k, v and the gradient. Rows of sequences that belong to another tile are not read.
``triton_kernels.py`` has the kernels.

Legend: B videos, N rows of a video, S steps of a sequence (T frames when ragged), H heads, E head width, D = H·E,
R rows of a tile, U rows by which tiles advance, J queries at a time.
"""

import torch
import triton

from bt_kernels._triton import launch
from bt_kernels._triton_heads import cut_columns, cut_strides
from bt_kernels._triton_rows import adjacent
from bt_kernels.ops.temporal_attention import triton_kernels
from bt_kernels.ops.temporal_attention.limits import rows_needed

# The largest tile whose queries are processed at once, by (float32, wider than 64 columns). Chosen so that
# bench/resources.py finds no spills on any target.
_LARGEST_WHOLE = {(False, False): 64, (False, True): 64, (True, False): 32, (True, True): 16}


def forward(qkv, index, frame_counts, patches, frames, slots):
    qkv, index = adjacent(qkv), adjacent(index)
    batch, rows, _, heads, width = qkv.shape
    out = qkv.new_empty(batch, rows, heads, width)
    columns = cut_columns((qkv,))
    steps, advance, tile = _tiles(qkv, frames, slots)
    tiles = triton.cdiv(rows, advance)
    launch(
        triton_kernels.forward, batch * tiles * heads, qkv, out, index, *cut_strides(qkv, columns), index.stride(0),
        rows, steps, advance, tiles, heads, width**-0.5, **columns, **_options(qkv, tile, steps, slots),
    )  # fmt: skip
    return out


def backward(grad, qkv, index, frame_counts, patches, frames, slots, needs):
    qkv, grad, index = adjacent(qkv), adjacent(grad), adjacent(index)
    batch, rows, _, heads, width = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    columns = cut_columns((qkv, grad))
    steps, advance, tile = _tiles(qkv, frames, slots)
    tiles = triton.cdiv(rows, advance)
    options = _options(qkv, tile, steps, slots)
    # Where the sums of dV and dK do not fit in registers together.
    twice = options["J"] < tile and (qkv.dtype == torch.float32 or width > 64)
    launch(
        triton_kernels.backward, batch * tiles * heads, grad, qkv, grad_qkv, index, *cut_strides(qkv, columns),
        *cut_strides(grad, columns), index.stride(0), rows, steps, advance, tiles, heads, width**-0.5, TWICE=twice,
        **columns, **options,
    )  # fmt: skip
    return (grad_qkv,)


def _tiles(qkv, frames: int, slots: int | None) -> tuple[int, int, int]:
    """Return the steps of a sequence, the rows by which tiles advance, and the rows of a tile."""
    steps = frames if slots is None else slots
    smallest = 16 if qkv.dtype == torch.float32 and qkv.shape[4] > 64 else 32
    tile = max(smallest, triton.next_power_of_2(rows_needed(frames, slots)))  # limits.py refuses larger ones
    return steps, tile - (steps - 1) if slots is None else tile // steps * steps, tile


def _options(qkv, tile: int, steps: int, slots: int | None) -> dict:
    """Return the constants and options of the kernels for tiles of this size."""
    is_float32, is_split = qkv.dtype == torch.float32, qkv.shape[4] > 64
    ragged = slots is None
    forms = dict(R=tile, RAGGED=ragged, SEVERAL=ragged or 2 * steps <= tile)
    if tile > _LARGEST_WHOLE[is_float32, is_split]:
        return dict(J=16, warps=8, stages=1, **forms)
    if is_float32 or is_split or tile > 32:
        warps_per_sm = 8
    else:
        warps_per_sm = 12 if ragged else 16
    return dict(J=tile, warps=tile // (8 if is_float32 else 16), stages=1, warps_per_sm=warps_per_sm, **forms)
