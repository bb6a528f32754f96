"""Text on the terminal: names, questions and errors are shown as they are, and what cannot be shown ends no command.

Rich takes ``[...]`` in a text for markup and ``:cat:`` for an emoji unless it is told not to. Whatever this package
prints with rich goes through the consoles and bars made here, which are told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

_WIDE = 10_000  # columns where no terminal limits them: nothing in a file or pipe is cut or wrapped


def prepare_output() -> None:
    """Let stdout write "?" for characters that its encoding lacks, and take what is written where it is closed.

    Python has None in the place of a stdout or stderr that was closed before the program began (``>&-`` in a shell).
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # what a test or a notebook put there may have none
    if reconfigure is not None:
        reconfigure(errors="replace")


def make_console(stderr: bool = False) -> Console:
    """Make a console that takes no text for markup or emoji. stderr: write there instead of to stdout."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a text as it is, whatever it holds and whatever the console is set to; lines are not wrapped."""
    console.print(text, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)


def make_progress(console: Console, remaining: bool = False, transient: bool = True) -> Progress:
    """Make a display of bars, shown on a terminal alone.

    remaining: show the time that is left too. transient: remove the bars at the end.
    """
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TimeRemainingColumn()] if remaining else []
    return Progress(*columns, console=console, transient=transient, disable=not console.is_terminal)


@contextmanager
def progress_bar(console: Console, what: str, remaining: bool = False) -> Iterator[Callable[[int, int], Any]]:
    """Show a bar named ``what`` within the context; yields a callback (done, in all) that moves it."""
    with make_progress(console, remaining) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a table to stdout, the first column to the left and the others to the right."""
    table = Table(box=SIMPLE)
    for number, title in enumerate(head):
        table.add_column(title, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = make_console()
    if not console.is_terminal:
        console.width = _WIDE
    console.print(table)
