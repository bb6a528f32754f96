"""Draw stochastic depth per video, independently of its process and its position in a batch.

Legend: B videos, K temporal sequences of a video (patches), S time steps; kept: 1, dropped: 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bt_adapter.data.devices import to_device
from bt_adapter.model.config import BTAdapterConfig


def draw_kept(
    config: BTAdapterConfig, sequences: int, steps: int, seeds: Sequence[int], device: torch.device | None = None
) -> list[Tensor]:
    """Draw which residuals of each video are kept, from a separate seed for each video.

    A video thus drops the same residuals alone, in any batch, and on any process. The result is the argument ``draws``
    of ``BTAdapterVisionModel.forward`` and ``video_tokens``.

    Args:
        config: configuration of the branch: ``drop_path``, ``depth`` and ``drop_block`` are used.
        sequences: K. steps: S.
        seeds: one per video.
        device: where the results are; None: on the CPU.

    Returns:
        Bool tensors, in the order of their use: for each layer with a rate above 0 ``[B, K]``, ``[B, S]``
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
    kept = to_device(drawn >= torch.tensor(rates)[:, None], device or drawn.device)
    return [piece for layer in range(len(rates)) for piece in kept[:, layer].split(counts, 1)]
