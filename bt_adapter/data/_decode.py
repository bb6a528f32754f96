"""Passes over a video file that decode it: all its frames, or those wanted, in sequence or by seeking."""

from __future__ import annotations

import bisect
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
import numpy as np
from av.error import FFmpegError

from bt_adapter.progress import Progress

from ._index import Index
from ._source import Source, VideoError
from .orientation import OrientationReader

# A seek empties the decoder's pipeline, which costs about as much as decoding this many frames.
_SEEK_COST = 16
# Frames whose short side is more than so many times the side they are wanted for are scaled down while they are
# decoded, to _KEPT times that side. A training crop of 8 % of the area has 0.28 of a side, and needs 3.5 times.
_TOO_LARGE = 6
_KEPT = 4


@dataclass
class Taken:
    """Frames kept from one pass over a video.

    Attributes:
        name: the video's, for messages.
        capacity: frames that there is to be room for.
        side: the side in pixels that frames will be resized to, if that is known.
        size: height and width of all frames, upright; None: those of the first one.
        pixels: uint8 [capacity, H, W, 3].
        numbers: place of each frame among all frames of the file.
        order: packet of each frame that was decoded, in order of presentation; None where that is not known.
        damaged: something could not be decoded.
        orientations: reads how frames are turned or mirrored.
    """

    name: str
    capacity: int
    side: int | None = None
    size: tuple[int, int] | None = None
    pixels: np.ndarray | None = None
    numbers: list[int] = field(default_factory=list)
    order: list[int | None] = field(default_factory=list)
    damaged: bool = False
    orientations: OrientationReader = field(default_factory=OrientationReader)

    def keep(self, frame: av.VideoFrame, number: int) -> None:
        """Store a frame as RGB, upright, in the size of the first one (a stream may change its size)."""
        orientation = self.orientations.read(frame)
        if self.size is None:
            upright = (frame.width, frame.height) if orientation.transposed else (frame.height, frame.width)
            self.size = bounded_size(*upright, self.side)
        if self.pixels is None:
            try:
                self.pixels = np.empty((self.capacity, *self.size, 3), np.uint8)
            except MemoryError as error:
                height, width = self.size
                raise VideoError(
                    f"{self.name}: there is too little memory for {self.capacity} frames of {width} x {height} pixels"
                ) from error
        height, width = reversed(self.size) if orientation.transposed else self.size
        smaller = height * width < frame.height * frame.width
        rgb = frame.to_ndarray(
            format="rgb24", height=height, width=width, interpolation="AREA" if smaller else "BILINEAR"
        )
        self.pixels[len(self.numbers)] = orientation.apply(rgb)
        self.numbers.append(number)


def bounded_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Height and width in which frames are handed out, of which the short side is wanted in about ``side`` pixels."""
    short = min(height, width)
    if side is None or short <= _TOO_LARGE * side:
        return height, width
    return max(1, round(height * _KEPT * side / short)), max(1, round(width * _KEPT * side / short))


def take_in_sequence(
    source: Source, index: Index, wanted: Sequence[int], taken: Taken, last: float, progress: Progress | None = None
) -> None:
    """Decode from the first frame to the one after ``last``, keeping those ``wanted`` (numbers in the file)."""
    left, steps = set(wanted), max(1, int(min(len(index.order), last + 1)))
    with source.open() as container:
        for number, frame in enumerate(decode_all(source, index, container, taken)):
            if number > last:
                break
            if number in left:
                taken.keep(frame, number)
            if progress is not None:
                progress(min(number + 1, steps), steps)


def take_by_seeking(
    source: Source, index: Index, wanted: Sequence[int], taken: Taken, progress: Progress | None, force: bool
) -> bool:
    """Decode only from the key frame before each frame wanted (ascending); `index` must be exact.

    False where that does not at least halve the work (unless `force`: decoding in sequence also finds damage),
    and where the file turns out otherwise than its index says.
    """
    steps, cost, position = [], 0, 0
    key_stamps = set(index.keys)
    place = {stamp: i + 1 for i, stamp in enumerate(index.stamps) if stamp in key_stamps}
    shown = {stamp: n for n, i in enumerate(index.order) if (stamp := index.stamps[i]) in key_stamps}
    for number in wanted:
        packet = index.order[number]
        stamp = index.stamps[packet]
        assert stamp is not None  # the index is exact
        sought = index.keys[bisect.bisect_right(index.keys, stamp) - 1]
        key = place[sought]
        going_on, jumping = max(0, packet + 1 - position), max(0, packet + 1 - key) + 1 + _SEEK_COST
        jump = jumping < going_on or (force and key > position)
        cost += jumping if jump else going_on
        position = max(packet + 1, 0 if jump else position)
        steps.append((stamp, number, sought if jump else None))
    if not force and 2 * cost > wanted[-1] + 1:
        return False

    with source.open() as container:
        stream = source.stream(container, index.stream)
        decoded = _decode(source, index, container, taken)
        latest: int | None = None
        reached = -1  # number of the latest frame, as far as frames that come can be counted
        for done, (stamp, number, target) in enumerate(steps, 1):
            if target is not None:
                container.seek(target, stream=stream)
                decoded = _decode(source, index, container, taken, until=stamp)
                latest, reached = None, shown[target] - 1
            for frame in decoded:
                if frame.pts is None or (latest is not None and frame.pts <= latest):
                    return False
                latest = frame.pts
                reached += target is None or latest >= target  # others refer to pictures before the key frame
                if frame.pts >= stamp:
                    break
            # Where stamps contradict the order in which the decoder shows frames, their count differs.
            if latest != stamp or reached != number or frame.is_corrupt or taken.damaged:
                return False
            taken.keep(frame, number)
            if progress is not None:
                progress(done, len(steps))
    return True


def decode_all(
    source: Source, index: Index, container: av.container.InputContainer, taken: Taken
) -> Iterator[av.VideoFrame]:
    """All frames that can be decoded, in order of presentation; `taken` learns their packets, and of damage."""
    for frame in _decode(source, index, container, taken, numbered=True):
        packet = frame.pts if frame.pts is not None and 0 <= frame.pts < len(index.stamps) else None
        taken.order.append(packet)
        taken.damaged |= frame.is_corrupt and packet not in index.joints
        yield frame


def _decode(
    source: Source,
    index: Index,
    container: av.container.InputContainer,
    taken: Taken,
    until: int | None = None,
    numbered: bool = False,
) -> Iterator[av.VideoFrame]:
    """All frames from here on that can be decoded, in order of presentation; damage is noted in `taken`.

    After a seek, `until` is the time sought: if the file does not go on with a key frame at or before it, the
    seek went wrong, and nothing comes. `numbered`: packets get their number as their time stamp, which decoders hand on
    with the frame that they make of a packet.
    """
    stream = source.stream(container, index.stream)
    packets, number = container.demux(stream), -1
    while True:
        packet: av.Packet | None
        try:
            packet = next(packets, None)
        except FFmpegError:  # the file breaks off here; the decoder still holds good frames
            taken.damaged, packet = True, None
        if packet is not None:
            if packet.size == 0:  # no frame; to the decoder it would mean the end
                continue
            number += 1
            if numbered:
                if number < index.first_key:
                    continue
                packet.pts = number
            if until is not None:
                if not packet.is_keyframe or packet.pts is None or packet.pts > until:
                    return
                until = None
        try:
            decoded = stream.decode(packet)
        except FFmpegError as error:
            if error.errno == errno.ENOMEM:
                raise
            taken.damaged, decoded = True, []
        yield from decoded
        if packet is None:
            return
