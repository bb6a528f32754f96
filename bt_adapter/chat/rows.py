"""A file of JSON lines that grows batch by batch; a run that is killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bt_adapter.errors import CommandError


def about_file(path: Path) -> Path:
    """The file that says what the rows of ``path`` were made with."""
    return path.with_name(path.name + ".about.json")


class Rows:
    """Rows with an "id" each, appended to a file and never rewritten.

    What is there when it is opened stays; half a line at the end, left by a kill, is cut off. What the rows were made
    with stands in a file beside it, ``<name>.about.json``: rows of two kinds never mix. While it is open no other
    process can open it.

    Attributes:
        done: id -> row.

    Raises:
        CommandError: the file holds rows made otherwise, or something else; or another run is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], about: dict[str, Any]) -> None:
        self.path = Path(path)
        self.done: dict[str, dict[str, Any]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise CommandError(f"{self.path} is being written by another run") from error
        try:
            self._check(about)
            self._read()
        except BaseException:
            self.close()
            raise

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Add rows; they are on disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # half a surrogate pair has no place in UTF-8; what stands for it then is JSON's own way to write it
        self._write(text.encode("utf-8", "backslashreplace"))
        os.fsync(self._file)
        self.done |= {row["id"]: row for row in rows}

    def close(self) -> None:
        """Let others have it."""
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]

    def _check(self, about: dict[str, Any]) -> None:
        """Compare with what stands beside the file, or write it there."""
        about = json.loads(json.dumps(about))
        beside = about_file(self.path)
        if os.fstat(self._file).st_size and not beside.exists():
            raise CommandError(f"{self.path} is there already, and no {beside.name} beside it says what made it")
        if os.fstat(self._file).st_size:
            before = json.loads(beside.read_text(encoding="utf-8"))
            names = sorted(name for name in before.keys() | about.keys() if before.get(name) != about.get(name))
            if names:
                told = ", ".join(f"{name} {before.get(name)!r}, now {about.get(name)!r}" for name in names)
                raise CommandError(f"{self.path} was made with {told}: give the same, or another file")
            return
        temporary = beside.with_name(beside.name + ".tmp")
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, beside)

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                self.done[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise CommandError(f"{self.path}, line {number}, is no row of a run: {error}") from error
