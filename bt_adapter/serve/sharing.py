"""Work whose result several requests wait for, and which ends when none of them waits any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass
class _Work(Generic[T]):
    task: asyncio.Task[T]
    cancelled: threading.Event
    users: int = 0


@dataclass
class SharedWork(Generic[T]):
    """Work in progress by key, within one event loop."""

    _running: dict[Hashable, _Work[T]] = field(default_factory=dict)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._running

    async def get(self, key: Hashable, start: Callable[[threading.Event], Coroutine[Any, Any, T]]) -> T:
        """Wait for the work of a key, which is started unless it is in progress.

        start: makes the work; its event is set when nobody waits for the result any more. Raises what the work raises.
        """
        work = self._running.get(key)
        if work is None:
            cancelled = threading.Event()
            work = self._running[key] = _Work(asyncio.create_task(start(cancelled)), cancelled)
        work.users += 1
        try:
            return await asyncio.shield(work.task)
        finally:
            work.users -= 1
            if work.task.done() or work.users == 0:
                if self._running.get(key) is work:
                    del self._running[key]
                if not work.task.done():
                    work.cancelled.set()
                    work.task.cancel()
