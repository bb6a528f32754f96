"""The thread that runs the model: it encodes visuals and answers the prompts that wait at one moment in one batch."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bt_adapter.chat.conversation import Visual
from bt_adapter.serve.errors import ApiError, stopping
from bt_adapter.serve.joining import OpenBatch, Prompt, can_join
from bt_adapter.serve.metrics import Metrics
from bt_adapter.serve.rows import Decoding, Finish, Row, end_tokens, generate_rows

T = TypeVar("T")
_PATIENCE = 0.1  # share of an answer's time that prompts wait for others to come
_TOKENS = 8  # of a running batch between two stops for others, which cost a little each
_LOG = logging.getLogger("bt_adapter.serve")


@dataclass(frozen=True)
class Ended:
    """The end of an answer: why, the number of its tokens, and seconds to the first token and in total."""

    finish: Finish
    tokens: int
    first: float
    seconds: float


@dataclass
class Answering:
    """A prompt that waits for its answer or is being answered.

    Iterate over it for the pieces of text and, last, `Ended`. ids, visuals: as for ``answer_batch``. cancelled: ends
    the answer when set. ended: whether the last piece was passed on.
    """

    ids: list[int]
    visuals: Sequence[Visual]
    decoding: Decoding
    cancelled: threading.Event = field(default_factory=threading.Event)
    begin: float = field(default_factory=time.perf_counter)
    ended: bool = False
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _pieces: asyncio.Queue[str | Ended | ApiError] = field(default_factory=asyncio.Queue)

    def tell(self, piece: str | Ended | ApiError) -> None:
        """Pass a piece of text, the end or an error on; called in the model's thread."""
        try:
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)
        except RuntimeError:  # the server has stopped
            self.cancelled.set()

    def end(self, row: Row) -> None:
        """Pass the end on; one that the client did not cause is an error, lest it takes the answer for complete."""
        now = time.perf_counter()
        assert row.finish is not None
        if row.finish == "cancelled":
            self.tell(stopping())
            return
        self.tell(Ended(row.finish, row.tokens, (row.first or now) - self.begin, now - self.begin))

    async def __aiter__(self) -> AsyncIterator[str | Ended]:
        """Yield the pieces and the end; leaving early cancels the answer. Raises ApiError if the model fails."""
        try:
            while True:
                piece = await self._pieces.get()
                self.ended = not isinstance(piece, str)
                if isinstance(piece, ApiError):
                    raise piece
                yield piece
                if self.ended:
                    return
        finally:
            self.cancelled.set()


class ModelThread:
    """Runs all of a model's work in one thread, in batches.

    Work that encodes is done first, so that the answers it leads to are in the same batch, unless prompts have waited
    for it. Between the tokens of a batch, work that came meanwhile is done and prompts join, as far as there is room.

    Args:
        model: a video chat model. tokenizer: its tokenizer. batch_size: most prompts answered at once.
        metrics: counts batches and tokens. expected: returns the number of requests that are being prepared or wait.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, metrics: Metrics, expected: Callable[[], int]
    ) -> None:
        self.model, self.tokenizer, self.batch_size, self.metrics = model, tokenizer, batch_size, metrics
        self.expected = expected
        self._ends, self._joins = end_tokens(model), can_join(model)
        self._work: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._waiting: deque[Answering] = deque()
        self._running: list[Answering] = []
        self._changed, self._stopped = threading.Condition(), False
        self.seconds = 1.0  # of an answer, a running mean
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Run a function in the model's thread, before the next batch of answers."""
        future: Future[T] = Future()
        with self._changed:
            if self._stopped:
                future.set_exception(stopping())
                return future
            self._work.append((work, future))
            self._changed.notify()
        return future

    def answer(self, answering: Answering) -> None:
        """Add a prompt to those that wait."""
        with self._changed:
            if self._stopped:
                answering.tell(stopping())
                return
            self._waiting.append(answering)
            self._changed.notify()

    def stop(self) -> None:
        """End the answers in progress at their next token and refuse all others, with an error each."""
        with self._changed:
            self._stopped = True
            for answering in self._running:
                answering.cancelled.set()
            self._changed.notify()

    def close(self) -> None:
        """Stop, and wait for the thread a few seconds."""
        self.stop()
        self._thread.join(5.0)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Number of prompts that wait for a batch."""
        return len(self._waiting)

    @torch.no_grad()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._work or self._waiting)
                if self._stopped:
                    break
            self._do_work()
            if batch := self._take_batch():
                self._answer(batch)
                self._running.clear()
        for answering in self._waiting:
            answering.tell(stopping())
        for _, future in self._work:
            if future.set_running_or_notify_cancel():
                future.set_exception(stopping())

    def _do_work(self) -> None:
        with self._changed:
            work, self._work = self._work, deque()
        for task, future in work:
            _do(task, future)

    def _take(self, most: int) -> list[Answering]:
        """Take so many of the prompts that wait; those that were cancelled go."""
        with self._changed:
            taken = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
            taken = [answering for answering in taken if not answering.cancelled.is_set()]
            self._running += taken
            if self._stopped:  # between the look at it and here
                for answering in taken:
                    answering.cancelled.set()
        return taken

    def _take_batch(self) -> list[Answering]:
        """Take the prompts of the next batch; none if there are none yet, or work that leads to more of them.

        A batch that is not full waits a small part of an answer's time for requests that are being prepared.
        """
        with self._changed:
            if not self._waiting:
                return []
            end = self._waiting[0].begin + _PATIENCE * self.seconds
            while len(self._waiting) < min(self.batch_size, self.expected()) and not self._stopped:
                if (left := end - time.perf_counter()) <= 0:
                    break
                if self._work:
                    return []
                self._changed.wait(left)
        return self._take(self.batch_size)

    def _answer(self, batch: list[Answering]) -> None:
        """Generate the answers to prompts, and to those that come meanwhile if they can join."""
        answered = [(one, self._row(one)) for one in batch]
        self.metrics.batch_size.observe(len(batch))
        with _told_of_failure(answered):
            prompts, rows = _split(answered)
            if not self._joins:
                generate_rows(self.model, self.tokenizer, prompts, rows)
                return
            running = OpenBatch(self.model, self.tokenizer, prompts, rows)
            while running.run(self._stops(running)):
                self._do_work()
                more = self._take(self.batch_size - len(running.rows))
                if more and (begun := self._begin(more)):
                    further, others = begun
                    answered += further
                    running.add(others)
                    self.metrics.batch_size.observe(len(running.rows))

    def _begin(self, more: list[Answering]) -> tuple[list[tuple[Answering, Row]], OpenBatch] | None:
        """Generate the first token of further answers; None if it ends them all, or fails, which concerns no other."""
        answered = [(one, self._row(one)) for one in more]
        with _told_of_failure(answered):
            batch = OpenBatch(self.model, self.tokenizer, *_split(answered))
            if batch.run(lambda: True):
                return answered, batch
        return None

    def _stops(self, running: OpenBatch) -> Callable[[], bool]:
        """Make a function that tells after each token whether the batch is to stop for work or prompts that wait."""
        tokens = 0

        def stops() -> bool:
            nonlocal tokens
            tokens += 1
            if tokens < _TOKENS or self._stopped:
                return False
            free = sum(row.finish is None for row in running.rows) < self.batch_size
            return bool(self._work) or (bool(self._waiting) and free)

        return stops

    def _row(self, one: Answering) -> Row:
        begin = time.perf_counter()

        def end(row: Row) -> None:
            now = time.perf_counter()
            self.seconds = 0.8 * self.seconds + 0.2 * (now - begin)
            self.metrics.count_answer(len(one.ids), row.tokens, (row.first or now) - one.begin)
            one.end(row)

        return Row(self.tokenizer, self._ends, one.decoding, one.tell, end, one.cancelled)


def _split(answered: Sequence[tuple[Answering, Row]]) -> tuple[list[Prompt], list[Row]]:
    """Return the prompts and the rows of answers."""
    return [(one.ids, one.visuals) for one, _ in answered], [row for _, row in answered]


@contextmanager
def _told_of_failure(answered: Sequence[tuple[Answering, Row]]) -> Iterator[None]:
    """End the answers that have no end with an error if generating them raises one, which is logged."""
    try:
        yield
    except Exception:
        _LOG.exception("a batch of %d answers failed", len(answered))
        for one, row in answered:
            if row.finish is None:
                one.tell(ApiError(500, "the model failed to answer"))


def _do(task: Callable[[], Any], future: Future[Any]) -> None:
    """Run a task and give its result or error to the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(task())
    except BaseException as error:
        future.set_exception(error)
