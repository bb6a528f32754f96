"""Limits on the work that one request, and all together, can cause."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from bt_adapter.data import VideoError

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    body: bytes of a request's body. bodies: bytes of all bodies that are read at one time. media: bytes of one still
    or video. pixels: of one frame or still. frames: of one video. visuals: stills and videos of one request.
    seconds: decoding time of one still or video. upload: seconds in which a body must have come. waiting: requests
    that are being answered or wait at one time. live_sessions: open live sessions. live_bytes: bytes of all their
    windows. live_idle: seconds after which an idle one is closed.
    """

    body: int = 64 * MEBIBYTE
    bodies: int = 512 * MEBIBYTE
    media: int = 64 * MEBIBYTE
    pixels: int = 4096 * 2176
    frames: int = 128
    visuals: int = 16
    seconds: float = 30.0
    upload: float = 60.0
    waiting: int = 64
    live_sessions: int = 8
    live_bytes: int = 1024 * MEBIBYTE
    live_idle: float = 60.0


@dataclass
class DecodingTime:
    """The time limit of one decoding, and a flag that ends it early.

    Call :meth:`check` often while decoding. The time counts from the first call, not while the work waits for its turn.
    """

    seconds: float
    cancelled: threading.Event = field(default_factory=threading.Event)
    _end: float | None = None

    def check(self) -> None:
        """Raise VideoError if the time is over or the request is cancelled."""
        now = time.monotonic()
        self._end = now + self.seconds if self._end is None else self._end
        if self.cancelled.is_set():
            raise VideoError("the request was cancelled")
        if now > self._end:
            raise VideoError(f"decoding takes longer than the limit of {self.seconds:g} seconds")
