"""Write the small world's data sets as the product's commands read them: ``python bench/miniature/datasets.py OUT``.

- ``pretrain``: .tar shards of clips and captions for ``bt-adapter pretrain``. The two clips of a pair of counterparts
  stand side by side, and each run of 32 clips holds no caption twice; in every second run all items have one colour.
- ``stills`` (``stills.jsonl``) and ``clips`` (``clips.jsonl``): conversations for ``bt-adapter tune``. Stills show an
  event, or are plain and then asked no question about one. ``stills-ramp`` has one kind of exposure, ``stills-plain``
  plain stills alone.
- ``heldout`` and ``heldout-stills`` (``questions.json``): for ``bt-adapter eval qa``. The clips ``motion/0012a`` and
  ``motion/0012b`` are a pair, asked in the same words.
- ``retrieval`` (``pairs.jsonl``): for ``bt-adapter eval retrieval``, one clip for each caption.

The last three are of the shipped items, the others of the training items. A data set appears when it is whole, and is
left as it is where it is there already. Its ``about.json`` says how many files it has of how many frames each, counted
from the files. Both clips of a pair hold the very same pixels when they are decoded, in another order: each frame is
coded by itself with a fixed quantizer, whatever stands beside it.

``--demo`` writes the clips that ``bt-adapter demo`` asks about instead, into OUT itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import torch
from PIL import Image
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature import world  # noqa: E402
from miniature.items import ITEMS, Items, load_items  # noqa: E402
from miniature.questions import QUESTIONS, answer, draw_question  # noqa: E402
from miniature.world import COLOURS, EVENTS, EXPOSURES, KINDS, SINGLE, of_kind, random_labels  # noqa: E402

from bt_adapter.data.shards import add_bytes  # noqa: E402
from bt_adapter.data.video import write_video  # noqa: E402
from bt_adapter.files import remove_unfinished, write_json, writing  # noqa: E402

WEIGHTS = {"motion": 3, "size": 1, "order": 2, "speed": 1}  # how often a clip of pretraining is of each kind
ASKED = {"motion": 4, "size": 1, "order": 5, "speed": 1}  # the same for a clip that is asked about
MOSTLY_SPEED = {"motion": 1, "size": 1, "order": 1, "speed": 12}
PLAIN = 0.25  # share of plain stills
RUN, SHARD = 32, 640  # clips without a repeated caption, and clips of a shard
PART = 240  # images drawn at once
Draw = Callable[[Items, Tensor, torch.Generator], Tensor]  # a function of ``world`` that draws stills or clips
Pictures = Iterator[tuple[list[int], Tensor]]  # labels with what was drawn
HELD_OUT = {"motion": 30, "size": 20, "order": 10, "speed": 20}  # pairs of clips of each pair of events


def paired_labels(
    pairs: int, one_colour: bool, generator: torch.Generator, kinds: Mapping[str, int] = WEIGHTS
) -> Tensor:
    """Different labels int64 ``[2 pairs, 3]``, counterparts as neighbours, with these weights of kinds of events.

    one_colour: all of one random colour, and all items equally often (``pairs`` is a multiple of their number then).
    """
    weights = torch.tensor([kinds[event.kind] / len(of_kind(event.kind)) for event in EVENTS[::2]])
    if one_colour:
        number = torch.multinomial(weights.expand(len(ITEMS), -1), pairs // len(ITEMS), generator=generator)
        item = torch.arange(len(ITEMS)).repeat_interleave(number.shape[1])
        colour = torch.randint(len(COLOURS), (1,), generator=generator).expand(pairs)
        rows = torch.stack([item, colour, 2 * number.flatten()], 1)[torch.randperm(pairs, generator=generator)]
    else:
        cells = weights.repeat(len(ITEMS) * len(COLOURS))
        cell = torch.multinomial(cells, pairs, generator=generator)
        look, number = cell // len(weights), cell % len(weights)
        rows = torch.stack([look // len(COLOURS), look % len(COLOURS), 2 * number], 1)
    return world.with_counterparts(rows)


def write_picture(stem: Path, picture: Tensor) -> Path:
    """Write a clip uint8 ``[T, 3, 48, 48]`` as STEM.mp4 of 96 x 96 pixels, or a still ``[3, 48, 48]`` as STEM.png.

    With twice as many pixels, all of the chroma is kept.
    """
    path = stem.with_suffix(".png" if picture.ndim == 3 else ".mp4")
    if picture.ndim == 3:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    else:
        write_video(path, enlarged(picture, 2), options={"qp": "18", "preset": "ultrafast", "g": "1", "threads": "1"})
    return path


def enlarged(frames: Tensor, times: int) -> Tensor:
    """Each pixel of ``[..., h, w]`` as a square of ``times`` x ``times``."""
    return frames.repeat_interleave(times, -1).repeat_interleave(times, -2)


def count_frames(folder: Path) -> dict[str, int]:
    """Count the files of a folder by their number of frames, {"8": files}; members of .tar files count too."""
    found: Counter[int] = Counter()
    for path in folder.iterdir():
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                found.update(_frames(tar.extractfile(member)) for member in tar if member.name.endswith(".mp4"))
        elif path.suffix in (".mp4", ".png"):
            found[_frames(str(path))] += 1
    return {str(frames): files for frames, files in sorted(found.items())}


def _frames(file: Any) -> int:
    with av.open(file, "r") as container:
        return sum(packet.size > 0 for packet in container.demux(video=0))


@dataclass(frozen=True)
class Writer:
    """Writes one data set of ``count`` clips or stills of these items into a folder."""

    folder: Path
    items: Items
    count: int
    generator: torch.Generator

    def pretrain(self, kinds: Mapping[str, int] = WEIGHTS) -> None:
        """Shards; ``kinds``: how often a clip is of each kind of events."""
        for begin in range(0, self.count, SHARD):
            with tarfile.open(self.folder / f"{begin // SHARD:05d}.tar", "w") as tar:
                for run in range(begin, min(begin + SHARD, self.count), RUN):
                    labels = paired_labels(RUN // 2, run // RUN % 2 == 0, self.generator, kinds)[: self.count - run]
                    for number, (label, frames) in enumerate(self._drawn(world.paired_clips, labels), run):
                        aside = write_picture(self.folder / "clip", frames)
                        text = world.caption(*label, template=self._random(len(world.TEMPLATES)))
                        add_bytes(tar, f"{number:06d}.mp4", aside.read_bytes())
                        add_bytes(tar, f"{number:06d}.txt", text.encode())
        aside.unlink()

    def stills(self, kinds: Sequence[str] = EXPOSURES) -> None:
        """Conversations about stills; ``kinds``: of exposure; none: plain stills alone."""
        labels = random_labels(self.count, SINGLE, self.generator)
        labels[self.count - round(self.count * PLAIN) if kinds else 0 :, 2] = -1

        def asked(label: list[int]) -> list[str]:
            return ["item", "colour", EVENTS[label[2]].kind if label[2] >= 0 else "caption"]

        self._talks("stills.jsonl", "image", self._stills(labels, kinds), asked)

    def clips(self) -> None:
        """Conversations about clips."""
        labels = random_labels(self.count, (-1,), self.generator)
        weights = torch.tensor([ASKED[event.kind] / len(of_kind(event.kind)) for event in EVENTS])
        labels[:, 2] = torch.multinomial(weights, self.count, replacement=True, generator=self.generator)

        def asked(label: list[int]) -> list[str]:
            return [EVENTS[label[2]].kind, ("item", "colour", "caption")[self._random(3)]]

        self._talks("clips.jsonl", "video", self._drawn(world.clips, labels), asked)

    def heldout(self) -> None:
        """Questions about pairs of clips, at least one pair of each pair of events; ``count`` is kept to about."""
        whole = sum(len(of_kind(kind)) * pairs for kind, pairs in HELD_OUT.items())
        records: list[dict] = []
        for kind in KINDS:
            events = of_kind(kind)[::2]
            rows = random_labels(len(events) * max(1, HELD_OUT[kind] * self.count // whole), (-1,), self.generator)
            rows[:, 2] = torch.tensor(events).repeat(len(rows) // len(events))
            about, asked = (kind, "item", "colour") if kind == "motion" else (kind,), {}
            pictures = self._drawn(world.paired_clips, world.with_counterparts(rows))
            for number, (label, frames) in enumerate(pictures):
                key = f"{number // 2:04d}{'ab'[number % 2]}"
                file = write_picture(self.folder / f"{kind}-{key}", frames)
                if number % 2 == 0:  # both of a pair are asked in the same words
                    asked = {one: draw_question(one, self.generator) for one in about}
                for one, question in asked.items():
                    named = {"id": f"{one}/{key}", "video_id": file.name, "question": question}
                    records.append({**named, "answer": answer(one, label), "type": one})
        write_json(self.folder / "questions.json", records, indent=1)

    def heldout_stills(self) -> None:
        """Questions about stills: a quarter is plain, the others show each event of a motion equally often."""
        labels = random_labels(self.count, (-1,), self.generator)
        shown, events = self.count - round(self.count * PLAIN), of_kind("motion")
        labels[:shown, 2] = torch.tensor(events)[torch.arange(shown) % len(events)]
        records: list[dict] = []
        for number, (label, still) in enumerate(self._stills(labels, EXPOSURES)):
            file = write_picture(self.folder / f"{'motion' if label[2] >= 0 else 'plain'}-{number:04d}", still)
            for one in ("motion", "item", "colour") if label[2] >= 0 else ("item", "colour"):
                question = draw_question(one, self.generator)
                named = {"id": f"{one}/{number:04d}", "image": file.name, "question": question}
                records.append({**named, "answer": answer(one, label), "type": one})
        write_json(self.folder / "questions.json", records, indent=1)

    def retrieval(self) -> None:
        """One clip for each caption, of which there are 864, or at most ``count``."""
        columns = (torch.arange(0, len(EVENTS), 2), torch.arange(len(ITEMS)), torch.arange(len(COLOURS)))
        labels = world.with_counterparts(torch.cartesian_prod(*columns)[:, [1, 2, 0]])[: self.count]
        records: list[dict] = []
        for label, frames in self._drawn(world.paired_clips, labels):
            file = write_picture(self.folder / f"{len(records):04d}", frames)
            records.append({"id": file.stem, "video": file.name, "caption": world.caption(*label)})
        self._write_lines("pairs.jsonl", records)

    def _drawn(self, draw: Draw, labels: Tensor) -> Pictures:
        for part in labels.split(PART) if len(labels) else ():
            yield from zip(part.tolist(), draw(self.items, part, self.generator), strict=True)

    def _stills(self, labels: Tensor, kinds: Sequence[str]) -> Pictures:
        """Each label with its still, those in which an event shows first."""
        showing = labels[:, 2] >= 0
        yield from self._drawn(partial(world.exposures, kinds=kinds), labels[showing])
        yield from self._drawn(world.plain_stills, labels[~showing])

    def _random(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def _talks(self, name: str, medium: str, pictures: Pictures, asked: Callable[[list[int]], list[str]]) -> None:
        """A conversation about each picture: questions of the kinds that ``asked`` says, in random order."""
        records: list[dict] = []
        for label, picture in pictures:
            file = write_picture(self.folder / f"{len(records):06d}", picture)
            kinds, turns = asked(label), []
            for number in torch.randperm(len(kinds), generator=self.generator).tolist():
                question = draw_question(kinds[number], self.generator)
                turns.append({"from": "human", "value": question if turns else f"<{medium}>\n{question}"})
                turns.append({"from": "gpt", "value": answer(kinds[number], label)})
            records.append({"id": file.stem, medium: file.name, "conversations": turns})
        self._write_lines(name, records)

    def _write_lines(self, name: str, records: list[dict]) -> None:
        (self.folder / name).write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")


def write_demo(out: Path, seed: int = 7) -> None:
    """Write an mp4 of each single event and of one in two steps, and clips.json: file, truth and question of each.

    The frames have 192 pixels, a size that players show and codecs are made for.
    """
    generator, shown = torch.Generator().manual_seed(seed), (*SINGLE, of_kind("order")[0])
    labels = random_labels(len(shown), shown, generator)
    labels[:, 2] = torch.tensor(shown)
    records: list[dict] = []
    for label, frames in zip(labels.tolist(), world.clips(load_items(), labels, generator), strict=True):
        event = EVENTS[label[2]]
        file = f"{len(records)}-{event.phrase.removeprefix('moving ').replace(' ', '-')}.mp4"
        write_video(out / file, enlarged(frames, 4), fps=4, options={"crf": "18", "preset": "veryslow"})
        records.append({"file": file, "truth": world.caption(*label), "question": QUESTIONS[event.kind][0]})
    write_json(out / "clips.json", records)


class DataSet(NamedTuple):
    """How one is written, its split of items, its own count, and the kinds of exposure in its stills."""

    write: Callable[[Writer], None]
    items: str
    count: int
    exposures: tuple[str, ...] = ()


DATA_SETS = {
    "pretrain": DataSet(Writer.pretrain, "train", 12_800),
    "speed": DataSet(partial(Writer.pretrain, kinds=MOSTLY_SPEED), "train", 6400),
    "stills": DataSet(Writer.stills, "train", 6000, EXPOSURES),
    "stills-ramp": DataSet(partial(Writer.stills, kinds=EXPOSURES[:1]), "train", 6000, EXPOSURES[:1]),
    "stills-plain": DataSet(partial(Writer.stills, kinds=()), "train", 6000),
    "clips": DataSet(Writer.clips, "train", 3000),
    "heldout": DataSet(Writer.heldout, "shipped", 340),
    "heldout-stills": DataSet(Writer.heldout_stills, "shipped", 240, EXPOSURES),
    "retrieval": DataSet(Writer.retrieval, "shipped", 864),
}


def write(out: Path, name: str, count: int | None = None, seed: int = 0) -> bool:
    """Write a data set to ``out/name``; returns False where it is there already.

    Raises ValueError where it is there with another count or seed, or the count is odd.
    """
    data, folder = DATA_SETS[name], out / name
    count = data.count if count is None else count
    asked = {"name": name, "count": count, "seed": seed}
    if count < 2 or count % 2:
        raise ValueError(f"--count is {count}; expected an even number of at least 2, since clips are made in pairs")
    if (folder / "about.json").is_file():
        there = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if other := {key: there.get(key) for key in asked if there.get(key) != asked[key]}:
            raise ValueError(f"{folder} is there with {other}; expected {asked}: remove it, or name another folder")
        return False
    out.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out, name)
    with writing(folder) as aside:
        aside.mkdir()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        data.write(Writer(aside, load_items(data.items), count, generator))
        frames = count_frames(aside)
        counted = {"files": sum(frames.values()), "frames": frames}
        write_json(aside / "about.json", asked | {"items": data.items, "exposures": data.exposures} | counted, indent=1)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="data sets to write")
    parser.add_argument("--count", type=int, help="clips or stills of each; default: its own number")
    parser.add_argument("--demo", action="store_true", help="write the clips of the demo instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.demo:
        return write_demo(options.out)
    for name in options.only:
        try:
            print(f"{name}: {'written' if write(options.out, name, options.count) else 'there already'}", flush=True)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
