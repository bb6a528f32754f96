"""Videos of more frames than a branch was trained with: answers and retrieval of the mini stack, trained at 8 frames.

``python bench/long_videos.py`` writes bench/results/long-videos-cpu.json. The same held-out clips are composed with 8,
16, 32, 64 and 128 frames each, so that every row is paired with the answers at 8 frames (exact two-sided sign test).
Each way of taking long videos (``bt_adapter.time_steps``) is measured on two branches: the one shipped, whose time
table started at a standard deviation of 0.7, and the same with its untrained rows drawn anew at 0.02, where the time
table of a fresh branch starts.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import facts, results_file
from torch import Tensor

from bt_adapter import BTAdapterVisionModel
from bt_adapter.chat.attach import attached_branch, video_tokens
from bt_adapter.chat.streaming import video_tokens_streamed
from bt_adapter.mini import questions
from bt_adapter.mini.answers import load_system, score
from bt_adapter.mini.clip import load_clip, normalise, text_embeds
from bt_adapter.mini.items import load_items
from bt_adapter.mini.pretrain import load_branch_model
from bt_adapter.mini.retrieval import every_label, mcnemar
from bt_adapter.mini.scenes import MOTIONS, caption, clips, random_labels
from bt_adapter.time_steps import Long

FRAMES = (8, 16, 32, 64, 128)
FRESH_STD = 0.02
_BATCH = 12


@dataclass(frozen=True)
class Row:
    """How many of n clips are right, and p of the sign test against the same clips at 8 frames.

    task: "answers" (how does it move, greedily generated) or "retrieval" (its caption first among 432). rows_std: at
    which the untrained rows of the time table start. windows: sets of tokens a video is cut into (answers alone).
    """

    task: str
    rows_std: float
    long: str
    frames: int
    windows: int
    right: int
    n: int
    only_at_8: int
    only_here: int
    p: float


def held_out(frames: int, each: int, seed: int = 77) -> tuple[Tensor, Tensor]:
    """Clips uint8 ``[9·each, frames, 3, 48, 48]`` and labels; the same clips whatever ``frames`` is."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(each * len(MOTIONS), True, generator)
    labels[:, 2] = torch.arange(len(MOTIONS)).repeat_interleave(each)
    return clips(load_items("shipped"), len(labels), frames, generator, labels)


@torch.no_grad()
def answered(chat, prompts, frames: Tensor, labels: Tensor, long: Long = "average", windows: int = 1) -> Tensor:
    """Which clips' motion is told rightly, bool ``[n]``."""
    right = []
    question = ("motion", questions.QUESTIONS["motion"][0])
    for some, truth in zip(frames.split(_BATCH), labels.split(_BATCH), strict=True):
        if windows == 1:
            tokens = video_tokens(chat, normalise(some), long=long)
        else:
            model = attached_branch(chat)
            each = [video_tokens_streamed(model, [normalise(c)], len(c), windows, long=long) for c in some]
            tokens = torch.stack(each).flatten(1, 2)
        said = score(chat, prompts, chat.model.multi_modal_projector(tokens), [question])[0].generated
        told = [questions.parse("motion", text) for text in said]
        right.append(torch.tensor([-1 if motion is None else motion for motion in told]) == truth[:, 2])
    return torch.cat(right)


@torch.no_grad()
def retrieved(
    model: BTAdapterVisionModel, texts: Tensor, frames: Tensor, labels: Tensor, long: Long = "average"
) -> Tensor:
    """Which clips find their own caption first among all 432 ``texts``, bool ``[n]``."""
    vectors = torch.cat([model(normalise(some), long=long).video_embeds for some in frames.split(_BATCH)])
    found = every_label()[(F.normalize(vectors, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(-1)]
    return (found == labels).all(-1)


def captions() -> Tensor:
    """Embeddings of the 432 captions, ``[432, F]``."""
    clip, tokenizer = load_clip()
    return text_embeds(clip.eval(), tokenizer, [caption(row) for row in every_label().tolist()])


def redraw(model: BTAdapterVisionModel, std: float) -> None:
    """Draw the untrained rows of a time table anew."""
    rows = model.branch.time.data[model.trained_steps or 0 :]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asked", type=int, default=4, help="clips of each of nine motions that are asked about")
    parser.add_argument("--found", type=int, default=4, help="clips of each of nine motions that are to be found")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    about, began = facts("cpu"), time.perf_counter()
    chat, prompts, _ = load_system("tuned")
    model, texts = load_branch_model("pretrained"), captions()
    rows: list[Row] = []
    for std in (0.7, FRESH_STD):
        if std == FRESH_STD:
            redraw(attached_branch(chat), std)
            redraw(model, std)
        base: dict[str, Tensor] = {}
        for frames in FRAMES:
            shown = {"answers": held_out(frames, options.asked), "retrieval": held_out(frames, options.found)}
            cases = [
                (task, long, 1) for task in ("answers", "retrieval") for long in ("average", "interpolate", "published")
            ]
            cases += [("answers", "average", n) for n in (2, 4) if std == 0.7 and frames in (32, 64)]
            for task, long, windows in cases:
                if frames == 8 and long != "average":
                    continue
                if task == "answers":
                    hits = answered(chat, prompts, *shown[task], long, windows)
                else:
                    hits = retrieved(model, texts, *shown[task], long)
                at_8 = base.setdefault(task, hits)
                only_at_8, only_here = int((at_8 & ~hits).sum()), int((hits & ~at_8).sum())
                rows.append(
                    Row(
                        task, std, long, frames, windows, int(hits.sum()), len(hits), only_at_8, only_here,
                        mcnemar(at_8, hits),
                    )
                )  # fmt: skip
                print(rows[-1], flush=True)
    result = {"command": "python bench/long_videos.py", "seconds": round(time.perf_counter() - began), **about}
    path = options.out or results_file("long-videos", about)
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    os.replace(aside, path)


if __name__ == "__main__":
    main()
