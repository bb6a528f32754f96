"""Compute video tokens for chat models that read several tower layers.

Legend: B videos, T frames, P patches, D width, L tower layers, d branch layers; X_l the output of tower layer l.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.time_steps import Long, TimeSteps, plan_steps
from bt_adapter.model.walk import run_lockstep, tower_states
from bt_adapter.progress import Progress, counter
from bt_kernels import VisibleTokens, pool_video_tokens


def video_tokens_of_layers(
    model: BTAdapterVisionModel,
    pixel_values: Tensor,
    layers: Sequence[int],
    branch: bool = True,
    progress: Progress | None = None,
    long: Long = "average",
    draws: Iterable[Tensor] | None = None,
) -> Tensor:
    """Compute the video tokens of several tower layers, ``[B, P+1, D · len(layers)]``, CLS last.

    The published method reads one layer: the average of the mean of X over time and the mean of the branch. Here this
    is done for every tower layer with a corresponding branch layer (L-d to L-2); lower layers, which the branch does
    not read, give the mean of X over time.

    Args:
        model: branch and tower.
        pixel_values: normalised frames ``[B, T, 3, h, w]``.
        layers: numbers of tower layers after which to read, each in [0, L-1].
        branch: False: the mean of X over time for all layers.
        progress, long, draws: see ``BTAdapterVisionModel.video_tokens``.

    Raises:
        ValueError: a layer is outside that range.
    """
    stop = model.vision_config.num_hidden_layers - 1
    if not layers or not all(0 <= layer <= stop for layer in layers):
        raise ValueError(f"layers must lie in [0, {stop}], but are {list(layers)}")
    model.check_pixels(pixel_values)
    batch, frames = pixel_values.shape[:2]
    tower, first = model.tower, model.first_branch_layer
    chunks = tower.chunks(batch * frames)
    last = max(layers)
    done = counter(chunks * last + (max(last - first, 0) if branch else 0), progress)

    begin = min(*layers, first)
    x = tower.run(pixel_values.flatten(0, 1), begin, done).unflatten(0, (batch, frames))
    plan = plan_steps(model.config, frames, long) if branch else TimeSteps(frames, 1, 1)
    visible = VisibleTokens.all(batch, model.vision_config.patches, plan.steps, x.device)
    read = {begin: _mean(x)} if begin in layers else {}
    states = tower_states(tower, x, begin, min(first, last) if branch else last, done)
    for layer, x in enumerate(states, begin + 1):
        if layer in layers:
            read[layer] = _mean(x)

    def read_both(number: int, x: Tensor, z: Tensor) -> None:
        if (layer := first + 1 + number) in layers and layer != last:
            read[layer] = pool_video_tokens(x, z, visible)

    if branch and last > first:
        # the last layer is read from the branch's return value, which a hook on the branch may change
        x, z = run_lockstep(model, x, visible, last - first, draws, plan, done, read_both)
        read[last] = pool_video_tokens(x, z, visible)
    return torch.cat([read[layer].to(read[last].dtype) for layer in layers], -1)


def _mean(x: Tensor) -> Tensor:
    """Average ``[B, T, 1+P, D]`` over time: ``[B, P+1, D]``, CLS last."""
    mean = x.mean(1)
    return torch.cat([mean[:, 1:], mean[:, :1]], 1)
