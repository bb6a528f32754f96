"""Losses and gradients of one batch, computed at once or in parts; contrastive losses compare the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bt_adapter.data.devices import to_device
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.drop_path import draw_kept
from bt_adapter.model.dtypes import autocast
from bt_adapter.model.losses import contrastive_losses
from bt_adapter.pretrain.recipe import Recipe
from bt_kernels import VisibleTokens


class Pretraining(nn.Module):
    """Computes the embeddings that the losses compare. It holds all trainable parameters: DDP and FSDP2 wrap it."""

    def __init__(self, model: BTAdapterVisionModel, recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(
        self, frames: Tensor, visible: VisibleTokens, draws: Sequence[Tensor] | None = None, align: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed frames, uint8 ``[B, T, 3, S, S]``.

        Args:
            draws: of stochastic depth, as for the model's forward. align: False: MBTA is not computed and is 0.

        Returns:
            Embeddings of the videos and of the branch, ``[B, F]`` each, and MBTA times its weight, a scalar.
        """
        pixels = self.model.images.normalise(frames.flatten(0, 1), self.model.tower.dtype)
        layer = self.recipe.align_layer
        output = self.model(pixels.unflatten(0, frames.shape[:2]), visible, draws, align_layer=layer)
        loss = output.video_embeds.new_zeros((), dtype=torch.float32)
        if align and self.recipe.mbta > 0:
            loss = self.recipe.mbta * self.model.token_alignment(output)
        return output.video_embeds, self.model.branch_embeds(output), loss


def draw_visible(recipe: Recipe, patches: int, step: int, rank: int, world: int, device: torch.device) -> VisibleTokens:
    """Visible tokens of this process's clips in a step (from 1): a part of those drawn for the whole batch."""
    generator = torch.Generator().manual_seed(mix(recipe.seed, step))
    draw = VisibleTokens.tube if recipe.mask == "tube" else VisibleTokens.random
    whole = draw(recipe.batch_size, patches, recipe.frames_of(step - 1), recipe.mask_ratio, generator)
    return part_of(whole, rank, world, device)


def draw_depth(
    config: BTAdapterConfig, recipe: Recipe, visible: VisibleTokens, step: int, rank: int, device: torch.device
) -> list[Tensor]:
    """Draw which residuals of this process's clips stochastic depth keeps in a step (from 1).

    The draws of a clip depend on the seed, the step and its place in the whole batch, not on the number of processes
    or parts. ``visible``: visible tokens of this process's clips.
    """
    first = rank * visible.batch
    seeds = [mix(recipe.seed, step, first + clip) for clip in range(visible.batch)]
    return draw_kept(config, visible.sequences, visible.steps, seeds, device)


def part_of(visible: VisibleTokens, number: int, parts: int, device: torch.device | None = None) -> VisibleTokens:
    """Return part ``number`` of ``parts`` equal parts of the batch."""
    size = visible.batch // parts
    index = visible.index[number * size : (number + 1) * size]
    index = to_device(index, device or index.device)
    return VisibleTokens(index, visible.patches, visible.frames, visible.slots, check=False)


def mix(*numbers: int) -> int:
    """Hash several numbers to one seed; neighbouring numbers give unrelated seeds."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        seed ^= seed >> 29
    return seed


def backward(
    module: nn.Module,
    frames: Tensor,
    visible: VisibleTokens,
    draws: Sequence[Tensor],
    text: Tensor,
    recipe: Recipe,
    group: dist.ProcessGroup | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Compute the gradients of one batch and add them to those of the parameters.

    Args:
        module: a :class:`Pretraining`, wrapped or not.
        frames: this process's clips, uint8 ``[B, T, 3, S, S]``. visible: their tokens that the branch sees.
        draws: their residuals that stochastic depth keeps, see :func:`draw_depth`.
        text: embeddings of their captions, ``[B, F]``.
        recipe: temperature (a number), weights, dtype and ``accumulate``. With parts, the clips run through tower and
            branch twice: first without gradients, for the embeddings of all clips and the gradients of the losses with
            respect to them, then part by part to backpropagate those. Activations of one part are kept at a time
            (GradCache, arXiv 2101.06983).
        group: the processes whose batches form the global batch.
        scale: factor of the loss, from the gradient scaler of float16.

    Returns:
        vtc, mbca and mbta times their weights, float32 ``[3]``; the mean over processes is that of the global batch.
    """
    if recipe.accumulate == 1:
        with autocast(recipe.dtype, frames.device):
            video, branch, mbta = module(frames, visible, draws)
        vtc, mbca = _contrast(video, branch, text, recipe, group)
        ((vtc + mbca + mbta) * scale).backward()
        return torch.stack([vtc, mbca, mbta]).detach().float()
    count = recipe.accumulate
    drawn = [kept.chunk(count) for kept in draws]
    parts = [
        (piece, part_of(visible, number, count), [kept[number] for kept in drawn])
        for number, piece in enumerate(frames.chunk(count))
    ]
    seen = []
    for piece, shown, kept in parts:
        with torch.no_grad(), autocast(recipe.dtype, frames.device):
            seen.append(module(piece, shown, kept, align=False)[:2])
    video, branch = (torch.cat(pieces).requires_grad_() for pieces in zip(*seen, strict=True))
    vtc, mbca = _contrast(video, branch, text, recipe, group)
    ((vtc + mbca) * scale).backward()
    assert video.grad is not None and branch.grad is not None
    grads = zip(video.grad.chunk(recipe.accumulate), branch.grad.chunk(recipe.accumulate), strict=True)
    mbta = torch.zeros_like(vtc)
    for number, ((piece, shown, kept), (of_video, of_branch)) in enumerate(zip(parts, grads, strict=True)):
        with _unsynchronised(module, number + 1 < len(parts)):
            with autocast(recipe.dtype, frames.device):
                video, branch, aligned = module(piece, shown, kept)
            aligned = aligned / len(parts)
            carried = (video.float() * of_video.float()).sum() + (branch.float() * of_branch.float()).sum()
            (carried + aligned * scale).backward()
        mbta += aligned.detach()
    return torch.stack([vtc, mbca, mbta]).detach().float()


def _contrast(
    video: Tensor, branch: Tensor, text: Tensor, recipe: Recipe, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    assert not isinstance(recipe.temperature, str), "the run replaces the word by the CLIP's number"
    text = text.to(video.dtype)
    vtc, mbca = contrastive_losses((video, branch), text, recipe.temperature, group)
    return vtc, recipe.mbca * mbca


def _unsynchronised(module: Any, wait: bool) -> AbstractContextManager:
    """Context without an exchange of gradients between processes if ``wait``."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync() if wait else nullcontext()
    if hasattr(module, "set_requires_gradient_sync"):
        module.set_requires_gradient_sync(not wait)
    return nullcontext()
