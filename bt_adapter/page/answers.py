"""Answers of several columns at the same time, piece by piece, by the service of the API."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from bt_adapter.serve.batching import Answering, Ended
from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.requests import ChatRequest
from bt_adapter.serve.service import Prepared, Service

_LOG = logging.getLogger("bt_adapter.page")


@dataclass
class ColumnAnswer:
    """The answer of one column as it grows.

    prepared: the encoded visuals and the prompt; None: not yet. ended: its end; None: not yet. error: why there is no
    answer. stopped: it was stopped on the page. first: seconds from the question to the first text.
    """

    text: str = ""
    prepared: Prepared | None = None
    ended: Ended | None = None
    error: str | None = None
    stopped: bool = False
    begin: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def take(self, piece: Prepared | str | Ended) -> None:
        """Add what came next."""
        if isinstance(piece, Prepared):
            self.prepared = piece
        elif isinstance(piece, Ended):
            self.ended = piece
        else:
            self.first = self.first or time.perf_counter() - self.begin
            self.text += piece

    def finish(self, task: asyncio.Task[None]) -> None:
        """Note how the task of the answer ended."""
        if task.cancelled():
            self.stopped = True
        elif isinstance(error := task.exception(), ApiError):
            self.error = error.message
        elif error is not None:
            _LOG.error("an answer on the page failed", exc_info=error)
            self.error = "the server failed to answer"

    @property
    def line(self) -> str:
        """Frames, times and tokens in one line."""
        if self.error is not None:
            return f"Not answered: {self.error}"
        parts = ["Stopped"] if self.stopped else []
        parts += [] if self.prepared is None else [_describe(self.prepared)]
        parts += [] if self.first is None else [f"first text after {self.first:.2f} s"]
        if self.ended is not None:
            seconds = time.perf_counter() - self.begin
            parts.append(f"{self.ended.tokens} tokens in {seconds:.2f} s")
        return " · ".join(part for part in parts if part) or "Reading …"


def _describe(prepared: Prepared) -> str:
    """Say what was seen of the visuals, and the seconds that it took."""
    videos = " + ".join(map(str, prepared.frames))
    stills = len(prepared.seen) - len(prepared.frames)
    parts = [f"{videos} frames"] if videos else []
    parts += [f"{stills} still{'s' if stills > 1 else ''}"] if stills else []
    new = [seen.visual for seen, cached in prepared.seen if not cached]
    if new:
        decode, encode = sum(one.decode for one in new), sum(one.encode for one in new)
        parts.append(f"read in {decode:.2f} s, encoded in {encode:.2f} s")
    elif prepared.seen:
        parts.append("encoded before")
    return ", ".join(parts)


async def answer(service: Service, request: ChatRequest) -> AsyncIterator[Prepared | str | Ended]:
    """Answer a request as the API does: the prompt, with its videos' frames to be shown, pieces of text, the end.

    Raises ApiError.
    """
    with service.admit():
        prepared = await service.prepare(request, show=True)
        yield prepared
        async for piece in stream(service, prepared.answering):
            yield piece


async def stream(service: Service, answering: Answering) -> AsyncIterator[str | Ended]:
    """Give a prompt to the model, yield its answer, and count it in the metrics. Raises ApiError."""
    service.model.answer(answering)
    try:
        async for piece in answering:
            yield piece
    finally:
        answering.cancelled.set()  # also where the answer's own iterator is not closed yet
        if not answering.ended:
            service.metrics.cancelled.inc()
        service.metrics.request_seconds.observe(time.perf_counter() - answering.begin)


async def answer_columns(
    columns: Sequence[Callable[[], AsyncIterator[Prepared | str | Ended]]], running: list[asyncio.Task[None]]
) -> AsyncIterator[list[ColumnAnswer]]:
    """Answer in several columns at the same time; yields all answers at once and after each change.

    columns: start the answer of a column each. running: is given the tasks, so that they can be cancelled; closing the
    iterator cancels them too.
    """
    answers = [ColumnAnswer() for _ in columns]
    changes: asyncio.Queue[Callable[[], None] | None] = asyncio.Queue()

    async def collect(number: int) -> None:
        async for piece in columns[number]():
            answers[number].take(piece)
            changes.put_nowait(None)

    def ended(number: int, task: asyncio.Task[None]) -> None:
        changes.put_nowait(lambda: answers[number].finish(task))

    tasks = [asyncio.create_task(collect(number)) for number in range(len(columns))]
    for number, task in enumerate(tasks):
        task.add_done_callback(lambda task, number=number: ended(number, task))  # type: ignore[misc]
    running[:] = tasks
    left = len(tasks)
    try:
        yield answers
        while left:
            for change in [await changes.get()] + [changes.get_nowait() for _ in range(changes.qsize())]:
                if change is not None:
                    change()
                    left -= 1
            yield answers
    finally:
        running.clear()
        for task in tasks:
            task.cancel()
