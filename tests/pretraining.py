"""A small pretraining run for the tests: moving clips as mp4 files, a manifest, the mini CLIP."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bt_adapter.data import write_video
from bt_adapter.pretrain.recipe import Recipe

SMALL = {"clip": "mini", 
    "frames": 4, "batch_size": 4, "depth": 2, "workers": 0, "mask_ratio": 0.5, "lr": 1e-4, "warmup": 0.1,
    "max_frames": 8, "dtype": "float32",
}  # fmt: skip


def write_clips(folder: Path, count: int = 12, broken: tuple[int, ...] = ()) -> Path:
    """``count`` clips of the small world, those in ``broken`` without a video in them; returns the manifest."""
    from miniature.items import load_items
    from miniature.world import SINGLE, caption, clips, random_labels

    labels = random_labels(count, SINGLE, torch.Generator().manual_seed(1))
    videos = clips(load_items("shipped"), labels, torch.Generator().manual_seed(2), 6)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (video, label) in enumerate(zip(videos, labels.tolist(), strict=True)):
        path = folder / f"clip{number:03d}.mp4"
        if number in broken:
            path.write_bytes(b"no video " * 20)
        else:
            write_video(path, video)
        lines.append(json.dumps({"video": path.name, "caption": caption(*label)}) + "\n")
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(lines))
    return manifest


def recipe(**changes) -> Recipe:
    """A recipe of seconds."""
    return Recipe(**{**SMALL, **changes})


def losses(out: Path) -> list[tuple[int, float, float, float]]:
    """Step and losses of every line of a run's log."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["vtc"], row["mbca"], row["mbta"]) for row in rows]
