"""Report the progress of a long computation to a callback."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]  # (steps done, total steps)


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
