"""Lists of clips and captions: CSV, JSON lines, and shards."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Callable
from typing import TextIO

from bt_adapter.data.clips import Clip
from bt_adapter.data.gathering import Gathered, Row, captions_of
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.tars import read_tar
from bt_adapter.errors import CommandError

VIDEO_COLUMNS = ("video", "video_path", "path")
CAPTION_COLUMNS = ("caption", "name", "text", "sentence")


def read_clips(source: str | os.PathLike, videos: str | os.PathLike | None = None) -> tuple[list[Clip], Skipped]:
    """The clips of a data set that can be used, and what cannot, with the reasons.

    Whether a file is there is read off its folder, listed once: nothing is opened or asked for per clip. Whether it is
    a video shows when it is decoded.

    Args:
        source: one of

            - a ``.csv`` (or ``.tsv``) with the columns of WebVid, ``videoid``, ``name`` and perhaps ``page_dir``: the
              videos are ``page_dir/videoid.mp4`` or ``videoid.mp4``, also below a folder ``videos``; or with a column
              ``video`` (a path) and ``caption``, perhaps ``id``, ``start`` and ``end``;
            - a ``.jsonl``: one object a line with ``video``, ``caption`` or ``captions``, perhaps ``id``, ``start`` and
              ``end`` (seconds);
            - a ``.tar`` of webdataset, a folder of them or a glob pattern: ``key.mp4`` beside ``key.txt`` or a
              ``key.json`` with ``caption`` or ``captions``. Members are read by their place in the tar, so the tar
              itself must not be compressed.
        videos: the folder that names of videos are relative to; default: that of ``source``.

    Rows of one video (same id, same part) are one clip with several captions. A row without an id is called by its
    ``video``, as written, and its part.

    Raises:
        CommandError: ``source`` is missing, cannot be read as a whole, or holds no usable clip.
    """
    name = os.fspath(source)
    suffix = os.path.splitext(name)[1].lower()
    gathered = Gathered(os.fspath(videos) if videos is not None else os.path.dirname(name))
    try:
        if suffix in (".csv", ".tsv"):
            _read_csv(name, "\t" if suffix == ".tsv" else ",", gathered)
        elif suffix == ".jsonl":
            _read_lines(name, gathered)
        else:
            for path in _tars(name):
                read_tar(path, gathered)
    except OSError as error:
        raise CommandError(f"{name}: cannot be read ({error.strerror or error})") from error
    return gathered.result(name)


def _read_csv(name: str, delimiter: str, gathered: Gathered) -> None:
    with open_text(name) as file:
        reader = csv.reader(file, delimiter=delimiter)
        header = [column.strip().lower() for column in next(reader, [])]
        row_of = _row_reader(name, header)
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                gathered.skipped.add(f"{name} line {reader.line_num}", str(error))
                continue
            if cells is None:
                return
            if not cells:
                continue
            where = f"{name} line {reader.line_num}"
            if len(cells) != len(header):  # more: a caption with an unquoted comma would lose its rest
                gathered.skipped.add(where, f"{len(cells)} columns instead of {len(header)}")
                continue
            gathered.add(row_of(where, cells))


def _row_reader(name: str, header: list[str]) -> Callable[[str, list[str]], Row]:
    """How to read a row under these columns."""
    places = {column: place for place, column in reversed(list(enumerate(header)))}
    caption = next((places[column] for column in CAPTION_COLUMNS if column in places), None)
    video = next((places[column] for column in VIDEO_COLUMNS if column in places), None)
    number = places.get("videoid")
    if caption is None or (video is None and number is None):
        raise CommandError(
            f"{name}: needs the columns video and caption, or WebVid's videoid and name; it has "
            f"{', '.join(column[:40] for column in header[:20]) or 'none'}"
        )
    rest = [places.get(column) for column in ("id", "start", "end")]

    def plain(where: str, cells: list[str]) -> Row:
        id, start, end = (None if place is None else cells[place] for place in rest)
        assert video is not None
        return Row(where, id, [cells[video]] if cells[video] else [], cells[caption], start, end)

    def webvid(where: str, cells: list[str]) -> Row:
        assert number is not None
        file, page = f"{cells[number]}.mp4", places.get("page_dir")
        found = [file] if page is None or not cells[page] else [f"{cells[page]}/{file}", file]
        return Row(where, cells[number], [*found, *(f"videos/{path}" for path in found)], cells[caption])

    return plain if video is not None else webvid


def _read_lines(name: str, gathered: Gathered) -> None:
    with open_text(name) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{name} line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                gathered.skipped.add(where, f"is no JSON ({error})")
                continue
            if not isinstance(value, dict) or not isinstance(value.get("video"), str):
                gathered.skipped.add(where, "is no object with a video's name as its video")
                continue
            gathered.add(
                Row(where, value.get("id"), [value["video"]], captions_of(value), value.get("start"), value.get("end"))
            )


def _tars(name: str) -> list[str]:
    if os.path.isdir(name):
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not found:
            raise CommandError(f"{name}: no .tar in this folder")
        return found
    if os.path.exists(name):
        return [name]
    found = sorted(glob.glob(name))
    if not found:
        raise CommandError(f"{name}: no such file, and no file of this pattern; expected .csv, .jsonl or .tar")
    return found


def open_text(name: str) -> TextIO:
    """Text; what is no UTF-8 is seen by the caption it is in. Tables saved as "Unicode" are UTF-16, with a mark."""
    with open(name, "rb") as file:
        wide = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    if wide:
        return open(name, encoding="utf-16", errors="replace", newline="")
    return open(name, encoding="utf-8-sig", errors="surrogateescape", newline="")
