"""Videos decoded by threads while the model works on the videos and questions before them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from torch import Tensor

from bt_adapter.data import VideoError
from bt_adapter.data.patience import read_patiently
from bt_adapter.errors import CommandError

if TYPE_CHECKING:
    from bt_adapter.chat.watch import Sampling
    from bt_adapter.data.stream import FrameStream

_CHUNKS = 2  # of frames that wait to be taken, of each video
_POLL = 0.05  # seconds after which a thread that waits looks whether it is still needed


class _NotNeeded(CommandError):
    """Nobody takes the frames any more."""


class DecodedVideo:
    """The frames of a video file as the model takes them, decoded and prepared by a thread of its own.

    It stands for a ``FrameStream`` whose chunks are prepared already; no more than two of them wait to be taken.
    Reading a length or count waits until the file is open, and raises what opening it raised.

    Args:
        path: of the file.
        sampling: which frames are taken.
        prepare: turns a chunk uint8 ``[t, 3, H, W]`` into what is handed out.
    """

    def __init__(self, path: Path, sampling: Sampling, prepare: Callable[[Tensor], Tensor]) -> None:
        self.path, self.sampling, self.prepare = path, sampling, prepare
        self.progress = None  # of interest to who watches one video
        self._stop, self._opened = threading.Event(), threading.Event()
        self._chunks: queue.Queue[Tensor | Exception | None] = queue.Queue(_CHUNKS)
        self._handed = 0
        self._stream: FrameStream | None = None
        self._error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name=f"decoding {path}", daemon=True)
        self.thread.start()

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Tensor]:
        """The prepared chunks. Raises VideoError where the file is broken, StorageError where it cannot be reached."""
        while (found := self._chunks.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found

    def close(self) -> None:
        """End the thread, as soon as it looks: the frames that are left are not needed."""
        self._stop.set()

    @property
    def total(self) -> int:
        """Frames in the file."""
        return self._open.total

    @property
    def truncated(self) -> bool:
        """Whether part of the file is missing or damaged; known for sure after the last chunk."""
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
        except Exception as error:  # whatever it is, who takes the frames is told
            end = self._error = error
        self._opened.set()
        try:
            self._hand_out(end)
        except _NotNeeded:
            pass

    def _decode(self) -> None:
        """Hand out what was not handed out yet: this is called again where storage failed on the way."""
        stream = self._stream = self.sampling.open(self.path)
        self._opened.set()
        for number, chunk in enumerate(stream):
            if number == self._handed:
                self._hand_out(self.prepare(chunk))
                self._handed += 1

    def _hand_out(self, what: Tensor | Exception | None) -> None:
        while not self._stop.is_set():
            try:
                return self._chunks.put(what, timeout=_POLL)
            except queue.Full:
                continue
        raise _NotNeeded("stopped")


class DecodedAhead:
    """Videos that are decoded before they are asked for, so many at a time. Leaving it as a context ends its threads.

    sampling, prepare: as for :class:`DecodedVideo`. workers: videos decoded ahead at a time, 1 or more.
    """

    def __init__(self, sampling: Sampling, prepare: Callable[[Tensor], Tensor], workers: int) -> None:
        self.sampling, self.prepare, self.workers = sampling, prepare, workers
        self._begun: dict[Path, DecodedVideo] = {}
        self._threads: list[threading.Thread] = []

    def begin(self, paths: Iterable[Path]) -> None:
        """Begin to decode the first of these that there are workers for, where it was not begun yet."""
        for path in paths:
            if len(self._begun) >= self.workers:
                return
            if path not in self._begun:
                self._begun[path] = self._start(path)

    def take(self, path: Path) -> DecodedVideo:
        """The video, begun before or now. It is begun anew when it is taken again."""
        return self._begun.pop(path, None) or self._start(path)

    def __enter__(self) -> DecodedAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for video in self._begun.values():
            video.close()
        deadline = time.monotonic() + 5.0  # a thread inside of a read that never ends is left to the process's end
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _start(self, path: Path) -> DecodedVideo:
        video = DecodedVideo(path, self.sampling, self.prepare)
        self._threads = [thread for thread in self._threads if thread.is_alive()] + [video.thread]
        return video
