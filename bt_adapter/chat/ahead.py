"""Background threads that decode the next videos while the model encodes and answers the current ones."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from bt_adapter.data import VideoError
from bt_adapter.data.patience import read_patiently
from bt_adapter.errors import CommandError

if TYPE_CHECKING:
    from bt_adapter.data.stream import FrameStream

_CHUNKS = 2  # decoded chunks queued per video
_POLL = 0.05  # seconds between two checks for cancellation by a thread that waits


class _Cancelled(CommandError):
    """Signals that the consumer closed the video before all frames were read."""


@dataclass(frozen=True)
class PreparedVideo:
    """A video whose chosen frames are all decoded and prepared for the model.

    It replaces a :class:`DecodedVideo` where decoding and encoding are to be apart.

    chunks: float ``[t, 3, h, w]`` each. numbers: index of each frame among all frames of the file. total: frames in the
    file. truncated: part of the file is missing or damaged. decode: seconds that decoding took.
    """

    chunks: tuple[Tensor, ...]
    numbers: tuple[int, ...]
    total: int
    truncated: bool = False
    decode: float = 0.0
    path: str = "<bytes>"

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.chunks)


class DecodedVideo:
    """A video file that a background thread decodes and prepares for the model.

    It replaces a ``FrameStream``, but its chunks are already prepared. At most two chunks are queued. Reading a length
    or count waits until the file is open and raises the error of opening it.

    Args:
        path: video file.
        open_video: opens the file with a choice of frames, see ``Sampling.open``.
        prepare: converts a chunk uint8 ``[t, 3, H, W]`` into the tensor that iteration yields.
    """

    def __init__(
        self, path: Path, open_video: Callable[[Path], FrameStream], prepare: Callable[[Tensor], Tensor]
    ) -> None:
        self.path, self.open_video, self.prepare = path, open_video, prepare
        self.progress = None  # assigned by `watch`; not reported here
        self._stop, self._opened = threading.Event(), threading.Event()
        self._chunks: queue.Queue[Tensor | Exception | None] = queue.Queue(_CHUNKS)
        self._delivered = 0
        self._stream: FrameStream | None = None
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"decoding {path}", daemon=True)
        self.thread.start()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the prepared chunks. Raises VideoError for a broken file, StorageError if it cannot be reached."""
        while (item := self._chunks.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item

    def close(self) -> None:
        """Ask the thread to stop; the remaining frames are dropped."""
        self._stop.set()

    @property
    def total(self) -> int:
        """Number of frames in the file."""
        return self._open.total

    @property
    def truncated(self) -> bool:
        """Whether part of the file is missing or damaged; final after the last chunk."""
        return self._open.truncated

    @property
    def _open(self) -> FrameStream:
        self._opened.wait()
        if self._stream is None:
            assert self._error is not None
            raise self._error
        return self._stream

    def _run(self) -> None:
        end: Exception | None = None
        try:
            read_patiently(self.path, self._decode)
        except VideoError as error:  # without its traceback, which would keep the decoder
            end = self._error = VideoError(str(error))
        except Exception as error:  # raised again in the thread that iterates
            end = self._error = error
        self._opened.set()
        try:
            self._put(end)
        except _Cancelled:
            pass

    def _decode(self) -> None:
        """Queue the chunks that were not queued before; called again after a storage failure."""
        stream = self._stream = self.open_video(self.path)
        self._opened.set()
        for number, chunk in enumerate(stream):
            if number == self._delivered:
                self._put(self.prepare(chunk))
                self._delivered += 1

    def _put(self, item: Tensor | Exception | None) -> None:
        while not self._stop.is_set():
            try:
                return self._chunks.put(item, timeout=_POLL)
            except queue.Full:
                continue
        raise _Cancelled("stopped")


class DecodedAhead:
    """A pool of videos that are decoded in advance. Leaving its context stops its threads.

    open_video, prepare: see :class:`DecodedVideo`. workers: maximum number of videos decoded at a time, 1 or more.
    """

    def __init__(
        self, open_video: Callable[[Path], FrameStream], prepare: Callable[[Tensor], Tensor], workers: int
    ) -> None:
        self.open_video, self.prepare, self.workers = open_video, prepare, workers
        self._started: dict[Path, DecodedVideo] = {}
        self._threads: list[threading.Thread] = []

    def start(self, paths: Iterable[Path]) -> None:
        """Start decoding these videos in order, skipping those already started, until all workers are busy."""
        for path in paths:
            if len(self._started) >= self.workers:
                return
            if path not in self._started:
                self._started[path] = self._launch(path)

    def take(self, path: Path) -> DecodedVideo:
        """Return the video, starting to decode it if needed. A second call decodes it again."""
        return self._started.pop(path, None) or self._launch(path)

    def __enter__(self) -> DecodedAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for video in self._started.values():
            video.close()
        deadline = time.monotonic() + 5.0  # a daemon thread blocked in a read is left behind
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _launch(self, path: Path) -> DecodedVideo:
        video = DecodedVideo(path, self.open_video, self.prepare)
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [video.thread]
        return video
