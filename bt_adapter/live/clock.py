"""Turn the time stamps of a live source, which jump and restart, into a time that never goes backwards."""

from __future__ import annotations

# Seconds between frames assumed before two time stamps were seen.
_STEP = 1 / 25


class StreamClock:
    """The time of a stream in seconds since its first frame, from each frame's time stamp and its arrival.

    Between frames the stream's time grows as the time stamps do. Where they go backwards, run ahead of the arrival by
    more than ``max_gap`` seconds, are missing, or begin anew after a reconnection, it grows by the time between the
    arrivals instead.

    Args:
        max_gap: seconds.

    Attributes:
        time: of the last frame. jumps: number of jumps of the time stamps.
    """

    def __init__(self, max_gap: float) -> None:
        self.max_gap, self.time, self.jumps = max_gap, 0.0, 0
        self._stamp: float | None = None  # of the last frame
        self._arrival: float | None = None
        self._step = _STEP  # last regular step of the time stamps
        self._is_first = True

    def restart(self) -> None:
        """Expect time stamps of another origin."""
        self._stamp = None

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
            if 0 <= step <= elapsed + self.max_gap:
                elapsed = step
                self._step = step or self._step
            else:
                self.jumps += 1
        self.time += elapsed
        self._stamp, self._arrival = stamp, arrival
        return self.time
