"""Seconds to the first token, tokens a second and memory of answering about a video.

    python bench/chat.py                               the small stack, rows to bench/results/
    python bench/chat.py --model DIR --branch DIR      any image chat model that `attach` takes

Contenders, on the same frames, question and language model, greedily, each answer of the same length:
"image": the image model given the frames one by one, frames × patches tokens in the prompt; "reference": the video
tokens by the reference's structure (``baseline.py``); "ours". From normalised frames on; decoding files is left out.

"first": from the frames to the first token, encoding and prompt. "tokens/s": of the tokens after it, all answers of
the batch together. "peak": the most memory of a process that does this alone: on a CPU resident, weights included, in
a process forked for it; on a GPU the allocator's. A prompt that does not fit into the model's context is reported as
such. Seconds are the wall clock's, or with ``--clock cpu`` the process's own (one thread), which a shared machine does
not stretch.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch
from baseline import Baseline
from measure import facts, results_file, write
from step import status
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.conversation import ContextError, Visual, check_context, context, embed
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.model.video_tokens import video_tokens_streamed

QUESTION = "How is it moving?"
FRAMES, BATCHES = (8, 16, 64, 100), (1, 4, 16)


@dataclass
class Row:
    """One contender at one number of frames and one batch."""

    model: str
    contender: str
    frames: int
    batch: int
    prompt: int = 0
    first: float | None = None
    tokens_per_s: float | None = None
    peak: int | None = None
    runs: int = 0
    clock: str = "wall"
    error: str = ""
    facts: dict = field(default_factory=dict)


def key(row: Row) -> tuple:
    """Return the values that identify a row."""
    return row.model, row.contender, row.frames, row.batch, row.clock


class Clock(BaseStreamer):
    """Notes when tokens come."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.times = [now()]

    def put(self, value: Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass


def encoder(name: str, chat: VideoChat) -> Callable[[Tensor], list[Visual]]:
    """From normalised frames ``[T, 3, h, w]`` of a video to what its prompt holds."""
    model = attached_branch(chat.model)
    if name == "image":
        see = chat.family.home.get_image_features
        return lambda pixels: [Visual("image", tokens) for tokens in see(pixels).pooler_output]
    if name == "reference":
        baseline = Baseline(model)
        return lambda pixels: [Visual("video", chat.project(baseline.video_tokens(pixels[None]))[0])]
    chunk = model.tower.chunk
    return lambda pixels: [
        Visual("video", chat.project(video_tokens_streamed(model, iter(pixels.split(chunk)), len(pixels)))[0])
    ]


@torch.no_grad()
def answer(
    chat: VideoChat, encode: Callable, pixels: Tensor, new: int, now: Callable[[], float]
) -> tuple[float, float, int]:
    """Seconds to the first token, tokens a second after it, tokens of a prompt. pixels ``[B, T, 3, h, w]``."""
    clock, rows = Clock(now), []
    for video in pixels:
        visuals = encode(video)
        lengths = [len(visual.tokens) for visual in visuals]
        kinds = tuple(visual.kind for visual in visuals)
        ids = conversation_ids(chat.processor, [Turn(QUESTION, kinds)], lengths)
        check_context(context(chat.model), len(ids), sum(lengths), new)
        rows.append(embed(chat.model, ids, visuals))
    embeds = torch.stack(rows)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    chat.family.generator.generate(
        inputs_embeds=embeds, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False,
        streamer=clock if len(rows) == 1 else None,
        **({} if len(rows) == 1 else {"stopping_criteria": [lambda ids, scores: _tick(clock, ids)]}),
    )  # fmt: skip
    times = clock.times[-new:]  # a streamer is given the prompt first
    return times[0] - clock.times[0], len(rows) * (new - 1) / (times[-1] - times[0]), embeds.shape[1]


def _tick(clock: Clock, ids: Tensor) -> Tensor:
    """A criterion that stops nothing: streamers take one answer only, criteria see every step of a batch."""
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    clock.put(ids)
    return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def measure(chat: VideoChat, row: Row, options: argparse.Namespace) -> Row:
    """Fill a row from up to three answers, none begun after ``--seconds``."""
    cuda, now = chat.device.type == "cuda", time.process_time if row.clock == "cpu" else time.perf_counter
    size = chat.family.image_size
    pixels = torch.randn(row.batch, row.frames, 3, size, size, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(chat.device, attached_branch(chat.model).tower.dtype)
    tokens = row.batch * (chat.family.patches * (row.frames if row.contender == "image" else 1) + 20)
    if tokens > options.most:
        row.error = f"left out: about {tokens} tokens of prompts, more than --most {options.most}"
        return row
    try:
        encode, found, began = encoder(row.contender, chat), [], now()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        while len(found) < 3 and (not found or now() - began < options.seconds):
            found.append(answer(chat, encode, pixels, options.new, now))
    except ContextError as error:
        row.error = str(error)
        return row
    except (torch.OutOfMemoryError, AttributeError) as error:  # a tower without what the baseline copies
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return row
    row.first, row.tokens_per_s = median(f[0] for f in found), median(f[1] for f in found)
    row.prompt, row.runs = found[0][2], len(found)
    row.peak = torch.cuda.max_memory_allocated() if cuda else status("VmHWM")
    return row


def measured_alone(chat: VideoChat, row: Row, options: argparse.Namespace) -> Row:
    """On a CPU in a process of its own, forked from this one, whose weights it shares."""
    if chat.device.type == "cuda":
        return measure(chat, row, options)
    import pickle

    read, write_end = os.pipe()
    child = os.fork()
    if not child:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        os.write(write_end, pickle.dumps(asdict(measure(chat, row, options))))
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code or not data:
        row.error = f"its process ended with {code}"
        return row
    return Row(**pickle.loads(data))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="a folder or hub name; default: the small stack")
    parser.add_argument("--branch", help="its branch")
    parser.add_argument("--only", nargs="+", choices=("image", "reference", "ours"),
                        default=("image", "reference", "ours"))  # fmt: skip
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--batch-size", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--new", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--seconds", type=float, default=5.0, help="begin no further run of a case after so long")
    parser.add_argument("--most", type=int, default=None, help="prompt tokens of a batch (CPU 6000, GPU 10^6)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so long")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--resume", action="store_true", help="keep the rows of --out that were measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/chat-<device>.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.most = options.most or (6000 if device == "cpu" else 10**6)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if options.model == "mini":
        chat = VideoChat.mini(device=device, dtype=dtype)
    else:
        chat = VideoChat.load(options.model, options.branch, device, dtype)
    measure(chat, Row("", "ours", 4, 1), options)  # libraries come up, caches are filled
    gc.collect()
    about, began = facts(device), time.perf_counter()
    path = options.out or results_file("chat", about)
    there = json.loads(path.read_text()) if options.resume and path.exists() else []
    rows = [Row(**row) for row in there if row["peak"]]
    measured = {key(row) for row in rows}
    for batch in options.batch_size:
        for frames in options.frames:
            for contender in options.only:
                row = Row(Path(options.model).name, contender, frames, batch, clock=options.clock, facts=about)
                if key(row) in measured:
                    continue
                if time.perf_counter() - began > 60 * options.minutes:
                    row.error = f"left out: {options.minutes:g} minutes were over"
                else:
                    row = measured_alone(chat, row, options)
                rows.append(row)
                write(rows, path)
                shown = (
                    row.error or f"first {row.first:.2f} s, {row.tokens_per_s:.1f} tokens/s, {row.peak / 2**20:.0f} MiB"
                )
                print(f"T={frames} batch={batch} {contender}: {row.prompt} tokens; {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
