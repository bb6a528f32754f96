"""When the frames of a video are shown, made from time stamps that may be missing, repeated, wrong or start anew."""

from __future__ import annotations

import bisect
import math
import operator
import statistics
from collections.abc import Sequence
from fractions import Fraction

FAR = 10  # seconds: a clock does not go on by as much from one frame to the next where it may start anew
_JITTER = 1  # seconds: where a clock does not start anew, frames may be as much out of order
_ROUNDING = 1e-6  # seconds: a frame that begins in a middle is shown there, whatever sums of floats say
_STRAYS = 8  # so many stamps in a row may be wrong ones between right ones


def split_clock(stamps: Sequence[int | None], time_base: Fraction, restarts: bool) -> tuple[list[int], list[bool]]:
    """Find where the clock of a stream starts anew, as it does where files were joined.

    Args:
        stamps: decoding times of the packets in the order of the file, in units of ``time_base``.
        time_base: in seconds.
        restarts: the container lets clocks start anew (MPEG-TS and MPEG-PS do, at any place and in either direction).

    Returns:
        For each packet the number of its part, from 0, ascending; and whether its stamp is wrong: a few packets in a
        row whose stamps are far from those before and after them, which go on with each other.
    """
    far = math.ceil(FAR / time_base)
    jump = math.ceil(_JITTER / time_base)
    back = 0 if restarts else jump
    part, wrong = [0] * len(stamps), [False] * len(stamps)
    known = [stamp for stamp in stamps if stamp is not None]
    steps = list(map(operator.sub, known[1:], known))
    if not steps or (min(steps) >= 0 and not (restarts and max(steps) > far)):
        return part, wrong
    runs: list[list[tuple[int, int]]] = [[]]  # of each part its packets and their stamps
    for i, stamp in enumerate(stamps):
        run = runs[-1]
        if stamp is not None and run:
            last = run[-1][1]
            strays: list[int] = []
            if len(runs) > 1 and len(run) <= _STRAYS and _goes_on(runs[-2][-1][1], last, stamp, jump, far):
                strays = [k for k, _ in runs.pop()]
                run = runs[-1]
            elif stamp < last - back or (restarts and stamp > last + far):
                strays = _strays_ahead(run, stamp, far)
                if strays:
                    del run[-len(strays) :]
                else:
                    runs.append(run := [])
            for k in strays:
                wrong[k] = True
                part[k] = len(runs) - 1
        part[i] = len(runs) - 1
        if stamp is not None:
            run.append((i, stamp))
    return part, wrong


def _goes_on(before: int, last: int, stamp: int, jump: int, far: int) -> bool:
    """Whether a stamp is close behind ``before`` and far from ``last``, the stamp that came between the two."""
    return 0 <= stamp - before <= far and abs(stamp - last) > max(jump, stamp - before)


def _strays_ahead(run: list[tuple[int, int]], stamp: int, far: int) -> list[int]:
    """The last packets of a run if they alone jumped far ahead, and ``stamp`` goes on with those before them."""
    for count in range(1, min(_STRAYS, len(run) - 1) + 1):
        before = run[-count - 1][1]
        if before <= stamp:
            return [k for k, _ in run[-count:]] if run[-count][1] - before > far and stamp - before <= far else []
    return []


def usual_step(stamps: Sequence[int], time_base: Fraction, least: int) -> float | None:
    """Median of those distances of ascending stamps that are above ``least`` units, in seconds; None without any."""
    steps = [step for step in map(operator.sub, stamps[1:], stamps) if step > least]
    return float(statistics.median(steps) * time_base) if steps else None


def least_distance(time_base: Fraction, fps: float) -> int:
    """Frames no more apart than so many units of ``time_base`` count as shown at the same time: 0, or 1 where possible.

    FFmpeg moves a stamp that repeats the one before it by one unit.
    """
    return 1 if 15 * time_base < min(1 / fps, 1.0) else 0


def fill_in(seconds: list[float | None], step: float, least: float) -> list[float]:
    """Give frames without a time of their own one: evenly between their neighbours, or ``step`` apart at the ends.

    A frame no more than ``least`` seconds behind the one before it counts as one without a time of its own. Returns
    ascending times.
    """
    latest = -math.inf
    known: list[int] = []
    for i, value in enumerate(seconds):
        if value is not None and value > latest + least:
            known.append(i)
            latest = value
    if not known:
        return [i * step for i in range(len(seconds))]
    filled = [0.0] * len(seconds)
    for i in known:
        filled[i] = float(seconds[i])  # type: ignore[arg-type]
    first, last = known[0], known[-1]
    for i in range(first):
        filled[i] = filled[first] - (first - i) * step
    for a, b in zip(known, known[1:], strict=False):
        for i in range(a + 1, b):
            filled[i] = filled[a] + (filled[b] - filled[a]) * (i - a) / (b - a)
    for i in range(last + 1, len(seconds)):
        filled[i] = filled[last] + (i - last) * step
    return filled


def shown_at_rate(seconds: list[float], duration: float, fps: float) -> list[int]:
    """Numbers of the frames shown in the middle of each 1/fps seconds after the first frame's begin, each once.

    A video of less than half of 1/fps seconds is represented by the frame in its middle.

    Args:
        seconds: when each frame is shown, strictly ascending.
        duration: seconds from the first frame's begin to the last one's end.
        fps: frames per second, above 0.
    """
    begin, end = seconds[0], max(duration, seconds[-1] - seconds[0])
    shortest = min((b - a for a, b in zip(seconds, seconds[1:], strict=False)), default=end)
    fps = min(fps, 1e12)
    if shortest * fps >= 2:  # between any two frames lies a middle
        return list(range(len(seconds)))
    ticks = int(end * fps + 0.5)
    if ticks == 0:
        return [max(0, bisect.bisect_right(seconds, begin + end / 2) - 1)]
    numbers, tick = [], 0
    while tick < ticks:
        number = max(0, bisect.bisect_right(seconds, begin + (tick + 0.5) / fps + _ROUNDING) - 1)
        numbers.append(number)
        tick += 1
        if number + 1 < len(seconds):  # on to about the next frame's first middle, without a step for each between
            tick = max(tick, math.floor((seconds[number + 1] - begin) * fps - 0.5))
        else:
            break
    return sorted(set(numbers))
