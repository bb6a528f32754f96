"""Frames of a video of any length, a chunk at a time: no more than a chunk is ever held."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import av
import torch
from torch import Tensor

from bt_adapter.progress import Progress

from ._decode import Taken, bounded_size, decode_all, take_by_seeking, take_in_sequence
from ._index import scan
from ._source import PathLike, Source, VideoError
from ._times import shown_at_rate
from .sampling import check_count, sample_indices

# Decoding a frame wanted costs about half a group of pictures; jumping pays where that is well below decoding all.
_WORTH_JUMPING = 2
_CHUNK_BYTES = 1 << 28  # of the frames held at once, so that huge ones come fewer at a time


class FrameStream:
    """Chosen frames of a video file, decoded as they are asked for.

    With ``frames``: so many, evenly spread, the same ones as ``read_video(path, frames)``. With ``fps``: the frame
    shown in the middle of each 1/fps seconds, each frame at most once (of a video of less than half of that, the
    frame in its middle). With neither: all.

    Files whose packets do not tell the number of their frames for sure, or that are cut short, are decoded once more to
    count. Frames are as :class:`Video` describes them.

    Args:
        path: a local file, its bytes, or a binary file object.
        frames: number of frames T.
        fps: frames per second.
        repeat: of a video with fewer than ``frames`` frames, repeat frames instead of raising.
        chunk: frames that are held at once at most; fewer where ``chunk`` of them take more than 256 MiB.
        side, max_pixels: as for :func:`read_video`.

    Attributes:
        numbers: place of each frame among all frames of the file, ascending; ``len(stream)`` is T.
        total: frames in the file. duration: seconds. fps: the file's average.
        truncated: part of the file is missing or damaged (known for sure after the last frame was read).
        progress: called with frames done and in all; may be set at any time.
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
    ) -> None:
        if frames is not None and fps is not None:
            raise ValueError(f"only one of frames and fps may be given, but frames is {frames} and fps is {fps}")
        check_count("chunk", chunk)
        for label, value in (("side", side), ("max_pixels", max_pixels)):
            if value is not None:
                check_count(label, value)
        self._source, self._most = Source.of(path, max_pixels=max_pixels), chunk
        self.side = side
        self.progress: Progress | None = None
        if frames is not None:
            check_count(f"{self.path}: frames", frames, VideoError)
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a number above 0, but is {fps!r}")
        self._index = scan(self._source)
        self.truncated = self._index.truncated
        order = self._index.order if self._index.exact else self._decoded_order()
        seconds = self._index.times(order)
        self.total, self.fps = len(seconds), self._index.fps
        self.duration = self._index.duration(order, seconds)
        if not seconds:
            raise VideoError(f"{self.path}: no frame can be decoded")
        if frames is None:
            self.numbers = list(range(self.total)) if fps is None else shown_at_rate(seconds, self.duration, fps)
        elif self.total < frames and not repeat:
            raise VideoError(
                f"{self.path}: {frames} frames were asked for, but there are only {self.total}; ask for fewer, or let "
                "frames repeat (repeat=True)"
            )
        else:
            self.numbers = sample_indices(self.total, frames, "middle").tolist()
        self._chunk = chunk
        self._size: tuple[int, int] | None = None  # of all frames, once the first is there

    @property
    def path(self) -> str:
        """The file's name."""
        return self._source.name

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Tensor]:
        """Chunks uint8 ``[t, 3, H, W]``, t ≤ ``chunk``. Fewer frames than ``len`` come where the file breaks off.

        Raises VideoError when there is none.
        """
        height, width = bounded_size(*self._index.size, self.side)
        self._chunk = min(self._most, max(1, _CHUNK_BYTES // (3 * height * width or 1)))
        done = 0
        if self._index.exact and self._pays_to_jump():
            for start in range(0, len(self.numbers), self._chunk):
                piece = self.numbers[start : start + self._chunk]
                wanted = sorted(set(piece))
                taken = self._room(len(wanted))
                if not take_by_seeking(self._source, self._index, wanted, taken, None, True):
                    break  # the file is otherwise than its index says: the rest in sequence
                yield self._frames(taken, piece)
                done = start + len(piece)
                self._tell(done)
        if done < len(self.numbers):
            yield from self._in_sequence(done)

    def _in_sequence(self, done: int) -> Iterator[Tensor]:
        """The frames from the ``done``-th on, by decoding from the first."""
        noted = Taken(self.path, 0)
        piece, taken = self.numbers[done : done + self._chunk], None
        before: av.VideoFrame | None = None
        with self._source.open() as container:
            for number, frame in self._numbered(container, noted):
                while piece:
                    # Frames that cannot be decoded are represented by the one before, as a player shows it for longer.
                    behind = -1 if taken is None or not taken.numbers else taken.numbers[-1]
                    for wanted in (w for w in sorted(set(piece)) if behind < w <= number):
                        taken = taken or self._room(len(set(piece)))
                        taken.keep(frame if wanted == number or before is None else before, wanted)
                    if number < piece[-1]:
                        break
                    assert taken is not None
                    yield self._frames(taken, piece)
                    done += len(piece)
                    self._tell(done)
                    # a fresh array: what was handed out is the caller's
                    piece, taken = self.numbers[done : done + self._chunk], None
                if not piece:
                    break
                before = frame
        self.truncated |= noted.damaged or done < len(self.numbers)
        if taken is not None:
            found = [number for number in piece if number in set(taken.numbers)]
            yield self._frames(taken, found)
            done += len(found)
            self._tell(done)
        if done == 0:
            raise VideoError(f"{self.path}: no frame can be decoded")

    def _numbered(self, container: av.container.InputContainer, noted: Taken) -> Iterator[tuple[int, av.VideoFrame]]:
        """Frames with their numbers, ascending; where packets alone were counted, the decoder may withhold some."""
        order, checked = self._index.order, not self._index.exact
        places: dict[int, int] = {}
        number = -1
        for frame in decode_all(self._source, self._index, container, noted):
            number, packet = number + 1, noted.order.pop()
            if not checked and number < len(order) and packet is not None and packet != order[number]:
                checked = True
                if len(self._decoded_order()) < len(order):  # else the stamps have frames in another order
                    self.truncated = True
                    places = {packet: place for place, packet in enumerate(order)}
            if packet is not None:
                number = max(number, places.get(packet, number))
            yield number, frame

    def _decoded_order(self) -> list[int | None]:
        """The packets of all frames that can be decoded, in order of presentation."""
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
        """``[t, 3, H, W]``, channels last in memory; a number may stand several times."""
        assert taken.pixels is not None  # `taken` holds a frame
        self._size = taken.size
        pixels = torch.from_numpy(taken.pixels[: len(taken.numbers)])
        if len(taken.numbers) < len(numbers):
            place = {number: i for i, number in enumerate(taken.numbers)}
            pixels = pixels[[place[number] for number in numbers]]
        return pixels.permute(0, 3, 1, 2)

    def _pays_to_jump(self) -> bool:
        """Whether fetching each frame from the key frame before it costs less than decoding all up to the last."""
        between = self.total / len(self._index.keys)  # frames in a group of pictures
        return len(set(self.numbers)) * (between / 2 + 16) * _WORTH_JUMPING < self.numbers[-1]

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.numbers))
