"""Video tokens for chat models that read several tower layers.

Legend: B videos, T frames, P patches, D width, L tower layers, d branch layers; X_l the output of tower layer l.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.progress import Progress, counter
from bt_adapter.time_steps import Long, TimeSteps, plan_steps
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
    """Video tokens of several tower layers side by side in the channels, ``[B, P+1, D · len(layers)]``, CLS last.

    The published method reads one layer: half the mean of X over time, half the mean of the branch beside it. Here
    the same holds for every layer that has a branch layer beside it (L-d to L-2); layers below, which the branch never
    saw, give the mean of X over time.

    Args:
        model: branch and tower.
        pixel_values: normalised frames ``[B, T, 3, h, w]``.
        layers: after how many tower layers to read, each in [0, L-1].
        branch: False: the mean of X over time everywhere.
        progress, long, draws: as in ``BTAdapterVisionModel.video_tokens``.

    Raises:
        ValueError: a layer lies outside that range.
    """
    stop = model.vision_config.num_hidden_layers - 1
    if not layers or not all(0 <= layer <= stop for layer in layers):
        raise ValueError(f"layers must lie in [0, {stop}], but are {list(layers)}")
    model._check_pixels(pixel_values)
    batch, frames = pixel_values.shape[:2]
    tower, first = model.tower, model.first_branch_layer
    chunks = tower.chunks(batch * frames)
    last = max(layers)
    done = counter(chunks * last + (max(last - first, 0) if branch else 0), progress)

    begin = min(*layers, first)
    x = tower.run(pixel_values.flatten(0, 1), begin, done).unflatten(0, (batch, frames))
    plan = plan_steps(model.config, frames, long) if branch else TimeSteps(frames, 1, 1)
    visible = VisibleTokens.all(batch, model.vision_config.patches, plan.steps, x.device)
    read: dict[int, Tensor] = {}

    def climb(to: int) -> Iterator[int]:
        """Run the tower's layers up to ``to``: after how many of them x is, at each."""
        nonlocal x
        for layer in range(begin, to):
            yield layer
            x = model._run_tower_layer(layer, x, done)
        yield to

    def beside_branch() -> Iterator[Tensor]:
        nonlocal x
        for layer in range(first, last):
            x = model._run_tower_layer(layer, x, done)
            yield model._seen(x, visible)
            done()

    def read_both(number: int, z: Tensor) -> None:
        if (layer := first + 1 + number) in layers and layer != last:
            read[layer] = pool_video_tokens(x.to(z.dtype), z, visible)

    for layer in climb(min(first, last) if branch else last):
        if layer in layers:
            read[layer] = _mean(x)
    if branch and last > first:
        drawn = None if draws is None else iter(draws)
        # a hook on the branch as a whole may change what it returns: the last layer is read from there
        z = model._call_branch(beside_branch(), visible, drawn, after=read_both, plan=plan)
        read[last] = pool_video_tokens(x.to(z.dtype), z, visible)
    return torch.cat([read[layer].to(read[last].dtype) for layer in layers], -1)


def _mean(x: Tensor) -> Tensor:
    """``[B, T, 1+P, D]`` to the mean over time ``[B, P+1, D]``, CLS last."""
    mean = x.mean(1)
    return torch.cat([mean[:, 1:], mean[:, :1]], 1)
