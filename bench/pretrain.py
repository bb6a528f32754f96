"""Pretraining as it runs: clips per second, waiting for data, and what more processes give.

    python bench/pretrain.py                the small stack on this machine's CPU or GPUs
    python bench/pretrain.py --clip NAME    another CLIP

Each row is a run of ``bt-adapter pretrain`` with --steps: from shards made here of moving clips (256 pixels, H.264,
whole and as written by ``bt-adapter shards --frames``), and from ``--data synthetic``, which decodes nothing, on one
process and on many. One thread a process. Throughput and waiting are medians over the log's lines but the first five;
each line is a mean over the last 20 steps, or over all so far.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ROOT, facts, results_file, write

sys.path.insert(0, str(ROOT))
import torch.nn.functional as F  # noqa: E402
from miniature.items import load_items  # noqa: E402
from miniature.world import SINGLE, caption, clips, random_labels  # noqa: E402

from bt_adapter.data import write_video  # noqa: E402
from bt_adapter.data.clips import Clip  # noqa: E402
from bt_adapter.data.shards import write_shards  # noqa: E402


@dataclass
class Row:
    """One run."""

    data: str
    clip: str
    processes: int
    workers: int
    batch: int
    steps: int
    clips_per_s: float
    data_wait: float
    times_one: float | None
    command: str
    facts: dict


def make_shards(folder: Path, count: int) -> dict[str, Path]:
    """Clips of 32 frames of 256 pixels, as whole files and as 16 key frames each."""
    labels = random_labels(count, SINGLE, torch.Generator().manual_seed(0))
    videos = clips(load_items("shipped"), labels, torch.Generator().manual_seed(1), 32)
    (folder / "videos").mkdir()
    found = []
    for number, (video, label) in enumerate(zip(videos, labels.tolist(), strict=True)):
        path = folder / "videos" / f"{number:04d}.mp4"
        write_video(path, F.interpolate(video, size=(256, 256)), fps=16)
        found.append(Clip(path.stem, str(path), (caption(*label),)))
    write_shards(found, folder / "whole", 64)
    write_shards(found, folder / "frames", 64, frames=16, short_side=256)
    return {"shards": folder / "whole", "shards of 16 frames": folder / "frames"}


def run(data: str, source: str, processes: int, workers: int, options: argparse.Namespace, device: str) -> Row:
    """One run in processes of its own."""
    with tempfile.TemporaryDirectory() as out:
        batch = options.batch_size * processes
        arguments = ["pretrain", "--data", source, "--clip", options.clip, "--batch-size", str(batch), "--out", out]
        arguments += ["--steps", str(options.steps), "--workers", str(workers), "--depth", "3"]
        arguments += [] if device == "cpu" else ["--dtype", "bfloat16"]
        launch = [sys.executable, "-m", "bt_adapter.commands"]
        if processes > 1:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            launch += ["-m", "bt_adapter.commands"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*launch, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
        if done.returncode:
            raise SystemExit(f"{data}: ended with {done.returncode}\n{done.stderr[-2000:]}")
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()][5:]
        rate = statistics.median(line["clips_per_s"] for line in lines)
        wait = statistics.median(line["data_wait"] for line in lines)
        shown = " ".join(arguments).replace(source, "DATA" if data != "synthetic" else source).replace(out, "OUT")
        about = facts(device)
        return Row(data, options.clip, processes, workers, batch, options.steps, rate, wait, None, shown, about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clip", default="mini")
    parser.add_argument("--batch-size", type=int, default=16, help="clips per process and step")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    many = torch.cuda.device_count() if device == "cuda" else max(2, (os.cpu_count() or 2) // 2 * 2)
    rows = []
    for processes in sorted({1, many}):
        rows.append(run("synthetic", "synthetic", processes, 0, options, device))
        rows[-1].times_one = rows[-1].clips_per_s / rows[0].clips_per_s
    with tempfile.TemporaryDirectory() as folder:
        for name, path in make_shards(Path(folder), 256).items():
            rows.append(run(name, str(path), 1, options.workers, options, device))
    for row in rows:
        times = "" if row.times_one is None else f", {row.times_one:.2f} times one process"
        print(
            f"{row.data:20} {row.processes} process(es), {row.workers} worker(s): {row.clips_per_s:7.1f} clips/s, "
            f"waiting {100 * row.data_wait:4.1f} %{times}"
        )
    path = options.out or results_file("pretrain", facts(device))
    write(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
