"""Reads lists of clips and captions: CSV, TSV, JSON lines and shards."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable

from bt_adapter.data.clips import Clip
from bt_adapter.data.gathering import Gathered, Row, captions_of
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.tables import Table, open_text
from bt_adapter.data.tars import compression, looks_like_tar, read_shard
from bt_adapter.errors import CommandError
from bt_adapter.files import parse_lines

VIDEO_COLUMNS = ("video", "video_path", "path")
KINDS = ".csv, .tsv, .jsonl, .tar, a folder of .tar or a pattern of their names"
DELIMITERS = {".csv": ",", ".tsv": "\t"}
CAPTION_COLUMNS = ("caption", "name", "text", "sentence")


def read_clips(source: str | os.PathLike, videos: str | os.PathLike | None = None) -> tuple[list[Clip], Skipped]:
    """Read a data set and return its usable clips and the skipped rows with reasons.

    Files are checked against their folder's listing, made once; no video is opened. Unreadable videos show when they
    are decoded.

    Args:
        source: one of

            - a ``.csv`` or ``.tsv`` with the columns of WebVid, ``videoid``, ``name`` and optionally ``page_dir``: the
              videos are ``page_dir/videoid.mp4`` or ``videoid.mp4``, also below a folder ``videos``; or with columns
              ``video`` (a path) and ``caption``, optionally ``id``, ``start`` and ``end``. In a ``.csv``, quoted cells
              may hold commas and line breaks; in a ``.tsv``, quotes have no meaning;
            - a ``.jsonl``: one object per line with ``video``, ``caption`` or ``captions``, optionally ``id``,
              ``start`` and ``end`` (seconds);
            - a ``.tar`` of webdataset, a folder of them or a glob pattern: ``key.mp4`` and ``key.txt``, or a
              ``key.json`` with ``caption`` or ``captions``. Members are read by their offset, so the tar must not be
              compressed.
        videos: the folder that video names are relative to; default: the folder of ``source``.

    Rows of one video (same id, same range) become one clip with several captions. The key of a row without an id is
    its ``video``, as written, and its range.

    Raises:
        CommandError: ``source`` is missing, unreadable as a whole, or holds no usable clip.
    """
    name = os.fspath(source)
    suffix = os.path.splitext(name)[1].lower()
    gathered = Gathered(os.fspath(videos) if videos is not None else os.path.dirname(name))
    try:
        if suffix in DELIMITERS:
            _read_table(name, DELIMITERS[suffix], gathered)
        elif suffix == ".jsonl":
            _read_lines(name, gathered)
        else:
            for path in _tars(name):
                read_shard(path, gathered)
    except OSError as error:
        raise CommandError(f"{name}: cannot be read ({error.strerror or error})") from error
    return gathered.result(name)


def _read_table(name: str, delimiter: str, gathered: Gathered) -> None:
    with open_text(name) as file:
        table = Table(name, file, delimiter)
        table.columns = [column.strip().lower() for column in table.columns]
        row_of = _row_reader(table)
        for where, cells in table:
            if isinstance(cells, str):
                gathered.skipped.add(where, cells)
            else:
                gathered.add(row_of(where, cells))


def _row_reader(table: Table) -> Callable[[str, list[str]], Row]:
    """Return the function that converts a row's place and cells to a Row, by the table's columns."""
    caption = next((place for column in CAPTION_COLUMNS if (place := table.place(column)) is not None), None)
    video = next((place for column in VIDEO_COLUMNS if (place := table.place(column)) is not None), None)
    number, page = table.place("videoid"), table.place("page_dir")
    if caption is None or (video is None and number is None):
        raise CommandError(
            f"{table.name}: needs the columns video and caption, or WebVid's videoid and name; it has "
            f"{', '.join(column[:40] for column in table.columns[:20]) or 'none'}"
        )
    rest = [table.place(column) for column in ("id", "start", "end")]

    def plain(where: str, cells: list[str]) -> Row:
        id, start, end = (None if place is None else cells[place] for place in rest)
        assert video is not None
        return Row(where, id, [cells[video]] if cells[video] else [], cells[caption], start, end)

    def webvid(where: str, cells: list[str]) -> Row:
        assert number is not None
        file = f"{cells[number]}.mp4"
        found = [file] if page is None or not cells[page] else [f"{cells[page]}/{file}", file]
        return Row(where, cells[number], [*found, *(f"videos/{path}" for path in found)], cells[caption])

    return plain if video is not None else webvid


def _read_lines(name: str, gathered: Gathered) -> None:
    with open_text(name) as file:
        for number, value in parse_lines(file):
            where = f"{name} line {number}"
            if isinstance(value, ValueError):
                gathered.skipped.add(where, f"is not JSON ({value})")
                continue
            if not isinstance(value, dict) or not isinstance(value.get("video"), str):
                gathered.skipped.add(where, "is not an object with a text as its video")
                continue
            gathered.add(
                Row(where, value.get("id"), [value["video"]], captions_of(value), value.get("start"), value.get("end"))
            )


def _tars(name: str) -> list[str]:
    if os.path.isdir(name):
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not found:
            raise CommandError(f"{name}: this folder holds no .tar; name a list inside it by its own path ({KINDS})")
        return found
    if os.path.exists(name):
        if not os.path.isfile(name):
            raise CommandError(f"{name}: is not a regular file; expected {KINDS}")
        if not name.lower().endswith(".tar") and not looks_like_tar(name):
            packed = compression(name)
            problem = "not a known kind of list" if packed is None else f"compressed with {packed}: decompress it first"
            raise CommandError(f"{name}: is {problem}; expected {KINDS}")
        return [name]
    found = sorted(glob.glob(name))
    if not found:
        raise CommandError(f"{name}: no such file, and no file matches this pattern; expected {KINDS}")
    return found
