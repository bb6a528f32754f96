"""Run the layers of the tower, and those of the branch in lockstep with them.

Legend: B videos, T frames, P patches, R registers, N visible tokens, D width, L tower layers, d branch layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from bt_adapter.model.time_steps import TimeSteps, average_frames
from bt_adapter.model.weights import TowerWithBranch
from bt_adapter.progress import nothing
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.tower import Tower
from bt_kernels import VisibleTokens


def tower_states(
    tower: Tower, tokens: Tensor, start: int, stop: int, done: Callable[[], None] = nothing
) -> Iterator[Tensor]:
    """Yield the output of each tower layer from ``start`` to ``stop`` - 1, which overwrites the layer's input.

    Args:
        tower: a Tower, or what stands in for it (``chat.families.called_tower``).
        tokens: input of layer ``start``, ``[..., 1+P+R, D]``. Overwritten, unless gradients are needed.
        done: called after each chunk of images in each layer.
    """
    shape = tokens.shape[:-2]
    for layer in range(start, stop):
        tokens = tower.run_layer(layer, tokens.flatten(0, -3), done).unflatten(0, shape)
        yield tokens


def run_tower(tower: Tower, tokens: Tensor, start: int, stop: int, done: Callable[[], None] = nothing) -> Tensor:
    """Compute the input of tower layer ``stop`` from that of layer ``start``; arguments as in :func:`tower_states`."""
    for state in tower_states(tower, tokens, start, stop, done):
        tokens = state
    return tokens


def run_lockstep(
    model: TowerWithBranch,
    tokens: Tensor,
    visible: VisibleTokens,
    layers: int,
    draws: Iterable[Tensor] | None = None,
    plan: TimeSteps | None = None,
    done: Callable[[], None] = nothing,
    after: Callable[[int, Tensor, Tensor], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the first ``layers`` branch layers, each after the tower layer that it reads.

    Args:
        model: tower and branch.
        tokens: input of tower layer L-d, ``[B, T, 1+P+R, D]``. Overwritten, unless gradients are needed.
        visible: the tokens that the branch processes; its frames are the branch's time steps.
        draws: draws of stochastic depth, see ``BTAdapterVisionModel.forward``.
        plan: conversion of the T frames to the branch's time steps; None: one step per frame.
        done: called after each chunk of images in a tower layer, and after each branch layer.
        after: called after each branch layer with its index, the tower layer's output ``[B, T, 1+P+R, D]``, which the
            next tower layer overwrites, and z.

    Returns:
        The last tower layer's output X without registers, ``[B, T, 1+P, D]``, and z after the last branch layer,
        ``[B, 1+N, D]``, CLS first.
    """
    first = model.first_branch_layer
    outputs = tower_states(model.tower, tokens, first, first + layers, done)

    def inputs() -> Iterator[Tensor]:
        nonlocal tokens
        for tokens in outputs:
            yield _branch_input(model, tokens, visible)
            done()

    def read(layer: int, z: Tensor) -> None:
        if after is not None:
            after(layer, tokens, z)

    z = call_branch(model, inputs(), visible, None if draws is None else iter(draws), read, plan)
    return without_registers(tokens, model.vision_config), z


def call_branch(
    model: TowerWithBranch,
    states: Iterable[Tensor],
    visible: VisibleTokens,
    draws: Iterator[Tensor] | None = None,
    after: Callable[[int, Tensor], object] | None = None,
    plan: TimeSteps | None = None,
) -> Tensor:
    """Call the branch as a module, so that hooks and wrappers run; arguments as in ``Branch.forward``."""
    called = model.branch if model.branch_wrapper is None else model.branch_wrapper[0]
    return called(states, model.tower.position, visible, draws, after, plan)


def without_registers(tokens: Tensor, config: TowerConfig) -> Tensor:
    """Remove the registers, which the branch does not read: ``[..., 1+P+R, D]`` to ``[..., 1+P, D]``."""
    return tokens[..., : 1 + config.patches, :].contiguous() if config.num_register_tokens else tokens


def _branch_input(model: TowerWithBranch, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    """Convert a tower layer's tokens to the branch's input: without registers, averaged to its time steps."""
    averaged = average_frames(without_registers(tokens, model.vision_config), visible.frames)
    if averaged is tokens and not model.config.fused and not tokens.requires_grad:
        return tokens.clone()  # the plain layers keep it for backward, while the tower overwrites its tokens
    return averaged
