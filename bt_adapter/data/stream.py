"""Reads the frames of a video of any length in chunks, with only one chunk in memory."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import av
import torch
from torch import Tensor

from bt_adapter.data._decode import Taken, bounded_size, decode_all, take_by_seeking, take_in_sequence
from bt_adapter.data._index import scan
from bt_adapter.data._source import PathLike, Source, VideoError
from bt_adapter.data._times import read_span, shown_at_rate
from bt_adapter.data.sampling import check_count, check_positive, sample_indices
from bt_adapter.progress import Progress

# A sought frame costs about half a group of pictures; seeking must be this many times cheaper than decoding all.
_SEEK_ADVANTAGE = 2
_CHUNK_BYTES = 1 << 28  # most bytes of a chunk, so that chunks of huge frames hold fewer frames


class FrameStream:
    """Selected frames of a video file, decoded on demand.

    With ``frames``: that many, evenly spread, the same as ``read_video(path, frames)``. With ``fps``: the frame shown
    at the middle of each interval of 1/fps seconds, each frame at most once (for a video shorter than half an interval,
    the frame in its middle). With neither: all.

    Files whose packets do not give an exact frame count, and truncated files, are decoded an extra time to count.
    :class:`Video` describes the frames.

    Args:
        path: a local file, its bytes, or a binary file object.
        frames: number of frames T.
        fps: frames per second.
        repeat: if the video has fewer than ``frames`` frames, repeat frames instead of raising.
        chunk: most frames per chunk; fewer if ``chunk`` frames exceed 256 MiB.
        side, max_pixels: as for :func:`read_video`.
        threads: decoder threads; 0: one per core.
        check: called before each packet is read or decoded. What it raises ends the reading; a VideoError is raised
            unchanged, another ValueError becomes one.
        start, end: only frames shown at ``start <= t < end``, in seconds from the start of the file.

    Attributes:
        numbers: index of each frame among all frames of the file, ascending; ``len(stream)`` is T.
        total: frames in the file, or between ``start`` and ``end``. duration: seconds. fps: average; both of the file.
        truncated: part of the file is missing or damaged (final only after the last frame was read).
        progress: called with (frames done, frames in total); may be set at any time.
        side: as given; may be set before frames are read.

    Raises:
        TypeError, ValueError: a wrong argument; both ``frames`` and ``fps`` given.
        VideoError: as :func:`read_video`.
    """

    def __init__(
        self,
        path: PathLike,
        frames: int | None = None,
        fps: float | None = None,
        repeat: bool = False,
        chunk: int = 32,
        side: int | None = None,
        max_pixels: int | None = None,
        threads: int = 0,
        check: Callable[[], object] = lambda: None,
        start: float | None = None,
        end: float | None = None,
    ) -> None:
        if frames is not None and fps is not None:
            raise ValueError(f"only one of frames and fps may be given, but frames is {frames} and fps is {fps}")
        check_count("chunk", chunk)
        for label, value in (("side", side), ("max_pixels", max_pixels)):
            if value is not None:
                check_count(label, value)
        self._source, self._most = Source.of(path, threads, max_pixels, check), chunk
        self.side = side
        self.progress: Progress | None = None
        if frames is not None:
            check_count(f"{self.path}: frames", frames, VideoError)
        if fps is not None:
            check_positive("fps", fps)
        span = read_span(self.path, start, end)
        self._index = scan(self._source)
        self.truncated = self._index.truncated
        order = self._index.order if self._index.exact else self._decoded_order()
        seconds = self._index.times(order)
        self._in_file, self.fps = len(seconds), self._index.fps
        self.duration = self._index.duration(order, seconds)
        first, stop = (bisect.bisect_left(seconds, moment) for moment in span)
        self.total = stop - first
        if not self.total:
            where = "" if start is None and end is None else f" between start={start} and end={end} seconds"
            raise VideoError(f"{self.path}: no frame can be decoded{where}")
        if fps is not None:
            rest = self.duration - (seconds[first] - seconds[0])
            length = rest if stop == len(seconds) else seconds[stop] - seconds[first]
            chosen = shown_at_rate(seconds[first:stop], length, fps)
        elif frames is None:
            chosen = list(range(self.total))
        elif self.total < frames and not repeat:
            raise VideoError(
                f"{self.path}: {frames} frames were requested, but there are only {self.total}; request fewer, or pass "
                "repeat=True to repeat frames"
            )
        else:
            chosen = sample_indices(self.total, frames, "middle").tolist()
        self.numbers = [first + number for number in chosen]
        self._chunk = chunk
        self._size: tuple[int, int] | None = None  # of all frames; None before the first is read

    @property
    def path(self) -> str:
        """The file's name."""
        return self._source.name

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield chunks uint8 ``[t, 3, H, W]``, t ≤ ``chunk``; a truncated file gives fewer frames than ``len``.

        Raises VideoError if no frame can be decoded.
        """
        height, width = bounded_size(*self._index.size, self.side)
        self._chunk = min(self._most, max(1, _CHUNK_BYTES // (3 * height * width or 1)))
        done = 0
        if self._index.exact and self._is_seeking_cheaper():
            for start in range(0, len(self.numbers), self._chunk):
                piece = self.numbers[start : start + self._chunk]
                wanted = sorted(set(piece))
                taken = self._room(len(wanted))
                if not take_by_seeking(self._source, self._index, wanted, taken, None, True):
                    break  # the file contradicts its index: decode the rest in sequence
                yield self._frames(taken, piece)
                done = start + len(piece)
                self._report_progress(done)
        if done < len(self.numbers):
            yield from self._in_sequence(done)

    def _in_sequence(self, done: int) -> Iterator[Tensor]:
        """Yield the frames from index ``done`` on, by decoding from the start of the file."""
        noted = Taken(self.path, 0)
        piece, taken = self.numbers[done : done + self._chunk], None
        before: av.VideoFrame | None = None
        with self._source.open() as container:
            for number, frame in self._numbered(container, noted):
                while piece:
                    # The previous frame replaces frames that cannot be decoded, as players do.
                    behind = -1 if taken is None or not taken.numbers else taken.numbers[-1]
                    for wanted in (w for w in sorted(set(piece)) if behind < w <= number):
                        taken = taken or self._room(len(set(piece)))
                        taken.keep(frame if wanted == number or before is None else before, wanted)
                    if number < piece[-1]:
                        break
                    assert taken is not None
                    yield self._frames(taken, piece)
                    done += len(piece)
                    self._report_progress(done)
                    # a new array: the yielded one belongs to the caller
                    piece, taken = self.numbers[done : done + self._chunk], None
                if not piece:
                    break
                before = frame
        self.truncated |= noted.damaged or done < len(self.numbers)
        if taken is not None:
            found = [number for number in piece if number in set(taken.numbers)]
            yield self._frames(taken, found)
            done += len(found)
            self._report_progress(done)
        if done == 0:
            raise VideoError(f"{self.path}: no frame can be decoded")

    def _numbered(self, container: av.container.InputContainer, noted: Taken) -> Iterator[tuple[int, av.VideoFrame]]:
        """Yield frames with ascending indices; the decoder may drop frames that only their packets were counted for."""
        order, checked = self._index.order, not self._index.exact
        places: dict[int, int] = {}
        number = -1
        for frame in decode_all(self._source, self._index, container, noted):
            number, packet = number + 1, noted.order.pop()
            if not checked and number < len(order) and packet is not None and packet != order[number]:
                checked = True
                if len(self._decoded_order()) < len(order):  # else the time stamps give another frame order
                    self.truncated = True
                    places = {packet: place for place, packet in enumerate(order)}
            if packet is not None:
                number = max(number, places.get(packet, number))
            yield number, frame

    def _decoded_order(self) -> list[int | None]:
        """Return the packets of all decodable frames in presentation order, by decoding the file."""
        while True:
            self._source = replace(self._source, frame_threads=not self.truncated)
            taken = Taken(self.path, 0)
            take_in_sequence(self._source, self._index, (), taken, math.inf)
            if self.truncated or not taken.damaged:
                return taken.order
            self.truncated = True

    def _room(self, frames: int) -> Taken:
        return Taken(self.path, frames, self.side, self._size)

    def _frames(self, taken: Taken, numbers: list[int]) -> Tensor:
        """Return the frames of ``numbers``, ``[t, 3, H, W]``, channels last in memory; numbers may repeat."""
        assert taken.pixels is not None  # `taken` holds a frame
        self._size = taken.size
        pixels = torch.from_numpy(taken.pixels[: len(taken.numbers)])
        if len(taken.numbers) < len(numbers):
            place = {number: i for i, number in enumerate(taken.numbers)}
            pixels = pixels[[place[number] for number in numbers]]
        return pixels.permute(0, 3, 1, 2)

    def _is_seeking_cheaper(self) -> bool:
        """Tell whether seeking each frame from its keyframe costs less than decoding all frames up to the last."""
        group = self._in_file / len(self._index.keys)  # frames in a group of pictures
        return len(set(self.numbers)) * (group / 2 + 16) * _SEEK_ADVANTAGE < self.numbers[-1]

    def _report_progress(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.numbers))
