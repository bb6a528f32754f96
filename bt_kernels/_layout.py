"""Conversion between rows of visible tokens and a grid of sequences, for the reference kernels.

Legend: B videos, N visible rows, G temporal sequences of a video, S steps of each (G·S = N on a regular grid;
G = P and S = T when ragged), "..." any trailing dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_grid(rows: Tensor, index: Tensor, patches: int, frames: int, slots: int | None) -> Tensor:
    """Reshape ``[B, N, ...]`` to ``[B, G, S, ...]``; places without a visible token hold zeros."""
    batch, tokens = index.shape
    if slots is not None:
        return rows.unflatten(1, (tokens // slots, slots))
    total = patches * frames
    grid = rows.new_zeros(batch, total + 1, *rows.shape[2:])  # the last place takes the padding rows
    place = torch.where(index < 0, total, index)
    grid[_videos(index), place] = rows
    return grid[:, :total].unflatten(1, (patches, frames))


def from_grid(grid: Tensor, index: Tensor, slots: int | None) -> Tensor:
    """Reshape ``[B, G, S, ...]`` to ``[B, N, ...]``; padding rows become zeros."""
    flat = grid.flatten(1, 2)
    if slots is not None:
        return flat
    return zero_padding(flat[_videos(index), index.clamp(min=0)], index)


def visible_grid(index: Tensor, patches: int, frames: int, slots: int | None) -> Tensor | None:
    """Return bool ``[B, G, S]``, True where a token is visible; None on a regular grid, where all are."""
    if slots is not None:
        return None
    ones = torch.ones(index.shape, dtype=torch.bool, device=index.device)
    return to_grid(ones, index, patches, frames, None)


def zero_padding(rows: Tensor, index: Tensor) -> Tensor:
    """Return ``[B, N, ...]`` with the rows whose index is -1 set to zero."""
    return rows.masked_fill((index < 0).view(*index.shape, *[1] * (rows.ndim - 2)), 0)


def frame_weights(frame_counts: Tensor | None, batch: int, frames: int, like: Tensor) -> Tensor:
    """Return weights ``[B, T]`` of a mean over each video's real frames, in float32 or wider, on ``like``'s device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if frame_counts is None:
        return torch.full((batch, frames), 1 / frames, dtype=dtype, device=like.device)
    real = torch.arange(frames, device=like.device) < frame_counts[:, None]
    return real.to(dtype) / frame_counts.clamp(1, frames)[:, None]


def mean_over_frames(values: Tensor, frame_counts: Tensor | None) -> Tensor:
    """Average ``[B, T, ...]`` over each video's real frames, in float32 or wider; padding frames are not read."""
    batch, frames = values.shape[:2]
    weights = frame_weights(frame_counts, batch, frames, values)
    values = values.to(weights.dtype)
    if frame_counts is not None:  # 0 · NaN and 0 · inf are NaN
        values = values.masked_fill((weights == 0).view(batch, frames, *[1] * (values.ndim - 2)), 0)
    return torch.einsum("bt,bt...->b...", weights, values)


def patch_rows(backbone: Tensor, index: Tensor) -> Tensor:
    """Select the visible tokens of ``[B, T, 1+P, D]``: ``[B, N, D]``, zeros where the index is -1."""
    return zero_padding(backbone[patch_places(index, backbone.shape[1])], index)


def patch_places(index: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the position of each row in ``[B, T, 1+P, D]`` for advanced indexing; padding rows point at token 0."""
    place = index.clamp(min=0)
    return _videos(index), place % frames, 1 + place // frames


def _videos(index: Tensor) -> Tensor:
    return torch.arange(index.shape[0], device=index.device)[:, None]
