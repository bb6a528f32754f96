"""A file of rows written by several processes: each has its own part file, and the parts are merged at the end."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bt_adapter.errors import CommandError
from bt_adapter.files import Rows, about_file
from bt_adapter.training.processes import Processes


class SharedRows(Rows):
    """Rows that the processes of a distributed run write together.

    The first process appends to the file itself, process r to ``<name>.part<r>`` next to it. :meth:`merge` appends all
    rows to the file and removes the parts. The next run merges the parts of a killed run, whatever its number of
    processes. Every process must construct this class and call :meth:`merge`.

    Attributes:
        done: id -> row, for all processes' rows at construction and this process's rows since.

    Raises:
        CommandError: in every process, if one of them cannot open its file (see :class:`Rows`).
    """

    def __init__(self, path: Path, about: dict[str, Any], processes: Processes) -> None:
        self.processes = processes
        target = path if processes.first else path.with_name(f"{path.name}.part{processes.rank}")
        opened, problem = False, None
        for turn in (True, False):  # the first process merges old parts before the others open their files
            try:
                if processes.first is turn:
                    super().__init__(target, about)
                    opened = True
                    if turn:
                        self._merge_old_parts(about)
            except CommandError as error:
                problem = str(error)
            try:
                processes.agree(problem)
            except CommandError:
                if opened:
                    self.close()
                raise
        everywhere = processes.gather(self.done)
        self._in_file = set(everywhere[0])
        for done in everywhere:
            self.done = done | self.done

    def merge(self) -> None:
        """Append all processes' rows to the file, and remove the parts."""
        new = [] if self.processes.first else [row for key, row in self.done.items() if key not in self._in_file]
        gathered = self.processes.gather(new)
        if self.processes.first:
            self._append_missing([row for rows in gathered for row in rows])
        self.processes.agree(None)  # the rows are on disk before the parts are removed
        if not self.processes.first:
            _remove(self.path)

    def _append_missing(self, rows: Sequence[dict[str, Any]]) -> None:
        missing = {row["id"]: row for row in rows if row["id"] not in self._in_file}
        if missing:
            self.append(list(missing.values()))
            self._in_file |= set(missing)

    def _merge_old_parts(self, about: dict[str, Any]) -> None:
        self._in_file = set(self.done)
        for name in sorted(glob.glob(f"{glob.escape(str(self.path))}.part*")):
            if name.removeprefix(f"{self.path}.part").isdigit():
                with Rows(name, about) as part:
                    self._append_missing(list(part.done.values()))
                _remove(Path(name))


def _remove(part: Path) -> None:
    part.unlink()
    about_file(part).unlink(missing_ok=True)
