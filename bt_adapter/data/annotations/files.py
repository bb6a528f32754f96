"""Reading the files of data sets, and the names in them."""

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
    """Where a row of a CSV with a header begins, and its cells by their columns; ``needed`` are there.

    Rows that cannot be read, or have another number of cells, are noted in ``skipped``; without it they are errors.
    Raises OSError, CommandError.
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
    """Where and what: the lines of a text that are not empty. Raises OSError."""
    with open_text(str(path)) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path} line {number}", line.strip("\r\n")


def read_json(path: Path, kind: type) -> Any:
    """A JSON file with a ``kind`` at its top. Raises OSError, CommandError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: is no JSON ({error})") from error
    if not isinstance(value, kind):
        raise CommandError(f"{path}: expected a {kind.__name__} at its top, it is a {type(value).__name__}")
    return value


def records(path: Path, data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A list of objects in the JSON of ``path``. Raises CommandError."""
    found = data.get(name)
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise CommandError(f"{path}: has no list {name!r} of objects")
    return found


def words(name: str) -> str:
    """ "brush_hair", "ApplyEyeMakeup" in words."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").lower().split())


def one_split(path: Path, split: str | None) -> None:
    """Raise CommandError where a split is asked of a file that is one."""
    if split is not None:
        raise CommandError(f"--split {split}: {path} is one split by itself")
