"""What masking saves: seconds and bytes kept for backward of whole steps, the tower running, against the ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from measure import facts, kept_bytes, rounds_of
from miniature.scenes import FRAMES
from miniature.systems import System, make_model, recipe_of
from torch import Tensor

from bt_adapter.mini.clip import load_clip
from bt_adapter.mini.pretrain import PATCHES
from bt_adapter.pretrain.step import Pretraining, backward, draw_depth, draw_visible

RATIOS = (0.0, 0.3, 0.5, 0.7, 0.9)
BATCH = 16
SECONDS = 8.0


def step_of(system: System) -> tuple[Callable[[], Tensor], Pretraining]:
    """A whole step, forward, losses and backward, of a system on fixed clips."""
    clip, _ = load_clip()
    recipe = recipe_of(system, BATCH, 0, 1 / clip.logit_scale.exp().item())
    module = Pretraining(make_model(clip, system, 0).train(), recipe)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(256, (BATCH, FRAMES, 3, 48, 48), generator=generator, dtype=torch.uint8)
    words = torch.randn(BATCH, clip.config.projection_dim, generator=generator)
    visible = draw_visible(recipe, PATCHES, 0, 0, 1, torch.device("cpu"))
    draws = draw_depth(module.model.config, recipe, visible, 0, 0, torch.device("cpu"))

    def step() -> Tensor:
        module.zero_grad(set_to_none=True)
        return backward(module, frames, visible, draws, words, recipe)

    return step, module


def saved_bytes(step: Callable[[], Tensor], module: torch.nn.Module) -> int:
    """Unique storages kept for backward, without parameters and buffers."""
    return kept_bytes(step, {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())})


def cost_rows(row: type, command: str) -> list[Any]:
    """A row for each ratio; the ratios take turns, so that a busy machine slows all alike."""
    steps = {ratio: step_of(System(ratio=ratio)) for ratio in RATIOS}
    of_process: dict[float, list[float]] = {ratio: [] for ratio in RATIOS}

    def timed(ratio: float) -> None:
        began = time.process_time()
        steps[ratio][0]()
        of_process[ratio].append(time.process_time() - began)

    stats = rounds_of({str(ratio): partial(timed, ratio) for ratio in RATIOS}, "cpu", SECONDS)
    rows = []
    for ratio, (step, module) in steps.items():
        told = stats[str(ratio)]
        rows.append(
            row(
                "cost", f"tubes {ratio}", asdict(System(ratio=ratio)), 0, told.rounds, BATCH, round(told.median, 4),
                round(statistics.median(of_process[ratio]), 4), [], {}, {}, {}, saved_bytes(step, module), command,
                facts("cpu"),
            )
        )  # fmt: skip
        print(f"tubes {ratio}: {rows[-1].cpu_seconds:.3f} s a step, {rows[-1].saved_bytes / 1e6:.1f} MB kept")
    return rows
