"""Reads the tables, texts and JSON files of data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bt_adapter.data.skipped import Skipped
from bt_adapter.data.tables import Table, open_text
from bt_adapter.errors import CommandError


def table(path: Path, needed: Iterable[str], skipped: Skipped | None = None) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the place of each row of a CSV with a header, and its cells by column; ``needed`` columns must exist.

    Rows that are unreadable or have a wrong number of cells are recorded in ``skipped``, or raise CommandError if it
    is None. Raises OSError, CommandError.
    """
    with open_text(str(path)) as file:
        rows = Table(str(path), file, ",")
        if missing := [name for name in needed if rows.place(name) is None]:
            raise CommandError(f"{path}: has no column {missing[0]}; its columns: {', '.join(rows.columns)}")
        for where, cells in rows:
            if not isinstance(cells, str):
                yield where, dict(zip(rows.columns, cells, strict=True))
            elif skipped is None:
                raise CommandError(f"{where}: {cells}")
            else:
                skipped.add(where, cells)


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place and content of each line of a text that is not empty. Raises OSError."""
    with open_text(str(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line.strip("\r\n")


def read_json(path: Path, kind: type) -> Any:
    """Read a JSON file whose top-level value must be a ``kind``. Raises OSError, CommandError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: is not JSON ({error})") from error
    if not isinstance(value, kind):
        raise CommandError(f"{path}: expected a {kind.__name__} at its top level, got a {type(value).__name__}")
    return value


def records(path: Path, data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return the list of objects called ``name`` in the JSON of ``path``. Raises CommandError."""
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise CommandError(f"{path}: has no list {name!r} of objects")
    return found


def words(name: str) -> str:
    """Split a class name such as "brush_hair" or "ApplyEyeMakeup" into lower-case words."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower().split())


def one_split(path: Path, split: str | None) -> None:
    """Raise CommandError if a split is given for a file that holds only one."""
    if split is not None:
        raise CommandError(f"--split {split}: {path} holds only one split; leave --split out")
