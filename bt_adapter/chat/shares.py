"""A file of rows that many processes make: each writes a file of its own beside it, and in the end there is one."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bt_adapter.chat.rows import Rows, about_file
from bt_adapter.distributed import Processes
from bt_adapter.errors import CommandError

if TYPE_CHECKING:
    from bt_adapter.chat.answer import Question


class SharedRows(Rows):
    """Rows that the processes of a run make together.

    The first process appends to the file itself, process number r to ``<name>.part<r>`` beside it. :meth:`merge` puts
    all rows into the file and removes the parts. Parts that a killed run left are put into the file by the next run,
    whatever its number of processes. Every process makes one of these, and calls :meth:`merge`.

    Attributes:
        done: id -> row, of all processes' rows when it was made, and of this one's since.

    Raises:
        CommandError: in every process, where one of them cannot have its file (see :class:`Rows`).
    """

    def __init__(self, path: Path, about: dict[str, Any], processes: Processes) -> None:
        self.processes = processes
        own = path if processes.first else path.with_name(f"{path.name}.part{processes.rank}")
        opened, problem = False, None
        for turn in (True, False):  # the first process takes up what was left before the others open their files
            try:
                if processes.first is turn:
                    super().__init__(own, about)
                    opened = True
                    if turn:
                        self._take_up_parts(about)
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
        """Put all processes' rows into the file, and remove the parts."""
        new = [] if self.processes.first else [row for key, row in self.done.items() if key not in self._in_file]
        gathered = self.processes.gather(new)
        if self.processes.first:
            self._append_missing([row for rows in gathered for row in rows])
        self.processes.agree(None)  # the rows are on disk before the parts go
        if not self.processes.first:
            _remove(self.path)

    def _append_missing(self, rows: Sequence[dict[str, Any]]) -> None:
        missing = {row["id"]: row for row in rows if row["id"] not in self._in_file}
        if missing:
            self.append(list(missing.values()))
            self._in_file |= set(missing)

    def _take_up_parts(self, about: dict[str, Any]) -> None:
        self._in_file = set(self.done)
        for name in sorted(glob.glob(f"{glob.escape(str(self.path))}.part*")):
            if name.removeprefix(f"{self.path}.part").isdigit():
                with Rows(name, about) as part:
                    self._append_missing(list(part.done.values()))
                _remove(Path(name))


def share_of(questions: Sequence[Question], processes: Processes) -> list[Question]:
    """The questions of this process: about as many for each, those about one video together."""
    place = {video: number for number, video in enumerate(dict.fromkeys(question.video for question in questions))}
    ordered = sorted(questions, key=lambda question: place[question.video])
    first, last = (len(ordered) * rank // processes.world for rank in (processes.rank, processes.rank + 1))
    return ordered[first:last]


def _remove(part: Path) -> None:
    part.unlink()
    about_file(part).unlink(missing_ok=True)
