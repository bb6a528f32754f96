"""Bytes of bodies and media that requests hold at one time, within one limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bt_adapter.serve.errors import ApiError


class HeldBytes:
    """Counts bytes that requests hold; used within one event loop.

    Args:
        most: limit. busy: makes the error of a request that would exceed it.
    """

    def __init__(self, most: int, busy: Callable[[str], ApiError]) -> None:
        self.most, self.busy, self.size = most, busy, 0

    @contextmanager
    def account(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts further bytes, which are released at the end; it raises ApiError (429)."""
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self.size + size > self.most:
                raise self.busy("too many large requests at once")
            held += size
            self.size += size

        try:
            yield hold
        finally:
            self.size -= held
