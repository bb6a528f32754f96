"""Frames of a video of any length, a chunk at a time: no more than a chunk is ever held."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bt_adapter.progress import Progress

from ._decode import Index, PathLike, Source, Span, Taken, VideoError, _decode, scan, take_by_seeking
from .sampling import check_count, sample_indices

_ALL: Span = (-math.inf, math.inf)
# Decoding a frame wanted costs about half a group of pictures; jumping pays where that is well below decoding all.
_WORTH_JUMPING = 2


class FrameStream:
    """Chosen frames of a video file, decoded as they are asked for.

    With ``frames``: so many, evenly spread, the same ones as ``read_video(path, frames)``. With ``fps``: the frame
    shown in the middle of each 1/fps seconds, each frame at most once. With neither: all.

    Files whose packets do not tell the number of their frames, or that are cut short, are decoded once more to count.

    Args:
        path: a local file, its bytes, or a binary file object.
        frames: number of frames T.
        fps: frames per second.
        repeat: of a video with fewer than ``frames`` frames, repeat frames instead of raising.
        chunk: frames that are held at once.

    Attributes:
        numbers: place of each frame among all frames of the file, ascending; ``len(stream)`` is T.
        total: frames in the file. duration: seconds. fps: the file's average.
        truncated: part of the file is missing or damaged (known for sure after the last frame was read).
        progress: called with frames done and in all; may be set at any time.

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
    ) -> None:
        if frames is not None and fps is not None:
            raise ValueError(f"only one of frames and fps may be given, but frames is {frames} and fps is {fps}")
        check_count("chunk", chunk)
        self._source, self._chunk = Source.of(path), chunk
        self.progress: Progress | None = None
        if frames is not None:
            check_count(f"{self.path}: frames", frames, VideoError)
        if fps is not None and not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"fps must be a number above 0, but is {fps!r}")
        self._index = scan(self._source)
        self.truncated = self._index.truncated
        if self._index.exact and not self.truncated:
            seconds = [self._index.seconds(pts) for pts in self._index.times]
        else:
            seconds = self._count()
        self.total, self.duration, self.fps = len(seconds), self._index.duration, self._index.fps
        if not seconds:
            raise VideoError(f"{self.path}: no frame can be decoded")
        if frames is None:
            self.numbers = list(range(self.total)) if fps is None else _at_rate(seconds, fps, self._index)
        elif self.total < frames and not repeat:
            raise VideoError(
                f"{self.path}: {frames} frames were asked for, but there are only {self.total}; ask for fewer, or let "
                "frames repeat (repeat=True)"
            )
        else:
            self.numbers = sample_indices(self.total, frames, "middle").tolist()

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
        done = 0
        if self._index.exact and self._pays_to_jump():
            for start in range(0, len(self.numbers), self._chunk):
                piece = self.numbers[start : start + self._chunk]
                taken = take_by_seeking(self._source, self._index, _ALL, sorted(set(piece)), self.total, None, True)
                if taken is None:  # the file is otherwise than its index says: the rest in sequence
                    break
                yield _frames(taken, piece)
                done = start + len(piece)
                self._tell(done)
        if done < len(self.numbers):
            yield from self._in_sequence(done)

    def _in_sequence(self, done: int) -> Iterator[Tensor]:
        """The frames from the ``done``-th on, by decoding from the first."""
        taken, damage = Taken(self._chunk), Taken(0)
        with self._source.open() as container:
            for number, frame in enumerate(_decode(self._source, container, damage)):
                damage.damaged |= frame.is_corrupt
                while done < len(self.numbers) and self.numbers[done] == number:
                    taken.keep(frame, 0.0, number)
                    done += 1
                    if len(taken.numbers) == self._chunk:
                        yield _frames(taken, taken.numbers)
                        taken = Taken(self._chunk)  # a fresh array: what was handed out is the caller's
                        self._tell(done)
                if done == len(self.numbers):
                    break
        self.truncated |= damage.damaged or done < len(self.numbers)
        if done == 0:
            raise VideoError(f"{self.path}: no frame can be decoded")
        if taken.numbers:
            yield _frames(taken, taken.numbers)
            self._tell(done)

    def _count(self) -> list[float]:
        """When each frame that can be decoded is shown, in seconds."""
        seconds, taken = [], Taken(0)
        with self._source.open() as container:
            for number, frame in enumerate(_decode(self._source, container, taken)):
                if self._index.times and frame.pts is not None:
                    seconds.append(self._index.seconds(frame.pts))
                else:
                    seconds.append(number / self._index.fps)
        self.truncated |= taken.damaged
        return seconds

    def _pays_to_jump(self) -> bool:
        """Whether fetching each frame from the key frame before it costs less than decoding all up to the last."""
        between = self.total / len(self._index.keys)  # frames in a group of pictures
        return len(set(self.numbers)) * (between / 2 + 16) * _WORTH_JUMPING < self.numbers[-1]

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.numbers))


def _at_rate(seconds: list[float], fps: float, index: Index) -> list[int]:
    """Numbers of the frames shown at (k + ½)/fps seconds after the first, each once."""
    # the last frame's end: a frame's usual length after its begin, or what the packets say
    end = max(index.duration, seconds[-1] - seconds[0])
    ticks = max(1, int(end * fps + 0.5))
    shown = (bisect.bisect_right(seconds, seconds[0] + (k + 0.5) / fps) - 1 for k in range(ticks))
    return sorted({max(number, 0) for number in shown})


def _frames(taken: Taken, numbers: list[int]) -> Tensor:
    """``[t, 3, H, W]``, channels last in memory; a number may stand several times."""
    place = {number: i for i, number in enumerate(taken.numbers)}
    assert taken.pixels is not None  # `taken` holds a frame
    pixels = torch.from_numpy(taken.pixels[: len(taken.numbers)])
    if len(taken.numbers) < len(numbers):
        pixels = pixels[[place[number] for number in numbers]]
    return pixels.permute(0, 3, 1, 2)
