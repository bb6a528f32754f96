"""Reads CSV and TSV files row by row; an unreadable row is reported and does not affect other rows."""

from __future__ import annotations

import codecs
import csv
import os
import re
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TextIO

from bt_adapter.errors import CommandError

LONGEST_LINE = 1 << 24  # characters
MOST_LINES = 100  # of one row; quoted cells may hold line breaks
_MARKS = {  # longer ones first: UTF-32's mark begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class Table:
    """A CSV (commas; quoted cells may hold commas and line breaks) or TSV (tabs; quotes have no meaning).

    Args:
        name: the file's name, for messages. file: opened by :func:`open_text`. delimiter: "," or a tab.

    Attributes:
        columns: column names, from the first line that is not empty.

    Raises:
        CommandError: the header line cannot be read.
    """

    def __init__(self, name: str, file: TextIO, delimiter: str) -> None:
        self.name, self._delimiter, self._lines, self._sample = name, delimiter, _Lines(file), list[str]()
        self._reader = self._cells(self._lines, True)
        self._lines.check = self._check_continuation
        where, header = next(self._records(), (f"{name} line 1", list[str]()))
        if isinstance(header, str):
            raise CommandError(f"{where}: the column names cannot be read: {header}")
        if "\0" in "".join(header):
            raise CommandError(f"{where}: holds null bytes; save it as UTF-8, or as UTF-16 with a byte order mark")
        self.columns, self._sample = header, []

    def place(self, column: str) -> int | None:
        """Return the index of a column, or None if it is missing. Raises CommandError if the name occurs twice."""
        if self.columns.count(column) > 1:
            raise CommandError(f"{self.name}: has the column {column} {self.columns.count(column)} times")
        return self.columns.index(column) if column in self.columns else None

    def __iter__(self) -> Iterator[tuple[str, list[str] | str]]:
        """Yield where each row begins, and its cells (one per column) or the reason why it cannot be used."""
        for where, cells in self._records():
            if isinstance(cells, str):
                yield where, cells
            elif len(cells) != len(self.columns):  # with an unquoted comma the rest of a text would be lost
                yield where, f"{len(cells)} columns instead of {len(self.columns)}"
            elif "\0" in "".join(cells):
                yield where, "holds a null byte"
            else:
                self._sample = cells
                yield where, cells

    def _records(self) -> Iterator[tuple[str, list[str] | str]]:
        while True:
            self._lines.begin()
            result: list[str] | str | None
            try:
                result = next(self._reader, None)
            except csv.Error as error:
                result = str(error)
                if result == "unexpected end of data":
                    result = "an opening quote in it is never closed"
            except _Broken as error:
                result = str(error)
            if result is None:
                return
            where = f"{self.name} line {self._lines.first}"
            if isinstance(result, str):
                self._lines.push_back()
            if result:
                yield where, result

    def _check_continuation(self, record: Sequence[str], line: str) -> None:
        """Raise _Broken if a line inside quotes looks like a new row, so a closing quote is missing."""
        if len(record) >= MOST_LINES:
            raise _Broken(f"an opening quote in it is not closed within {MOST_LINES} lines")
        cells, sample = self._split(line), self._sample or self._split(record[0])
        if len(cells) == len(getattr(self, "columns", ())) and any(map(_is_alike, cells, sample)):
            raise _Broken("an opening quote in it is not closed before the next row")

    def _split(self, line: str) -> list[str]:
        """Split a single line into cells, without strict checks."""
        try:
            return next(self._cells([line], False), [])
        except csv.Error:
            return []

    def _cells(self, lines: Iterable[str], strict: bool) -> Iterator[list[str]]:
        quoting: Literal[0, 3] = csv.QUOTE_NONE if self._delimiter == "\t" else csv.QUOTE_MINIMAL
        return csv.reader(lines, delimiter=self._delimiter, quoting=quoting, strict=strict)


class _Broken(Exception):
    """A row that cannot be read; the message says why."""


class _Lines:
    """An iterator over a file's lines by record; all lines of a broken record but its first can be read again."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._again, self._record, self._number = file, deque[str](), list[str](), 0
        self.check: Callable[[Sequence[str], str], None] = lambda record, line: None

    @property
    def first(self) -> int:
        """Number of the record's first line, from 1."""
        return max(1, self._number - len(self._record) + 1)

    def begin(self) -> None:
        """Start a new record at the next line."""
        self._record = []

    def push_back(self) -> None:
        """Reduce the record to its first line and return the others to the input."""
        self._again.extendleft(reversed(self._record[1:]))
        self._number -= len(self._record[1:])
        self._record = self._record[:1]

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._file.readline(LONGEST_LINE)
        if not line:
            raise StopIteration
        if self._record:
            try:
                self.check(self._record, line)
            except _Broken:
                self._again.appendleft(line)
                raise
        self._number += 1
        self._record.append(line)
        if len(line) == LONGEST_LINE and line[-1] not in "\r\n":
            while (rest := self._file.readline(LONGEST_LINE)) and rest[-1] not in "\r\n":
                pass
            raise _Broken(f"has a line of more than {LONGEST_LINE} characters")
        return line


def open_text(name: str) -> TextIO:
    """Open a text file: UTF-8 or, with a byte order mark, UTF-16 or UTF-32; invalid UTF-8 becomes surrogates.

    Raises OSError, and CommandError if it is no regular file (reading a pipe might block forever).
    """
    mode = os.stat(name).st_mode
    if not stat.S_ISREG(mode):
        raise CommandError(f"{name}: is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; expected a file")
    with open(name, "rb") as file:
        begin = file.read(4)
    marked = next((encoding for mark, encoding in _MARKS.items() if begin.startswith(mark)), None)
    if marked is not None:
        return open(name, encoding=marked, errors="replace", newline="")
    return open(name, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_alike(cell: str, other: str) -> bool:
    """Tell whether two cells look like names of one kind: with the same suffix, or equal apart from digits."""
    suffix = os.path.splitext(cell)[1]
    if re.fullmatch(r"\.\w{1,5}", suffix) and suffix == os.path.splitext(other)[1]:
        return True
    shape = re.sub(r"\d+", "0", cell)
    return "0" in shape and shape == re.sub(r"\d+", "0", other)
