"""The frozen tower's states of clips, run once and kept: all configurations of a seed train beside the very same ones.

What is kept is what the product's tower computes, in float32, so a step beside it gives what the step with the tower
gives; it only costs less. The cost of whole steps is measured with the tower running.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bt_adapter import BTAdapterVisionModel
from bt_adapter.mini.clip import normalise


@dataclass(frozen=True)
class Clips:
    """frames uint8 [n, T, 3, 48, 48], labels int64 [n, 3], states: {tower layer: its output [n, T, 1+P, D]}.

    frame_mean: the frozen CLIP's embedding, the mean over frames, [n, F].
    """

    frames: Tensor
    labels: Tensor
    states: dict[int, Tensor]
    frame_mean: Tensor


@torch.no_grad()
def run_tower(model: BTAdapterVisionModel, frames: Tensor, labels: Tensor, chunk: int = 32) -> Clips:
    """States of the last layers of ``model``'s tower, as many as its branch has."""
    wanted = range(model.first_branch_layer, model.vision_config.num_hidden_layers)
    states: dict[int, list[Tensor]] = {layer: [] for layer in wanted}
    means = []
    for part in frames.split(chunk):
        tokens = model._embed(normalise(part))
        for layer in wanted:
            tokens = model._run_tower_layer(layer, tokens)
            states[layer].append(tokens.clone())  # the next layer writes over them
        means.append(model.tower.project(model.tower.final_norm(tokens[:, :, 0])).mean(1))
    return Clips(frames, labels, {layer: torch.cat(parts) for layer, parts in states.items()}, torch.cat(means))


class Replay:
    """Lets a model take the states of ``clips`` for the tower's: set ``rows`` to the batch's before each forward."""

    def __init__(self, model: BTAdapterVisionModel, clips: Clips) -> None:
        self.clips, self.rows = clips, slice(0, 0)
        model._embed = self._embed  # type: ignore[assignment, method-assign]
        model._run_tower_layer = self._layer  # type: ignore[method-assign]

    def _embed(self, pixels: Tensor, done: object = None) -> Tensor:
        return pixels  # not read: the first state comes from _layer

    def _layer(self, layer: int, tokens: Tensor, done: object = None) -> Tensor:
        return self.clips.states[layer][self.rows]
