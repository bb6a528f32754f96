"""Live video: an hour of pushed frames, frames per second on this machine, and what 30 fps ask of a GPU.

    python bench/live.py                 all parts; rows to bench/results/live-cpu.json
    python bench/live.py --only gpu      the count alone, in seconds

"hour": the small stack watches an hour at 4 frames a second, 14,400 frames from a pool, pushed as fast as they are
taken; its tokens are computed every 2 seconds of the stream, and a question is answered every 6 minutes. Per tenth of
the hour: milliseconds of this process's CPU time per frame and for the tokens (which other work stretches too, though
less than time), and the resident memory at its end. The tokens of a sliding window are compared with ``video_tokens``
at the end.

"rate": seconds of CPU time to push a frame of 640 × 360, preprocessing included (median), and to compute the tokens of
8 frames; frames per second of a core that has no other work, and the tower's share of a push. L/14: ViT-L/14 at 224
pixels, depth 4, random weights.

"gpu": operations and bytes of a push and of the tokens of a ViT-L/14 in bfloat16, counted on meta tensors as a GPU
would run them (``budget.py``), not timed. "needed" is for 30 pushes a second; the least milliseconds and the share of
each device's peak that 30 fps take come from its maker's figures (``devices.py``). A real frame takes longer, because
kernels of one frame do not reach a device's peaks and each launch costs microseconds of the host.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from budget import Work
from contenders import make_model
from devices import DEVICES
from emulated_gpu import DEVICE, emulated_gpu
from measure import facts, results_file
from step import status
from torch import Tensor

from bt_adapter import BTAdapterVisionModel, LiveVideo
from bt_adapter.chat.engine import VideoChat
from bt_adapter.data.stream import FrameStream
from bt_adapter.files import write_json
from bt_adapter.live.session import LiveSession
from bt_adapter.mini import data_folder

FPS, HOUR, TENTHS = 4, 3600, 10
TOKENS_EVERY, ANSWER_EVERY = 8, 1440  # frames
WANTED_FPS = 30
QUESTION = "How is it moving?"


@dataclass
class Hour:
    """An hour of pushed frames. All lists have one value per tenth of it.

    push_ms, tokens_ms: CPU time of a frame and of the tokens, medians. rss: resident bytes. answer_s: CPU seconds of
    the answer at its end. rss_growth: last over first, less 1. time_ratio: of push_ms, last over first.
    error: largest difference from ``video_tokens`` of the window's frames (sliding alone). window_bytes: of the window.
    """

    window: str
    frames: int
    push_ms: list[float] = field(default_factory=list)
    tokens_ms: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    rss_growth: float = 0.0
    time_ratio: float = 0.0
    error: float | None = None
    window_bytes: int = 0


@dataclass
class Rate:
    """CPU seconds of one push and of the tokens on this machine."""

    model: str
    dtype: str
    frames: int
    push_s: float
    tokens_s: float
    fps: float
    tower_share: float


@dataclass
class Counted:
    """Work on a GPU of one push or of the tokens, counted; "needed" for `WANTED_FPS` a second."""

    what: str
    tflop: float
    gb: float
    launches: int
    needed_tflop_per_s: float
    needed_gb_per_s: float
    least_ms: dict[str, float] = field(default_factory=dict)
    share: dict[str, float] = field(default_factory=dict)


def pool() -> list[Tensor]:
    """Frames of the demo's clips, uint8 ``[3, H, W]``."""
    paths = sorted((data_folder() / "clips").glob("*.mp4"))
    return [frame for path in paths for chunk in FrameStream(path) for frame in chunk]


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU time of a call, of all threads of this process."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def watch_hour(chat: VideoChat, window: str, frames: int) -> Hour:
    """Push an hour of frames, see the module."""
    shown = pool()
    session = LiveSession(chat, window, fps=FPS)
    video = session._video
    row = Hour(window, frames)
    push: list[float] = []
    tokens: list[float] = []
    for number in range(-frames // 20, frames):  # a twentieth first, in which libraries and allocators settle
        if number == 0:
            session.ask(QUESTION, 8)
            push, tokens = [], []
        frame = shown[number % len(shown)]
        push.append(cpu_seconds(lambda frame=frame, number=number: session.push(frame, number / FPS + HOUR)))
        if number % TOKENS_EVERY == 0:
            tokens.append(cpu_seconds(video.tokens))
        if number > 0 and (number + 1) % (frames // TENTHS) == 0:
            row.answer_s.append(cpu_seconds(lambda: session.ask(QUESTION, 8)))
            row.push_ms.append(1e3 * median(push))
            row.tokens_ms.append(1e3 * median(tokens))
            row.rss.append(status("VmRSS"))
            push, tokens = [], []
            print(window, f"{(number + 1) / FPS / 60:.0f} min", row.push_ms[-1], row.rss[-1], flush=True)
    row.rss_growth = row.rss[-1] / row.rss[0] - 1
    row.time_ratio = row.push_ms[-1] / row.push_ms[0]
    row.window_bytes = video.nbytes
    if window == "sliding":
        last = torch.stack([shown[number % len(shown)] for number in range(frames - video.frames, frames)])
        with torch.no_grad():
            row.error = (video.tokens() - chat.branch.video_tokens(chat.prepare(last))[0]).abs().max().item()
    return row


def rate(name: str, model: BTAdapterVisionModel, rounds: int) -> Rate:
    """Time pushes and tokens, see the module."""
    spent = [0.0]
    for method in ("run", "run_layer"):
        setattr(model.tower, method, _timed(getattr(model.tower, method), spent))
    live = LiveVideo(model, frames=8)
    frame = torch.randint(256, (3, 360, 640), dtype=torch.uint8)
    pushes, tower = [], []
    for number in range(rounds + 1):  # the first is a warm-up
        before = spent[0]
        pushes.append(cpu_seconds(lambda number=number: live.push(frame, number)))
        tower.append((spent[0] - before) / pushes[-1])
    push, tokens = median(pushes[1:]), min(cpu_seconds(live.tokens) for _ in range(2))
    dtype = str(model.tower.dtype).removeprefix("torch.")
    return Rate(name, dtype, live.frames, push, tokens, 1 / push, median(tower[1:]))


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        result = function(*args, **kwargs)
        spent[0] += time.process_time() - begin
        return result

    return call


def counted() -> list[Counted]:
    """Count the work of one push, and of the tokens of a full window of 8 frames, as a GPU would run them."""
    rows = []
    with emulated_gpu(), torch.autocast(DEVICE, torch.bfloat16):
        live = LiveVideo(make_model("step", DEVICE), frames=8)
        frame = torch.zeros(3, 224, 224, dtype=torch.uint8, device=DEVICE)
        for number in range(8):
            live.push(frame, number)
        for what, run in (("push", lambda: live.push(frame, 8)), ("tokens", live.tokens)):
            with Work() as work:
                run()
            flop, moved = sum(e.operations for e in work.events), sum(e.bytes for e in work.events)
            row = Counted(
                what, flop / 1e12, moved / 1e9, sum(e.launches for e in work.events), WANTED_FPS * flop / 1e12,
                WANTED_FPS * moved / 1e9,
            )  # fmt: skip
            for name, device in DEVICES.items():
                least = sum(device.seconds(e.operations, e.bytes, e.dtype) for e in work.events)
                row.least_ms[name], row.share[name] = 1e3 * least, WANTED_FPS * least
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("hour", "rate", "gpu")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--frames", type=int, default=FPS * HOUR, help="frames of the hour")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    about = facts("cpu")  # before hours in which the checkout may change
    path = options.out or results_file("live", about)
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in options.only:
        rows: list[Any] = []
        if part == "gpu":
            rows = counted()
        elif part == "rate":
            rows.append(rate("mini", VideoChat.mini().branch, 100))
            for dtype in (torch.float32, torch.bfloat16):
                model = make_model("step", "cpu")
                model.tower.optimize(dtype=dtype)
                rows.append(rate("ViT-L/14", model, 8))
        else:
            chat = VideoChat.mini()
            rows = [watch_hour(chat, window, options.frames) for window in ("sliding", "whole")]
        for row in rows:
            print(row, flush=True)
        result[part] = [asdict(row) for row in rows]
        result[f"{part}_facts"] = {"command": f"python bench/live.py --only {part}", **about}
        write_json(path, result, indent=1)


if __name__ == "__main__":
    main()
