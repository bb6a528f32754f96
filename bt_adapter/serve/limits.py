"""Limits on the work that one request, and all together, can cause."""

from __future__ import annotations

from dataclasses import dataclass

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    body: bytes of a request's body. bodies: bytes of all bodies, files and downloads that are held at one time. media:
    bytes of one still or video. pixels: of one frame or still. frames: of one video. visuals: stills and videos of one
    request.
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
