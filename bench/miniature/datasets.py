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
import io
import json
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

from bt_adapter.data.video import write_video  # noqa: E402
from bt_adapter.files import remove_unfinished, write_json, writing  # noqa: E402

WEIGHTS = {"motion": 3, "size": 1, "order": 2, "speed": 1}  # how often a clip for training is of each kind
MOSTLY_SPEED = {"motion": 1, "size": 1, "order": 1, "speed": 12}
PLAIN = 0.25  # share of plain stills
RUN, SHARD = 32, 640  # clips without a repeated caption, and clips of a shard
PART = 240  # images drawn at once
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


def drawn(
    draw: Callable[[Items, Tensor, torch.Generator], Tensor], items: Items, labels: Tensor, generator: torch.Generator
) -> Iterator[tuple[list[int], Tensor]]:
    """Each label with its picture, by a function of ``world`` that draws stills or clips."""
    for part in labels.split(PART) if len(labels) else ():
        yield from zip(part.tolist(), draw(items, part, generator), strict=True)


def write_clip(path: Path, frames: Tensor) -> None:
    """Write frames uint8 ``[T, 3, 48, 48]`` as an mp4 of 96 x 96 pixels, so that chroma keeps all of its pixels."""
    write_video(path, enlarged(frames, 2), options={"qp": "18", "preset": "ultrafast", "g": "1", "threads": "1"})


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


def make_pretrain(
    folder: Path, items: Items, count: int, generator: torch.Generator, kinds: Mapping[str, int] = WEIGHTS
) -> None:
    aside = folder / "clip.mp4"
    for begin in range(0, count, SHARD):
        with tarfile.open(folder / f"{begin // SHARD:05d}.tar", "w") as tar:
            for run in range(begin, min(begin + SHARD, count), RUN):
                labels = paired_labels(RUN // 2, run // RUN % 2 == 0, generator, kinds)[: count - run]
                for number, (label, frames) in enumerate(drawn(world.paired_clips, items, labels, generator), run):
                    write_clip(aside, frames)
                    template = int(torch.randint(len(world.TEMPLATES), (), generator=generator))
                    _add(tar, f"{number:06d}.mp4", aside.read_bytes())
                    _add(tar, f"{number:06d}.txt", world.caption(*label, template=template).encode())
    aside.unlink()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # of no user and no time, so that the same seed gives the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def make_stills(
    folder: Path, items: Items, count: int, generator: torch.Generator, kinds: Sequence[str] = EXPOSURES
) -> None:
    """kinds: of exposure; none: plain stills alone."""
    shown = count - round(count * PLAIN) if kinds else 0
    labels = random_labels(count, SINGLE, generator)
    labels[shown:, 2] = -1
    records: list[dict] = []
    for label, still in _stills(items, labels, generator, kinds):
        name = f"{len(records):06d}.png"
        _write_still(folder / name, still)
        asked = ["item", "colour", EVENTS[label[2]].kind if label[2] >= 0 else "caption"]
        records.append({"id": name[:-4], "image": name, **_conversation("<image>", asked, label, generator)})
    _write_lines(folder / "stills.jsonl", records)


def _stills(
    items: Items, labels: Tensor, generator: torch.Generator, kinds: Sequence[str] = EXPOSURES
) -> Iterator[tuple[list[int], Tensor]]:
    """Each label with its still, those in which an event shows first."""
    showing = labels[:, 2] >= 0
    yield from drawn(partial(world.exposures, kinds=kinds), items, labels[showing], generator)
    yield from drawn(world.plain_stills, items, labels[~showing], generator)


def make_clips(folder: Path, items: Items, count: int, generator: torch.Generator) -> None:
    labels = random_labels(count, (-1,), generator)
    weights = torch.tensor([WEIGHTS[event.kind] / len(of_kind(event.kind)) for event in EVENTS])
    labels[:, 2] = torch.multinomial(weights, count, replacement=True, generator=generator)
    records: list[dict] = []
    for label, frames in drawn(world.clips, items, labels, generator):
        name = f"{len(records):06d}.mp4"
        write_clip(folder / name, frames)
        look = ("item", "colour", "caption")[int(torch.randint(3, (), generator=generator))]
        asked = [EVENTS[label[2]].kind, look]
        records.append({"id": name[:-4], "video": name, **_conversation("<video>", asked, label, generator)})
    _write_lines(folder / "clips.jsonl", records)


def _conversation(place: str, asked: list[str], label: list[int], generator: torch.Generator) -> dict[str, list]:
    """Questions of these kinds in random order, the first with the place of the picture."""
    turns: list[dict[str, str]] = []
    for number in torch.randperm(len(asked), generator=generator).tolist():
        question = draw_question(asked[number], generator)
        turns.append({"from": "human", "value": question if turns else f"{place}\n{question}"})
        turns.append({"from": "gpt", "value": answer(asked[number], label)})
    return {"conversations": turns}


def make_heldout(folder: Path, items: Items, count: int, generator: torch.Generator) -> None:
    """count: clips, about; the kinds keep their shares, and there is a pair of each pair of events at least."""
    whole = sum(len(of_kind(kind)) * pairs for kind, pairs in HELD_OUT.items())
    records: list[dict] = []
    for kind in KINDS:
        events = of_kind(kind)[::2]
        rows = random_labels(len(events) * max(1, HELD_OUT[kind] * count // whole), (-1,), generator)
        rows[:, 2] = torch.tensor(events).repeat(len(rows) // len(events))
        about, asked = (kind, "item", "colour") if kind == "motion" else (kind,), {}
        labels = world.with_counterparts(rows)
        for number, (label, frames) in enumerate(drawn(world.paired_clips, items, labels, generator)):
            key = f"{number // 2:04d}{'ab'[number % 2]}"
            write_clip(folder / f"{kind}-{key}.mp4", frames)
            if number % 2 == 0:  # both of a pair are asked in the same words
                asked = {one: draw_question(one, generator) for one in about}
            for one, question in asked.items():
                named = {"id": f"{one}/{key}", "video_id": f"{kind}-{key}.mp4"}
                records.append({**named, "question": question, "answer": answer(one, label), "type": one})
    write_json(folder / "questions.json", records, indent=1)


def make_heldout_stills(folder: Path, items: Items, count: int, generator: torch.Generator) -> None:
    """count: stills; a quarter is plain, the others show each event of a motion equally often."""
    labels = random_labels(count, (-1,), generator)
    shown, events = count - round(count * PLAIN), of_kind("motion")
    labels[:shown, 2] = torch.tensor(events)[torch.arange(shown) % len(events)]
    records: list[dict] = []
    for number, (label, still) in enumerate(_stills(items, labels, generator)):
        image = f"{'motion' if label[2] >= 0 else 'plain'}-{number:04d}.png"
        _write_still(folder / image, still)
        for one in ("motion", "item", "colour") if label[2] >= 0 else ("item", "colour"):
            named = {"id": f"{one}/{number:04d}", "image": image, "question": draw_question(one, generator)}
            records.append({**named, "answer": answer(one, label), "type": one})
    write_json(folder / "questions.json", records, indent=1)


def make_retrieval(folder: Path, items: Items, count: int, generator: torch.Generator) -> None:
    """count: at most so many clips; all captions are 864."""
    columns = (torch.arange(0, len(EVENTS), 2), torch.arange(len(ITEMS)), torch.arange(len(COLOURS)))
    labels = world.with_counterparts(torch.cartesian_prod(*columns)[:, [1, 2, 0]])[:count]
    records: list[dict] = []
    for label, frames in drawn(world.paired_clips, items, labels, generator):
        name = f"{len(records):04d}.mp4"
        write_clip(folder / name, frames)
        records.append({"id": name[:-4], "video": name, "caption": world.caption(*label)})
    _write_lines(folder / "pairs.jsonl", records)


def _write_still(path: Path, still: Tensor) -> None:
    Image.fromarray(still.permute(1, 2, 0).numpy()).save(path)


def _write_lines(path: Path, records: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_demo(out: Path, seed: int = 7) -> None:
    """Write an mp4 of each single event and of one in two steps, and clips.json: file, truth and question of each.

    The frames have 192 pixels, a size that players show and codecs are made for.
    """
    generator, shown = torch.Generator().manual_seed(seed), (*SINGLE, of_kind("order")[0])
    labels = random_labels(len(shown), shown, generator)
    labels[:, 2] = torch.tensor(shown)
    records: list[dict] = []
    for label, frames in drawn(world.clips, load_items(), labels, generator):
        event = EVENTS[label[2]]
        file = f"{len(records)}-{event.phrase.removeprefix('moving ').replace(' ', '-')}.mp4"
        write_video(out / file, enlarged(frames, 4), fps=4, options={"crf": "18", "preset": "veryslow"})
        records.append({"file": file, "truth": world.caption(*label), "question": QUESTIONS[event.kind][0]})
    write_json(out / "clips.json", records)


class DataSet(NamedTuple):
    """make(folder, items, number, generator) writes it; items: a split; exposures: the kinds in its stills."""

    make: Callable[[Path, Items, int, torch.Generator], None]
    items: str
    number: int
    exposures: tuple[str, ...] = ()


DATA_SETS = {
    "pretrain": DataSet(make_pretrain, "train", 12_800),
    "speed": DataSet(partial(make_pretrain, kinds=MOSTLY_SPEED), "train", 6400),
    "stills": DataSet(make_stills, "train", 6000, EXPOSURES),
    "stills-ramp": DataSet(partial(make_stills, kinds=EXPOSURES[:1]), "train", 6000, EXPOSURES[:1]),
    "stills-plain": DataSet(partial(make_stills, kinds=()), "train", 6000),
    "clips": DataSet(make_clips, "train", 3000),
    "heldout": DataSet(make_heldout, "shipped", 340),
    "heldout-stills": DataSet(make_heldout_stills, "shipped", 240, EXPOSURES),
    "retrieval": DataSet(make_retrieval, "shipped", 864),
}


def write(out: Path, name: str, count: int | None = None, seed: int = 0) -> bool:
    """Write a data set to ``out/name``; returns False where it is there already.

    Raises ValueError where it is there with another count or seed, or a count of clips in pairs is odd.
    """
    made, folder = DATA_SETS[name], out / name
    count = made.number if count is None else count
    asked = {"name": name, "count": count, "seed": seed}
    if count < 1 or count % 2 and made.make in (make_pretrain, make_heldout, make_retrieval):
        raise ValueError(f"--count is {count}; expected at least 1, and an even number where clips are made in pairs")
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
        made.make(aside, load_items(made.items), count, generator)
        frames = count_frames(aside)
        counted = {"files": sum(frames.values()), "frames": frames}
        write_json(aside / "about.json", asked | {"items": made.items, "exposures": made.exposures} | counted, indent=1)
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
