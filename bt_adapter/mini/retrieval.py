"""Zero-shot retrieval of motion captions: the frozen CLIP's frame mean against CLIP with the branch.

One clip for each of the 432 captions (8 items, 6 colours, 9 motions), made from the shipped held-out items with a fixed
seed. ``python -m bt_adapter.mini.retrieval`` prints the figures and with --out writes them (well under a minute on two
cores). A rank is 1 + the strictly greater scores, and the mean place among equal ones; p is the exact two-sided
McNemar test on the paired R@1 hits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import CLIPModel, PreTrainedTokenizerFast

from bt_adapter.ranking import ranks, tie_corrected

from .clip import load_clip, normalise, text_embeds
from .items import ITEMS, Items, load_items
from .scenes import COLOURS, MOTIONS, caption, clips

SEED = 20_000
DIRECTIONS = tuple(MOTIONS.index(name) for name in ("left", "right", "up", "down"))


def every_label() -> torch.Tensor:
    """The 432 labels with a motion, int64 [432, 3], motion fastest."""
    return torch.cartesian_prod(*(torch.arange(len(values)) for values in (ITEMS, COLOURS, MOTIONS)))


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> float:
    """Exact two-sided p that two paired bool [n] outcomes are hit equally often."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n = only_first + only_second
    tail = sum(math.comb(n, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n) if n else 1.0


def score(videos: torch.Tensor, texts: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Figures of clips [432, F] against captions [432, F], both in the order of every_label(); and the paired hits.

    Motion is chosen among the 9 captions of the clip's own item and colour, direction among the 4 of them.
    """
    labels = every_label()
    similarity = F.normalize(videos, dim=-1) @ F.normalize(texts, dim=-1).T
    figures: dict[str, Any] = {"n": len(labels)}
    hits = {}
    for name, matrix in (("text_to_video", similarity.T), ("video_to_text", similarity)):
        place = tie_corrected(*ranks(matrix, torch.eye(len(matrix), dtype=torch.bool)))
        hits[name] = place <= 1
        figures[name] = {f"R@{k}": round((place <= k).float().mean().item(), 4) for k in (1, 5, 10)}
        figures[name]["mean_rank"] = round(place.mean().item(), 2)
    motions = len(MOTIONS)
    own = similarity.view(-1, len(labels) // motions, motions)[
        torch.arange(len(labels)), torch.arange(len(labels)) // motions
    ]
    right = own.argmax(-1) == labels[:, 2]
    hits["motion"] = right
    figures["motion"] = round(right.float().mean().item(), 4)
    figures["by_motion"] = {
        name: round(right[labels[:, 2] == number].float().mean().item(), 4) for number, name in enumerate(MOTIONS)
    }
    moving = torch.isin(labels[:, 2], torch.tensor(DIRECTIONS))
    chosen = own[moving][:, list(DIRECTIONS)].argmax(-1)
    figures["direction"] = round((torch.tensor(DIRECTIONS)[chosen] == labels[moving, 2]).float().mean().item(), 4)
    found = labels[similarity.argmax(-1)]
    for column, name in enumerate(("item", "colour")):
        figures[name] = round((found[:, column] == labels[:, column]).float().mean().item(), 4)
    return figures, hits


@torch.no_grad()
def embed(model: Any, frames: torch.Tensor, batch: int = 36) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips uint8 [n, T, 3, h, w] -> (frozen CLIP's frame mean [n, F], CLIP and branch [n, F])."""
    model.eval()
    plain, branch = [], []
    for part in frames.split(batch):
        pixels = normalise(part)
        plain.append(model.image_embeds(pixels.flatten(0, 1)).view(*part.shape[:2], -1).mean(1))
        branch.append(model(pixels).video_embeds)
    return torch.cat(plain), torch.cat(branch)


@torch.no_grad()
def evaluate(
    clip: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    model: Any,
    items: Items | None = None,
    seed: int = SEED,
    frames: int = 8,
) -> dict[str, Any]:
    """Figures of the frame mean and of the branch on one clip a caption, and p of their R@1 and motion hits.

    model: the BTAdapterVisionModel on the same CLIP. items: default the shipped held-out ones.
    Returns {"frame_mean": figures, "branch": figures, "p": {...}, "items", "seed", "frames"}.
    """
    items = load_items("shipped") if items is None else items
    labels = every_label()
    videos, _ = clips(items, len(labels), frames, torch.Generator().manual_seed(seed), labels)
    texts = text_embeds(clip.eval(), tokenizer, [caption(row) for row in labels.tolist()])
    plain, branch = embed(model, videos)
    plain_figures, plain_hits = score(plain, texts)
    branch_figures, branch_hits = score(branch, texts)
    return {
        "frame_mean": plain_figures,
        "branch": branch_figures,
        "p": {name: mcnemar(plain_hits[name], branch_hits[name]) for name in plain_hits},
        "items": len(items.images),
        "seed": seed,
        "frames": frames,
    }


def main() -> None:
    from .pretrain import load_branch_model

    parser = argparse.ArgumentParser(description="Retrieval of motion captions on held-out clips.")
    parser.add_argument("--branch", default=None, help="folder of a branch (default: the shipped one)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=None, help="JSON file to write")
    options = parser.parse_args()
    clip, tokenizer = load_clip()
    model = load_branch_model(options.branch or "pretrained")
    text = json.dumps(evaluate(clip, tokenizer, model, seed=options.seed), indent=2)
    print(text)
    if options.out:
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, options.out)


if __name__ == "__main__":
    main()
