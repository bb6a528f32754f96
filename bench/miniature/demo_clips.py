"""Write the clips that ``bt-adapter demo`` asks about, of held-out items: ``python bench/miniature/demo_clips.py``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature.items import load_items  # noqa: E402
from miniature.questions import QUESTIONS  # noqa: E402
from miniature.world import EVENTS, SINGLE, caption, clips, random_labels  # noqa: E402

from bt_adapter.data import write_video  # noqa: E402

OUT = Path(__file__).resolve().parents[2] / "mini" / "bt_adapter_mini" / "clips"
SHOWN = (*SINGLE, 8)  # both of each pair of single events, and a first one of two steps
ENLARGED = 4  # frames of 48 pixels are written with 192, a size that players show and codecs are made for


def write(out: Path, seed: int = 7) -> None:
    """Write one mp4 for each of ``SHOWN``, and ``clips.json``: file, truth and question of each."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(len(SHOWN), SHOWN, generator)
    labels[:, 2] = torch.tensor(SHOWN)
    out.mkdir(parents=True, exist_ok=True)
    about = []
    for number, (label, clip) in enumerate(
        zip(labels.tolist(), clips(load_items("shipped"), labels, generator), strict=True)
    ):
        event = EVENTS[label[2]]
        file = f"{number}-{event.phrase.removeprefix('moving ').replace(' ', '-')}.mp4"
        large = clip.repeat_interleave(ENLARGED, -1).repeat_interleave(ENLARGED, -2)
        write_video(out / file, large, fps=4, options={"crf": "18", "preset": "veryslow"})
        about.append({"file": file, "truth": caption(*label), "question": QUESTIONS[event.kind][0]})
    (out / "clips.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(OUT)
