"""Computes when frames are shown from time stamps that may be missing, repeated, wrong or restarted."""

from __future__ import annotations

import bisect
import math
import operator
import statistics
from collections.abc import Sequence
from fractions import Fraction

from bt_adapter.data._source import VideoError

FAR = 10  # seconds; in containers with clock restarts, a larger step between frames is a restart
_JITTER = 1  # seconds; in other containers, frames may be out of order by this much
_ROUNDING = 1e-6  # seconds; tolerance for float sums where a frame begins exactly at the middle of a tick
_STRAYS = 8  # longest run of consecutive wrong stamps between correct ones


def split_clock(stamps: Sequence[int | None], time_base: Fraction, restarts: bool) -> tuple[list[int], list[bool]]:
    """Find the restarts of a stream's clock, which occur where files were joined.

    Args:
        stamps: decoding times of the packets in file order, in units of ``time_base``.
        time_base: unit of the stamps, in seconds.
        restarts: the container allows clock restarts (MPEG-TS and MPEG-PS do, anywhere and in either direction).

    Returns:
        For each packet the number of its part, from 0, ascending; and whether its stamp is wrong: one of a few
        consecutive stamps far from those before and after them, which continue each other.
    """
    far = math.ceil(FAR / time_base)
    jump = math.ceil(_JITTER / time_base)
    back = 0 if restarts else jump
    part, wrong = [0] * len(stamps), [False] * len(stamps)
    known = [stamp for stamp in stamps if stamp is not None]
    steps = list(map(operator.sub, known[1:], known))
    if not steps or (min(steps) >= 0 and not (restarts and max(steps) > far)):
        return part, wrong
    runs: list[list[tuple[int, int]]] = [[]]  # for each part, its packets and their stamps
    for i, stamp in enumerate(stamps):
        run = runs[-1]
        if stamp is not None and run:
            last = run[-1][1]
            strays: list[int] = []
            if len(runs) > 1 and len(run) <= _STRAYS and _continues(runs[-2][-1][1], last, stamp, jump, far):
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


def _continues(before: int, last: int, stamp: int, jump: int, far: int) -> bool:
    """Tell whether a stamp follows closely on ``before`` and is far from ``last``, the stamp between the two."""
    return 0 <= stamp - before <= far and abs(stamp - last) > max(jump, stamp - before)


def _strays_ahead(run: list[tuple[int, int]], stamp: int, far: int) -> list[int]:
    """Return the last packets of a run if only they jumped far ahead and ``stamp`` continues those before them."""
    for count in range(1, min(_STRAYS, len(run) - 1) + 1):
        before = run[-count - 1][1]
        if before <= stamp:
            return [k for k, _ in run[-count:]] if run[-count][1] - before > far and stamp - before <= far else []
    return []


def usual_step(stamps: Sequence[int], time_base: Fraction, least: int) -> float | None:
    """Return the median distance of ascending stamps in seconds, of distances above ``least`` units; None if none."""
    steps = [step for step in map(operator.sub, stamps[1:], stamps) if step > least]
    return float(statistics.median(steps) * time_base) if steps else None


def least_distance(time_base: Fraction, fps: float) -> int:
    """Return how many units of ``time_base`` apart frames still count as simultaneous: 1 if the clock is fine, else 0.

    FFmpeg moves a stamp that repeats its predecessor by one unit.
    """
    return 1 if 15 * time_base < min(1 / fps, 1.0) else 0


def fill_in(seconds: list[float | None], step: float, least: float) -> list[float]:
    """Interpolate missing times: evenly between their neighbours, or ``step`` seconds apart at the ends.

    A time at most ``least`` seconds after its predecessor counts as missing. Returns ascending times.
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
    """Return the indices of the frames shown at the middle of each interval of 1/fps seconds, each frame once.

    Intervals start at the first frame. A video shorter than half an interval gives the frame in its middle.

    Args:
        seconds: when each frame is shown, strictly ascending.
        duration: seconds from the start of the first frame to the end of the last.
        fps: frames per second, above 0.
    """
    begin, end = seconds[0], max(duration, seconds[-1] - seconds[0])
    shortest = min((b - a for a, b in zip(seconds, seconds[1:], strict=False)), default=end)
    fps = min(fps, 1e12)
    if shortest * fps >= 2:  # there is a middle between any two frames
        return list(range(len(seconds)))
    ticks = int(end * fps + 0.5)
    if ticks == 0:
        return [max(0, bisect.bisect_right(seconds, begin + end / 2) - 1)]
    numbers, tick = [], 0
    while tick < ticks:
        number = max(0, bisect.bisect_right(seconds, begin + (tick + 0.5) / fps + _ROUNDING) - 1)
        numbers.append(number)
        tick += 1
        if number + 1 < len(seconds):  # skip to about the first middle in the next frame
            tick = max(tick, math.floor((seconds[number + 1] - begin) * fps - 0.5))
        else:
            break
    return sorted(set(numbers))


def read_span(name: str, start: float | None, end: float | None) -> tuple[float, float]:
    """Return the seconds ``start`` and ``end`` of a part of a video, half-open; None: infinite.

    Raises TypeError for what is no number, and VideoError for an empty part; ``name`` is the video's.
    """
    for label, value in (("start", start), ("end", end)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{label} must be a number of seconds, got {type(value).__name__} ({value!r})")
    low = -math.inf if start is None else float(start)
    high = math.inf if end is None else float(end)
    if not low < high:
        raise VideoError(f"{name}: start={start} must be before end={end} (seconds)")
    return low, high
