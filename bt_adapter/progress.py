"""Report progress, and print text on the terminal literally, without failing on characters that it cannot encode.

By default, rich interprets ``[...]`` in a text as markup and ``:cat:`` as an emoji. All output of this package goes
through the consoles and progress bars made here, which disable that. Rich is imported when something is printed:
``bt_adapter.data`` imports this file for the type of its callbacks.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.progress
    from rich.console import Console

Progress = Callable[[int, int], object]  # (steps done, total steps)

_FILE_COLUMNS = 10_000  # width of output to a file or pipe, so that nothing is cut or wrapped


def counter(total: int, progress: Progress | None) -> Callable[[], None]:
    """Make a function that is called after each of ``total`` steps and reports to ``progress``."""
    if progress is None:
        return nothing
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        progress(count, total)

    return step


def nothing() -> None:
    """Do nothing."""


def prepare_output() -> None:
    """Let stdout write "?" for characters that its encoding lacks, and discard output to closed streams.

    Python sets stdout or stderr to None if it was closed before the program started (``>&-`` in a shell).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a replacement by a test or notebook may lack it
    if reconfigure is not None:
        reconfigure(errors="replace")


def make_console(stderr: bool = False) -> Console:
    """Make a console without markup and emoji. stderr: write to stderr instead of stdout."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text literally, whatever the console's settings are; lines are not wrapped."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def make_progress(console: Console, remaining: bool = False, transient: bool = True) -> rich.progress.Progress:
    """Make a display of progress bars, shown only on a terminal.

    remaining: also show the remaining time. transient: remove the bars at the end.
    """
    import rich.progress
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[rich.progress.ProgressColumn] = [TextColumn("{task.description}", markup=False), BarColumn()]
    columns += [MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn()] if remaining else []
    return rich.progress.Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


@contextmanager
def progress_bar(console: Console, title: str, remaining: bool = False) -> Iterator[Callable[[int, int], Any]]:
    """Show a progress bar within the context; yields a callback (done, total) that updates it."""
    with make_progress(console, remaining) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table to stdout, the first column left-aligned and the others right-aligned."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(box=SIMPLE)
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = make_console()
    if not console.is_terminal:
        console.width = _FILE_COLUMNS
    console.print(table)
