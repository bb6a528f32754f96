"""Linear probes: what of a clip can be read at each place on the way to the answer.

``python bench/miniature/probes.py WORK --seed S`` writes WORK/seedS/probes/probes.json. A probe is a ridge regression
on one-hot classes of standardised features, the mean over a place's tokens, in closed form. Its strength is chosen on a
held-back quarter of what it is fitted on. Fitted on clips, it tells what is there; fitted on stills in which an event
shows and read in clips, what is there in the form that the image chat model has learned to read. Items are held out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature import world  # noqa: E402
from miniature.items import ITEMS, Items, load_items  # noqa: E402
from miniature.world import EVENTS, KINDS, of_kind  # noqa: E402

from bt_adapter import BTAdapterVisionModel  # noqa: E402
from bt_adapter.chat.attach import attached_branch  # noqa: E402
from bt_adapter.chat.engine import VideoChat  # noqa: E402
from bt_adapter.chat.tuned import projector_of  # noqa: E402
from bt_adapter.eval.report import versions  # noqa: E402
from bt_adapter.files import write_json  # noqa: E402

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
PART = 48  # clips that run through the model at once


@torch.no_grad()
def features(model: BTAdapterVisionModel, projector: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Compute {place: float [n, width]}, means over patch tokens, of clips uint8 [n, T, 3, h, w] or stills without T.

    A still has the same at all places before the projector: the tower's tokens of the last layer but one.
    """
    found: dict[str, list[Tensor]] = {}
    for part in images.split(PART):
        moving = part if part.ndim == 5 else part[:, None]
        pixels = model.images.normalise(moving.flatten(0, 1)).unflatten(0, moving.shape[:2])
        frames = model.frame_mean_tokens(pixels.flatten(0, 1)[:, None])[:, :-1].unflatten(0, pixels.shape[:2])
        mean = frames.mean(1)
        video = model.video_tokens(pixels)[:, :-1] if part.ndim == 5 else mean
        places = {
            "frame mean": mean, "branch's half": 2 * video - mean, "video tokens": video,
            "frame mean after the projector": projector(mean), "video tokens after the projector": projector(video),
        }  # fmt: skip
        if part.ndim == 5:  # a second-order statistic of the tower's own tokens
            changes = frames - frames.mean(1, keepdim=True)
            places["products of neighbouring frames"] = (changes[:, 1:] * changes[:, :-1]).sum(1)
        for place, tokens in places.items():
            found.setdefault(place, []).append(tokens.mean(1))
    return {place: torch.cat(parts) for place, parts in found.items()}


def ridge(x: Tensor, y: Tensor, strength: float | Tensor) -> Tensor:
    """Weights [width, targets] of least squares with ``strength`` n |w|²; x [n, width], y [n, targets]."""
    return torch.linalg.solve(x.T @ x + strength * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)


def probe(x: Tensor, classes: Tensor, count: int, test: Tensor) -> Tensor:
    """Fit a probe to features [n, width] and classes [n]: the scores [m, count] of other features [m, width]."""
    mean, std = x.double().mean(0), x.double().std(0).clamp(min=1e-6)
    x, test = ((one.double() - mean) / std for one in (x, test))
    y = F.one_hot(classes, count).double() - 1 / count
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, held = order[: len(x) * 3 // 4], order[len(x) * 3 // 4 :]
    right = [(x[held] @ ridge(x[fit], y[fit], s)).argmax(1).eq(classes[held]).sum().item() for s in STRENGTHS]
    return test @ ridge(x, y, STRENGTHS[max(range(len(right)), key=right.__getitem__)])


def read(kind: str, x: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> dict[str, float]:
    """Share right of a probe for a kind of event or "item", and for events the better of the pair: "pair".

    x [n, width] with labels [n, 3] are what it is fitted on, the test's what it is read in.
    """
    column, values = (0, range(len(ITEMS))) if kind == "item" else (2, of_kind(kind))
    rows, held = (torch.isin(one[:, column], torch.tensor(values)) for one in (labels, test_labels))
    classes, right = labels[rows, column] - values[0], test_labels[held, column] - values[0]
    scores = probe(x[rows], classes, len(values), test[held])
    found = {"right": scores.argmax(1).eq(right).double().mean().item()}
    if kind != "item":  # counterparts are neighbours
        own, other = (scores.gather(1, one[:, None]) for one in (right, right ^ 1))
        found["pair"] = (own > other).double().mean().item()
    return {name: round(value, 4) for name, value in found.items()}


def measure(
    model: BTAdapterVisionModel, projector: nn.Module, items: Items, held_out: Items, count: int
) -> dict[str, Any]:
    """{"clips" or "stills", what probes were fitted on: {place: {kind: its shares}}}, each read in held-out clips.

    "held-out stills" are probes of stills read in stills: the most that those of "stills" can reach.
    """
    generator = torch.Generator().manual_seed(5)

    def look(items: Items, events: Sequence[int], draw: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels, of each event equally often, and features."""
        rows = world.random_labels(count // 2 * (1 if items is held_out else 3), (-1,), generator)
        rows[:, 2] = torch.tensor(events[::2]).repeat(len(rows))[: len(rows)]
        labels = world.with_counterparts(rows)
        return labels, features(model, projector, draw(items, labels, generator))

    every, motion = range(len(EVENTS)), of_kind("motion")
    seen_clips, seen_stills = look(items, every, world.paired_clips), look(items, motion, world.exposures)
    held_clips, held_stills = look(held_out, every, world.paired_clips), look(held_out, motion, world.exposures)
    pairs = {
        "clips": (seen_clips, held_clips, (*KINDS, "item")),
        "stills": (seen_stills, held_clips, ("motion", "item")),
        "held-out stills": (seen_stills, held_stills, ("motion", "item")),
    }
    return {
        name: {
            place: {kind: read(kind, x, labels, held[place], held_labels) for kind in kinds}
            for place, x in seen.items()
        }
        for name, ((labels, seen), (held_labels, held), kinds) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=720, help="held-out clips, and held-out stills")
    options = parser.parse_args()
    own = options.work / f"seed{options.seed}"
    chat = VideoChat.load(own / "image" / "tuned", own / "branch" / "branch")
    model, projector = attached_branch(chat.model), projector_of(chat.model)
    found = measure(model, projector, load_items("train"), load_items("shipped"), options.count)
    out = own / "probes" / "probes.json"
    write_json(out, {"seed": options.seed, "count": options.count, **found, "made": versions()})
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
