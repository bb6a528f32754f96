"""Videos of more frames than a branch was trained with: answers and retrieval of the small stack, trained at 8 frames.

``python bench/long_videos.py`` writes bench/results/long-videos-cpu.json. The same held-out clips are composed with 8,
16, 32, 64 and 128 frames each, so that every row is paired with the answers at 8 frames (exact two-sided sign test).
Each way of taking long videos (``model/time_steps.py``) is measured on two branches: the one shipped, whose time
table started at a standard deviation of 0.7, and the same with its untrained rows drawn anew at 0.02, where the time
table of a fresh branch starts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import facts, results_file
from miniature.items import ITEMS, load_items
from miniature.questions import QUESTIONS, parse
from miniature.scores import mcnemar
from miniature.world import COLOURS, SINGLE, caption, clips, random_labels
from torch import Tensor

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.conversation import answer_batch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.eval.features import embed
from bt_adapter.eval.stack import Stack, load_stack
from bt_adapter.files import write_json
from bt_adapter.model.time_steps import Long
from bt_adapter.model.video_tokens import video_tokens_streamed

FRAMES = (8, 16, 32, 64, 128)
FRESH_STD = 0.02
_BATCH = 16


@dataclass(frozen=True)
class Row:
    """Correct answers among n clips, and p of the sign test against the same clips at 8 frames.

    task: "answers" (how does it move, greedily generated) or "retrieval" (its caption first among 384). rows_std: at
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
    """Clips uint8 ``[8·each, frames, 3, 48, 48]`` and labels; the same scenes whatever ``frames`` is."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(each * len(SINGLE), SINGLE, generator)
    labels[:, 2] = torch.tensor(SINGLE).repeat_interleave(each)
    return clips(load_items("shipped"), labels, generator, frames), labels


@torch.no_grad()
def answered(chat: VideoChat, frames: Tensor, labels: Tensor, long: Long = "average", windows: int = 1) -> Tensor:
    """Which clips' event is told rightly, bool ``[n]``."""
    prompts = []
    question = QUESTIONS["motion"][0]
    for clip in frames:
        tokens = video_tokens_streamed(chat.branch, [chat.prepare(clip)[0]], len(clip), windows, long=long)
        visual = chat.visual("video", tokens)
        ids = conversation_ids(chat.processor, [Turn(question, ("video",))], [len(visual.tokens)])
        prompts.append((ids, [visual]))
    said = [
        text
        for start in range(0, len(prompts), _BATCH)
        for text in answer_batch(chat.model, chat.tokenizer, prompts[start : start + _BATCH], 12)
    ]
    return torch.tensor(
        [parse("motion", text) == truth for text, truth in zip(said, labels[:, 2].tolist(), strict=True)]
    )


def every_label() -> Tensor:
    """The 384 labels of an item, a colour and a motion or change of size, int64 ``[384, 3]``."""
    return torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor(SINGLE))


@torch.no_grad()
def retrieved(stack: Stack, frames: Tensor, labels: Tensor, long: Long = "average") -> Tensor:
    """Which clips find their own caption first among the 384, bool ``[n]``."""
    texts = F.normalize(stack.text([caption(*label) for label in every_label().tolist()]), dim=-1)
    vectors = torch.cat([embed(stack.model, some, long=long) for some in frames.split(4)])
    found = every_label()[(vectors @ texts.T).argmax(-1)]
    return (found == labels).all(-1)


def sign_test(first: Tensor, second: Tensor) -> dict[str, float | int]:
    """Clips right in the first alone and in the second alone, and p of the exact two-sided test."""
    return mcnemar(*(dict(enumerate(hits.tolist())) for hits in (first, second)))


def redraw(model: Any, std: float) -> None:
    """Draw the untrained rows of a time table again."""
    rows = model.branch.time.data[model.trained_steps or 0 :]
    rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * std)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--asked", type=int, default=4, help="clips of each of eight events that are asked about")
    parser.add_argument("--found", type=int, default=4, help="clips of each of eight events that are to be found")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    about, began = facts("cpu"), time.perf_counter()
    chat, stack = VideoChat.mini(), load_stack("mini", None)
    rows: list[Row] = []
    for std in (0.7, FRESH_STD):
        if std == FRESH_STD:
            redraw(attached_branch(chat.model), std)
            redraw(stack.model, std)
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
                    hits = answered(chat, *shown[task], long, windows)
                else:
                    hits = retrieved(stack, *shown[task], long)
                at_8 = base.setdefault(task, hits)
                test = sign_test(at_8, hits)
                rows.append(Row(task, std, long, frames, windows, int(hits.sum()), len(hits), *test.values()))
                print(rows[-1], flush=True)
    result = {"command": "python bench/long_videos.py", "seconds": round(time.perf_counter() - began), **about}
    path = options.out or results_file("long-videos", about)
    write_json(path, {**result, "rows": [asdict(row) for row in rows]}, indent=1)


if __name__ == "__main__":
    main()
