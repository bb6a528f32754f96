"""The configurations of the ablation, and one training run of the branch by the product's own step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from miniature.scenes import label_number
from miniature.tower import Clips, Replay
from torch import Tensor, nn

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.mini import training
from bt_adapter.mini.pretrain import FRAMES, PATCHES, TIME_STD, branch_groups
from bt_adapter.mini.scenes import TEMPLATES
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.pretrain.step import Pretraining, backward, draw_depth, draw_visible, mix
from bt_kernels import VisibleTokens

RATIO = 0.7
RATES = {"lr": 2e-3, "temporal": 6e-3, "spatial": 2e-3}


@dataclass(frozen=True)
class System:
    """What differs between two runs of a seed.

    mask: "tube", "random", or "reference": the published code's mask order, with its pairs in token alignment.
    pairs: "matching", or "reference": tubes, but token alignment reads the tower's tokens by the flat mask
    frame-major (arXiv 2309.15785's code).
    """

    mask: str = "tube"
    ratio: float = RATIO
    pairs: str = "matching"
    mbca: float = 0.1
    mbta: float = 0.1
    depth: int = 2
    gates: bool = True


FULL = "base: tubes 0.7, depth 2"
SYSTEMS = {
    FULL: System(),
    "reference's mask order": System(mask="reference"),
    "random mask": System(mask="random"),
    "no mask": System(ratio=0.0),
    "tubes 0.5": System(ratio=0.5),
    "tubes 0.9": System(ratio=0.9),
    "without MBCA": System(mbca=0.0),
    "without MBTA": System(mbta=0.0),
    "without both": System(mbca=0.0, mbta=0.0),
    "MBTA, reference's pairs": System(pairs="reference"),
    "depth 1": System(depth=1),
    "without gates": System(gates=False),
    "depth 3": System(depth=3),
    "tubes 0.3": System(ratio=0.3),
}


def make_model(clip: nn.Module, system: System, seed: int) -> BTAdapterVisionModel:
    """A fresh branch beside the mini CLIP; the same seed starts all systems of a depth with the same weights."""
    torch.manual_seed(seed)
    gates = {} if system.gates else {"merge_gate_slope": None, "output_gate_slope": None}
    config = BTAdapterConfig(
        depth=system.depth, drop_path=0.0, max_frames=64, alignment_head=system.mbta > 0, trained_steps=FRAMES,
        **gates,  # type: ignore[arg-type]
    )  # fmt: skip
    model = BTAdapterVisionModel.from_clip(clip, config)
    nn.init.normal_(model.branch.time, std=TIME_STD, generator=torch.Generator().manual_seed(seed))
    return model


def recipe_of(system: System, batch: int, seed: int, temperature: float) -> Recipe:
    """The product's recipe for a system."""
    return Recipe(
        batch=batch, frames=FRAMES, ratio=system.ratio, mask="random" if system.mask == "random" else "tube",
        mbca=system.mbca, mbta=system.mbta, depth=system.depth, gates=system.gates, seed=seed,
        temperature=temperature, drop_path=0.0,
    )  # fmt: skip


def visible_of(system: System, recipe: Recipe, step: int) -> VisibleTokens:
    """What the branch sees in a step; tubes, the reference's order and its pairs come of the same patches."""
    drawn = draw_visible(recipe, PATCHES, step, 0, 1, torch.device("cpu"))
    if system.mask == "reference":
        return reference_order(drawn)
    return reference_pairs(drawn) if system.pairs == "reference" else drawn


def reference_order(tubes: VisibleTokens) -> VisibleTokens:
    """The pattern of patches of ``tubes`` as the published code applies it: tiled frame-major, read patch-major."""
    frames, patches = tubes.frames, tubes.patches
    pattern = torch.ones(tubes.batch, patches, dtype=torch.bool)
    pattern.scatter_(1, tubes.index[:, ::frames] // frames, False)
    return VisibleTokens.from_reference_mask(pattern.repeat(1, frames), frames)


def reference_pairs(tubes: VisibleTokens) -> VisibleTokens:
    """``tubes`` whose rows token alignment compares with the tower's rows at the same flat places, frame-major."""
    flat = tubes.index
    target = (flat % tubes.patches) * tubes.frames + flat // tubes.patches
    return VisibleTokens(flat, tubes.patches, tubes.frames, tubes.slots, None, target, check=False)


def train(
    model: BTAdapterVisionModel, system: System, pool: Clips, texts: Tensor, scale: float, steps: int, batch: int,
    seed: int,
) -> tuple[float, list[float]]:  # fmt: skip
    """Train the branch on the pool, batch after batch in the seed's order.

    Args:
        pool: its clips lie in batches as they were drawn. texts: float [templates, 768, F]. scale: the CLIP's own 1/τ.

    Returns:
        Seconds, and vtc, mbca, mbta (weighted), means of the last tenth of the steps.
    """
    recipe = recipe_of(system, batch, seed, 1 / scale)
    module = Pretraining(model.train(), recipe)
    replay = Replay(model, pool)
    optimizer = training.adamw(branch_groups(model.branch, *RATES.values()), weight_decay=0.05)
    batches = len(pool.labels) // batch
    which = label_number(pool.labels)
    began, last = time.perf_counter(), []
    for step in range(steps):
        training.set_rate(optimizer, training.cosine(step / steps))
        order = torch.randperm(batches, generator=torch.Generator().manual_seed(mix(seed, step // batches, 1)))
        start = int(order[step % batches]) * batch
        replay.rows = slice(start, start + batch)
        template = torch.randint(len(TEMPLATES), (batch,), generator=torch.Generator().manual_seed(mix(seed, step, 2)))
        captions = texts[template, which[replay.rows]]
        optimizer.zero_grad(set_to_none=True)
        visible = visible_of(system, recipe, step)
        draws = draw_depth(model.config, recipe, visible, step + 1, 0, visible.index.device)
        losses = backward(module, pool.frames[replay.rows], visible, draws, captions, recipe)
        nn.utils.clip_grad_norm_(model.branch.parameters(), recipe.grad_norm)
        optimizer.step()
        if step >= steps - max(1, steps // 10):
            last.append(losses)
    return time.perf_counter() - began, torch.stack(last).mean(0).tolist()
