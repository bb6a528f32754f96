"""Turn the time stamps of a live source, which jump and restart, into a time that never goes backwards."""

from __future__ import annotations

import math
import sys

# Seconds between frames assumed before two time stamps were seen.
_STEP = 1 / 25
# Seconds by which time stamps must move, from any frame to a later one, to count as moving.
_MOVE = 1e-3
# Of an interval between kept frames: time stamps are rounded, so a frame this little early counts as on time.
_EARLY = 1e-3


def interval_of(seconds: float, fps: float) -> int:
    """Return the number of the interval of 1/fps seconds that a time is in, counted from time 0."""
    return math.floor(min(seconds * fps, sys.float_info.max) + _EARLY)


class StreamClock:
    """The time of a stream in seconds since its first frame, from each frame's time stamp and its arrival.

    Between frames the stream's time grows as the time stamps do, also where these run faster or slower than the wall
    clock. Where they go backwards, ahead by ``max_gap`` seconds more than the arrivals from one frame to the next, or
    move by less than 1 ms while frames arrive for ``max_gap`` seconds, where they are missing, or begin anew after a
    reconnection, it grows by the time between the arrivals instead.

    Args:
        max_gap: seconds.

    Attributes:
        time: of the last frame. jumps: number of jumps of the time stamps; time stamps that stand still are one.
    """

    def __init__(self, max_gap: float) -> None:
        self.max_gap, self.time, self.jumps = max_gap, 0.0, 0
        self._stamp: float | None = None  # of the last frame
        self._arrival: float | None = None
        self._step = _STEP  # last regular step of the time stamps
        self._is_first = True
        self._moved: tuple[float, float] | None = None  # stamp and arrival when the time stamps moved last
        self._stands_still = False

    def restart(self) -> None:
        """Expect time stamps of another origin."""
        self._stamp = self._moved = None
        self._stands_still = False

    def advance(self, stamp: float | None, arrival: float | None) -> float:
        """Return the time of the next frame.

        Args:
            stamp: its time stamp in seconds; None: it has none.
            arrival: seconds on the wall clock; None for frames that arrive at no time of their own, as those of a file
                that is read as fast as possible.
        """
        elapsed = self._step
        if arrival is not None and self._arrival is not None:
            elapsed = max(0.0, arrival - self._arrival)
        if self._is_first:
            elapsed, self._is_first = 0.0, False
        elif stamp is not None and self._stamp is not None:
            step = stamp - self._stamp
            if self._stands(stamp, arrival):
                pass
            elif 0 <= step <= elapsed + self.max_gap:
                elapsed = step
                self._step = step or self._step
            else:
                self.jumps += 1
        self.time += elapsed
        self._stamp, self._arrival = stamp, arrival
        return self.time

    def _stands(self, stamp: float, arrival: float | None) -> bool:
        """Whether the time stamps stand still, which counts as a jump when it begins."""
        if arrival is None:
            return False
        if self._moved is None or abs(stamp - self._moved[0]) >= _MOVE:
            self._moved, self._stands_still = (stamp, arrival), False
        elif not self._stands_still and arrival - self._moved[1] > self.max_gap:
            self._stands_still = True
            self.jumps += 1
        return self._stands_still
