"""A JSON-lines file that grows batch by batch, from which a killed run resumes."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bt_adapter.errors import CommandError


def about_file(path: Path) -> Path:
    """Return the path of the file with the settings that produced the rows of ``path``."""
    return path.with_name(path.name + ".about.json")


class Rows:
    """An append-only file of rows, each with an "id".

    Existing rows are kept; an incomplete last line, left by a killed run, is removed. The settings that produced the
    rows are stored in ``<name>.about.json`` next to it, so that rows of different settings never mix. An open file is
    locked against other processes.

    Attributes:
        done: id -> row.

    Raises:
        CommandError: the file holds rows of other settings, or no rows at all; or another run is writing it.
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
        """Append rows; they are on disk when this returns."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # UTF-8 cannot encode half a surrogate pair; the backslash escape is valid JSON
        self._write(text.encode("utf-8", "backslashreplace"))
        os.fsync(self._file)
        self.done |= {row["id"]: row for row in rows}

    def close(self) -> None:
        """Close the file and release its lock."""
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
        """Compare the settings with the stored ones, or store them for a new file."""
        about = json.loads(json.dumps(about))
        stored = about_file(self.path)
        if os.fstat(self._file).st_size and not stored.exists():
            raise CommandError(
                f"{self.path} already exists, but {stored.name} with its settings does not: choose another file"
            )
        if os.fstat(self._file).st_size:
            before = json.loads(stored.read_text(encoding="utf-8"))
            names = sorted(name for name in before.keys() | about.keys() if before.get(name) != about.get(name))
            if names:
                changed = ", ".join(f"{name} {before.get(name)!r}, now {about.get(name)!r}" for name in names)
                raise CommandError(f"{self.path} was made with {changed}: use the same settings, or another file")
            return
        temporary = stored.with_name(stored.name + ".tmp")
        temporary.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, stored)

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
                raise CommandError(f"{self.path}, line {number}, is not a row of a run: {error}") from error
