"""Decodes all or chosen frames of a video file, in sequence or by seeking."""

from __future__ import annotations

import bisect
import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import av
import numpy as np
from av.error import FFmpegError

from bt_adapter.data._index import Index
from bt_adapter.data._source import Source, VideoError
from bt_adapter.data.orientation import OrientationReader
from bt_adapter.progress import Progress

# A seek empties the decoder's pipeline, which costs about as much as decoding this many frames.
_SEEK_COST = 16
# Frames whose short side is more than _TOO_LARGE times the requested side are scaled down while they are decoded, to
# _KEPT times that side. A training crop of 8 % of the area has 0.28 of a side, so it needs 3.5 times the side.
_TOO_LARGE = 6
_KEPT = 4


@dataclass
class Taken:
    """Frames kept from one pass over a video.

    Attributes:
        name: the video's name, for messages.
        capacity: number of frames to allocate memory for.
        side: the side in pixels that frames will be resized to; None if unknown.
        size: height and width of all frames after rotation; None: those of the first frame.
        pixels: uint8 [capacity, H, W, 3].
        numbers: index of each kept frame among all frames of the file.
        order: packet number of each decoded frame, in presentation order; None where it is unknown.
        damaged: part of the file could not be decoded.
        orientations: reads the rotation and mirroring of frames.
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
        """Store a frame as upright RGB, resized to the first frame's size (a stream may change its size)."""
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
                    f"{self.name}: not enough memory for {self.capacity} frames of {width} x {height} pixels"
                ) from error
        height, width = reversed(self.size) if orientation.transposed else self.size
        smaller = height * width < frame.height * frame.width
        rgb = frame.to_ndarray(
            format="rgb24", height=height, width=width, interpolation="AREA" if smaller else "BILINEAR"
        )
        self.pixels[len(self.numbers)] = orientation.apply(rgb)
        self.numbers.append(number)


def bounded_size(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Return the height and width of decoded frames: reduced if the short side far exceeds ``side`` pixels."""
    short = min(height, width)
    if side is None or short <= _TOO_LARGE * side:
        return height, width
    return max(1, round(height * _KEPT * side / short)), max(1, round(width * _KEPT * side / short))


def take_in_sequence(
    source: Source, index: Index, wanted: Sequence[int], taken: Taken, last: float, progress: Progress | None = None
) -> None:
    """Decode from the first frame to the one after ``last`` and keep the frames ``wanted`` (indices in the file)."""
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
    """Decode only from the keyframe before each wanted frame (ascending); `index` must be exact.

    Returns False if seeking does not at least halve the work (unless `force`: sequential decoding also finds
    damage), or if the file contradicts its index.
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
        decode_cost, seek_cost = max(0, packet + 1 - position), max(0, packet + 1 - key) + 1 + _SEEK_COST
        seek = seek_cost < decode_cost or (force and key > position)
        cost += seek_cost if seek else decode_cost
        position = max(packet + 1, 0 if seek else position)
        steps.append((stamp, number, sought if seek else None))
    if not force and 2 * cost > wanted[-1] + 1:
        return False

    with source.open() as container:
        stream = source.stream(container, index.stream)
        decoded = _decode(source, index, container, taken)
        latest: int | None = None
        reached = -1  # number of the latest frame, counted from the last seek
        for done, (stamp, number, target) in enumerate(steps, 1):
            if target is not None:
                container.seek(target, stream=stream)
                decoded = _decode(source, index, container, taken, until=stamp)
                latest, reached = None, shown[target] - 1
            for frame in decoded:
                if frame.pts is None or (latest is not None and frame.pts <= latest):
                    return False
                latest = frame.pts
                reached += target is None or latest >= target  # earlier frames refer to pictures before the keyframe
                if frame.pts >= stamp:
                    break
            # The count differs if the time stamps contradict the decoder's presentation order.
            if latest != stamp or reached != number or frame.is_corrupt or taken.damaged:
                return False
            taken.keep(frame, number)
            if progress is not None:
                progress(done, len(steps))
    return True


def decode_all(
    source: Source, index: Index, container: av.container.InputContainer, taken: Taken
) -> Iterator[av.VideoFrame]:
    """Yield all decodable frames in presentation order; record their packets and any damage in `taken`."""
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
    """Yield all decodable frames from the current position, in presentation order; record damage in `taken`.

    After a seek, `until` is the requested time stamp: if the next packet is not a keyframe at or before it, the seek
    failed and nothing is yielded. `numbered`: each packet's number replaces its time stamp, which the decoder copies
    to the frame.
    """
    stream = source.stream(container, index.stream)
    packets, number = container.demux(stream), -1
    while True:
        packet: av.Packet | None
        source.check()
        try:
            packet = next(packets, None)
        except FFmpegError:  # the file is truncated here; the decoder still holds good frames
            taken.damaged, packet = True, None
        if packet is not None:
            if packet.size == 0:  # no frame; the decoder would take it for the end of the stream
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
