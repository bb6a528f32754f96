"""Tables as text (CSV, TSV), row by row: a row that cannot be read is named and takes no other row with it."""

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
MOST_LINES = 100  # of one row, whose cells may hold line ends within quotes
_MARKS = {  # the longer ones first: UTF-32's begins as UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class Table:
    """A CSV (commas, quotes in which commas and line ends may stand) or TSV (tabs; quotes are letters like others).

    Args:
        name: of the file, for messages. file: as :func:`open_text` gives it. delimiter: "," or a tab.

    Attributes:
        columns: their names, as the first line that is not empty has them.

    Raises:
        CommandError: the line of the columns cannot be read.
    """

    def __init__(self, name: str, file: TextIO, delimiter: str) -> None:
        self.name, self._delimiter, self._lines, self._sample = name, delimiter, _Lines(file), list[str]()
        self._reader = self._cells(self._lines, True)
        self._lines.check = self._check_continuation
        where, header = next(self._records(), (f"{name} line 1", list[str]()))
        if isinstance(header, str):
            raise CommandError(f"{where}: the names of the columns cannot be read: {header}")
        if "\0" in "".join(header):
            raise CommandError(f"{where}: holds bytes 0; save the file as UTF-8, or as UTF-16 with a byte order mark")
        self.columns, self._sample = header, []

    def place(self, column: str) -> int | None:
        """The number of a column, counted from 0; None if there is none of this name. Raises CommandError for two."""
        if self.columns.count(column) > 1:
            raise CommandError(f"{self.name}: has the column {column} {self.columns.count(column)} times")
        return self.columns.index(column) if column in self.columns else None

    def __iter__(self) -> Iterator[tuple[str, list[str] | str]]:
        """Where a row begins, and its cells, one for each column, or the reason why it cannot be used."""
        for where, cells in self._records():
            if isinstance(cells, str):
                yield where, cells
            elif len(cells) != len(self.columns):  # more: a text with an unquoted comma would lose its rest
                yield where, f"{len(cells)} columns instead of {len(self.columns)}"
            elif "\0" in "".join(cells):
                yield where, "holds a byte 0"
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
                    result = "a quote that opens in it is never closed"
            except _Broken as error:
                result = str(error)
            if result is None:
                return
            where = f"{self.name} line {self._lines.first}"
            if isinstance(result, str):
                self._lines.give_again()
            if result:
                yield where, result

    def _check_continuation(self, record: Sequence[str], line: str) -> None:
        """Raise _Broken where a line within quotes shows that these were not meant to reach so far."""
        if len(record) >= MOST_LINES:
            raise _Broken(f"a quote that opens in it is not closed within {MOST_LINES} lines")
        cells, sample = self._split(line), self._sample or self._split(record[0])
        if len(cells) == len(getattr(self, "columns", ())) and any(map(_is_alike, cells, sample)):
            raise _Broken("a quote that opens in it is not closed before the next row")

    def _split(self, line: str) -> list[str]:
        """The cells of a line by itself, read leniently."""
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
    """The lines of a file, for one record after the other; those of a broken record but its first can come again."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._again, self._record, self._number = file, deque[str](), list[str](), 0
        self.check: Callable[[Sequence[str], str], None] = lambda record, line: None

    @property
    def first(self) -> int:
        """The number of the record's first line, counted from 1."""
        return max(1, self._number - len(self._record) + 1)

    def begin(self) -> None:
        """A record begins with the next line."""
        self._record = []

    def give_again(self) -> None:
        """The record was its first line alone: the others come again."""
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
            raise _Broken(f"has more than {LONGEST_LINE} characters in a line")
        return line


def open_text(name: str) -> TextIO:
    """A text file, UTF-8 or, with a byte order mark, UTF-16 or UTF-32; what is no UTF-8 is seen by the text it is in.

    Raises OSError, and CommandError for what is no regular file (reading a pipe might wait for ever).
    """
    mode = os.stat(name).st_mode
    if not stat.S_ISREG(mode):
        raise CommandError(f"{name}: is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}, not a list")
    with open(name, "rb") as file:
        begin = file.read(4)
    wide = next((encoding for mark, encoding in _MARKS.items() if begin.startswith(mark)), None)
    if wide is not None:
        return open(name, encoding=wide, errors="replace", newline="")
    return open(name, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _is_alike(cell: str, other: str) -> bool:
    """Whether two cells look like names of the same kind: of one suffix, or the same but for their numbers."""
    suffix = os.path.splitext(cell)[1]
    if re.fullmatch(r"\.\w{1,5}", suffix) and suffix == os.path.splitext(other)[1]:
        return True
    shape = re.sub(r"\d+", "0", cell)
    return "0" in shape and shape == re.sub(r"\d+", "0", other)
