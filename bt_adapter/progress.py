"""Telling a caller how far a long computation is."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], object]  # (steps done, steps in all)


def counter(total: int, progress: Progress | None) -> Callable[[], None]:
    """What to call after each of ``total`` steps."""
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
