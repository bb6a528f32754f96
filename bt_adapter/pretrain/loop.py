"""What every training run has: a way to be stopped, a clock, a learning rate. Without torch: commands import it."""

from __future__ import annotations

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

WINDOW = 20  # steps that throughput and data wait are means over


class Stopped(Exception):
    """The run was asked to end before its last step; what it did is saved."""


@contextmanager
def signals(ask: Callable[[], None]) -> Iterator[None]:
    """Within it, SIGTERM or SIGINT calls ``ask``. A second SIGINT ends the process at once.

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
    """Throughput and the share of time spent waiting for data, over the last steps."""

    def __init__(self) -> None:
        self.steps: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def begin(self) -> None:
        """A step begins, with waiting for its batch."""
        self.began = time.perf_counter()

    def got_data(self) -> None:
        """The batch is there."""
        self.waited = time.perf_counter() - self.began

    def end(self) -> None:
        """The step is over."""
        self.steps.append((time.perf_counter() - self.began, self.waited))

    def figures(self, batch: int) -> tuple[float, float]:
        """Clips per second, and the share of waiting in [0, 1]."""
        seconds, waited = (sum(values) for values in zip(*self.steps, strict=True)) if self.steps else (0.0, 0.0)
        return (batch * len(self.steps) / seconds, waited / seconds) if seconds else (0.0, 0.0)


def warm_steps(share: float, steps: int) -> int:
    """Steps of warm-up: a share of all steps, rounded up."""
    return math.ceil(round(share * steps, 6))  # 0.07 of 100 steps are 7, though their product is 7.000000000000001


def rate(step: int, steps: int, warm: int) -> float:
    """Factor of the learning rate at a step, counted from 1: linear warm-up, then cosine to 0.

    Without warm-up the first step has the full rate.
    """
    warm = max(1, warm)
    if step <= warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
