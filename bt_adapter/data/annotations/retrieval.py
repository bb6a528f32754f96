"""Reads the videos and captions of MSR-VTT, DiDeMo, LSMDC and ActivityNet."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bt_adapter.data.annotations.files import lines, one_split, read_json, records, table
from bt_adapter.data.finding import named_with_suffixes
from bt_adapter.data.gathering import Row
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError

DIDEMO_SECONDS = 30.0  # annotators saw at most this part of a video


def msrvtt(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read MSR-VTT: all captions of a video are correct; the 1k-A list has one per video."""
    chosen: dict[str, Any] | None = None
    if path.suffix == ".csv":
        one_split(path, split)
        rows = list(table(path, ("video_id",), skipped))
        if rows and "sentence" in rows[0][1]:
            for where, row in rows:
                yield Row(where, row["video_id"], named_with_suffixes(row["video_id"]), row["sentence"])
            return
        chosen, path = {row["video_id"]: None for _, row in rows}, path.with_name("MSRVTT_data.json")
    data = read_json(path, dict)
    known = {str(video.get("video_id")): video.get("split") for video in records(path, data, "videos")}
    if chosen is None:
        wanted = {"val": "validate"}.get(split or "", split)
        chosen = {name: None for name, part in known.items() if wanted in (None, part)}
        if not chosen:
            parts = ", ".join(sorted({str(part) for part in known.values()}))
            raise CommandError(f"{path}: no split {split!r}; it has {parts}")
    captions: dict[str, list[Any]] = {name: [] for name in chosen}
    for sentence in records(path, data, "sentences"):
        if (name := str(sentence.get("video_id"))) in captions:
            captions[name].append(sentence.get("caption"))
    for name, found in captions.items():
        yield Row(str(path), name, named_with_suffixes(name), found)


def didemo(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read DiDeMo: the descriptions of a video become one paragraph."""
    one_split(path, split)
    paragraphs: dict[str, list[Any]] = {}
    for number, entry in enumerate(read_json(path, list)):
        if isinstance(entry, dict) and isinstance(entry.get("video"), str):
            paragraphs.setdefault(entry["video"], []).append(entry.get("description"))
        else:
            skipped.add(f"{path} entry {number}", "names no video")
    for name, sentences in paragraphs.items():
        stem = os.path.splitext(name)[0]
        places = [name, *named_with_suffixes(stem), f"{name}.mp4"]
        yield Row(str(path), name, places, _paragraph(name, sentences, skipped), end=DIDEMO_SECONDS)


def lsmdc(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read LSMDC: one sentence per clip."""
    one_split(path, split)
    for where, line in lines(path):
        cells = line.split("\t")
        if cells[0].lower().strip("<>") in ("clip_id", "video_id"):
            continue
        if len(cells) != 6:
            skipped.add(where, f"{len(cells)} columns separated by tabs, instead of 6")
            continue
        name, movie = cells[0], cells[0].rpartition("_")[0]  # movie_begin-end
        yield Row(where, name, [*named_with_suffixes(f"{movie}/{name}"), *named_with_suffixes(name)], cells[5])


def activitynet(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read ActivityNet Captions: the sentences of a video become one paragraph."""
    one_split(path, split)
    for name, entry in read_json(path, dict).items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        if not isinstance(sentences, list):
            skipped.add(name, "has no list of sentences")
            continue
        yield Row(str(path), name, named_with_suffixes(name), _paragraph(name, sentences, skipped))


def _paragraph(name: str, sentences: list[Any], skipped: Skipped) -> str | None:
    """Join all sentences that are text; record the others as skipped. Returns None if there are none."""
    good = [s.strip() for s in sentences if isinstance(s, str) and s.strip()]
    for number, sentence in enumerate(sentences, 1):
        if good and not (isinstance(sentence, str) and sentence.strip()):
            skipped.add(f"{name}, sentence {number}", "is empty or not text")
    return " ".join(good) or None
