"""Stop signals, a clock and the learning rate schedule of all training runs. Commands import it, so it lacks torch."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WINDOW = 20  # steps over which throughput and data wait are averaged


class Stopped(Exception):
    """The run was stopped before its last step, after a checkpoint was written."""


def until_stopped(work: Callable[[], object]) -> int:
    """Call ``work``. Returns 0, or 143 after printing a line where it was stopped and can be resumed."""
    try:
        work()
    except Stopped as stopped:
        print(f"bt-adapter: {stopped}", file=sys.stderr)
        return 143
    return 0


@contextmanager
def signals(ask: Callable[[], None]) -> Iterator[None]:
    """Within the context, SIGTERM or SIGINT calls ``ask``. A second SIGINT ends the process at once.

    A second SIGTERM does not: torchrun and Slurm may both send one.
    """

    def stop(number: int, frame: Any) -> None:
        ask()
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    handlers: dict[int, Any] = {}
    try:
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Clock:
    """Measures throughput and the share of time spent waiting for data, over the last steps."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """Start a step, which first waits for its batch."""
        self.began = time.perf_counter()

    def got_data(self) -> None:
        """Note that the batch has arrived."""
        self.waited = time.perf_counter() - self.began

    def end(self) -> None:
        """End the step."""
        self.steps.append((time.perf_counter() - self.began, self.waited))

    def figures(self, batch: int) -> tuple[float, float]:
        """Clips per second, and the share of time spent waiting, in [0, 1]. ``batch``: clips per step."""
        seconds, waited = (sum(values) for values in zip(*self.steps, strict=True)) if self.steps else (0.0, 0.0)
        return (batch * len(self.steps) / seconds, waited / seconds) if seconds else (0.0, 0.0)


def warm_steps(share: float, steps: int) -> int:
    """Number of warm-up steps: a share of all steps, rounded up."""
    return math.ceil(round(share * steps, 6))  # 0.07 of 100 steps are 7, though their product is 7.000000000000001


def rate(step: int, steps: int, warm: int) -> float:
    """Factor of the learning rate at a step, counted from 1: linear warm-up, then cosine to 0.

    Without warm-up the first step has the full rate.
    """
    warm = max(1, warm)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
