"""Draws of stochastic depth that belong to a video, whichever process or part of a batch it runs in.

Legend: B videos, K temporal sequences of a video (patches), S time steps; kept: 1, dropped: 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bt_adapter.config import BTAdapterConfig


def draw_kept(config: BTAdapterConfig, sequences: int, steps: int, seeds: Sequence[int]) -> list[Tensor]:
    """Draw which residuals of each video are kept, each video from a seed of its own.

    So a video drops the same residuals alone, in a batch, in a part of one, or on another process. For ``draws`` of
    ``BTAdapterVisionModel.forward`` and ``video_tokens``.

    Args:
        config: of the branch; its ``drop_path``, ``depth`` and ``drop_block``.
        sequences: K. steps: S.
        seeds: one for each video.

    Returns:
        Bool tensors on the CPU, in the order of their use: of each layer whose rate is above 0 ``[B, K]``, ``[B, S]``
        and, with ``drop_block``, ``[B, 1]``.
    """
    rates = [rate for layer in range(config.depth) if (rate := config.drop_rate(layer)) > 0]
    counts = [sequences, steps, 1] if config.drop_block else [sequences, steps]
    if not rates:
        return []
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(len(rates), sum(counts), generator=generator))
    drawn = torch.stack(rows)  # [B, layers, K + S (+ 1)]
    kept = drawn >= torch.tensor(rates)[:, None]
    return [piece for layer in range(len(rates)) for piece in kept[:, layer].split(counts, 1)]
