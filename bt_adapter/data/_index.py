"""Indexes a video by its packets: time stamps, keyframes and frame order, without decoding."""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import av
from av.error import FFmpegError
from av.stream import Disposition

from bt_adapter.data._cut import is_cut
from bt_adapter.data._source import Source
from bt_adapter.data._times import FAR, fill_in, least_distance, split_clock, usual_step

# In these containers one packet is one shown frame with its own time stamp, so frames can be counted and sought
# without decoding.
_INDEXED_CONTAINERS = ("mov", "matroska")
# Decoders of these codecs drop pictures whose reference pictures are missing; other decoders return grey ones.
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
# Containers whose clock may restart or jump where files were joined or a broadcast was cut.
_RESTARTING_CONTAINERS = ("mpegts", "mpeg")
# FFmpeg's frame rate for raw streams, which store no times.
_UNKNOWN_FPS = 25.0


@dataclass
class _Packets:
    """Packets of one stream in file order, without empty ones."""

    shown_at: list[int | None] = field(default_factory=list)  # "pts", in units of the stream's time base
    decoded_at: list[int | None] = field(default_factory=list)  # "dts"
    duration: list[int] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)  # decoded but never shown (edit list or codec)
    damaged: list[int] = field(default_factory=list)  # numbers of the packets that FFmpeg marks as corrupt
    empty: int = 0  # packets without content, which give no frame

    def add(self, packet: av.Packet, codec: str) -> None:
        if packet.is_corrupt:
            self.damaged.append(len(self.key))
        self.shown_at.append(packet.pts)
        self.decoded_at.append(packet.dts)
        self.duration.append(packet.duration or 0)
        self.key.append(packet.is_keyframe)
        self.hidden.append(packet.is_discard or (codec == "vp9" and _is_hidden_vp9(packet)))


@dataclass(frozen=True)
class Index:
    """Time stamps, keyframes and frame order of a video, read from its packets without decoding.

    A packet's number counts the non-empty packets of its stream in file order, from 0.

    Attributes:
        stream: index of the stream in its container.
        size: height and width as stored, from the header; 0 if unknown.
        stamps: time stamp of each packet, in units of ``time_base``; None where it is missing or unreliable.
        part: for each packet, the number of clock restarts before it.
        origin: start of the file in seconds; times count from here.
        fps: average frames per second.
        step: median seconds from one frame to the next.
        least: frames at most this many units of ``time_base`` apart count as shown at the same time.
        order: packets of the expected frames, in presentation order.
        exact: decoding will give exactly ``order``, and frames can be sought.
        keys: time stamps of the keyframes, ascending; empty unless ``exact``.
        joints: packets before and after each clock restart.
        first_key: packet where decoding begins.
        truncated: the packets show that part of the file is missing or damaged.
    """

    stream: int
    size: tuple[int, int]
    time_base: Fraction
    stamps: list[int | None]
    part: list[int]
    durations: list[int]
    origin: Fraction
    fps: float
    step: float
    least: int
    by_place: bool  # stamps belong to positions in presentation order, not to packets
    order: list[int]
    exact: bool
    keys: list[int]
    joints: set[int]
    first_key: int
    truncated: bool

    def times(self, order: Sequence[int | None]) -> list[float]:
        """Return when frames are shown, in seconds from the start of the file, ascending.

        Args:
            order: the packet of each frame, in presentation order; None where it is unknown.
        """
        base, origin = self.time_base, self.origin
        divisor, zero = base.denominator * origin.denominator, origin.numerator * base.denominator
        factor = base.numerator * origin.denominator
        if self.exact and order is self.order:
            return [(self.stamps[i] * factor - zero) / divisor for i in order]  # type: ignore[operator]
        seconds: list[float | None] = [None] * len(order)
        places: dict[int, list[int]] = {}
        last_part = 0
        for place, packet in enumerate(order):
            last_part = last_part if packet is None else max(last_part, self.part[packet])
            places.setdefault(last_part, []).append(place)
        shift, end = 0.0, None
        for part in sorted(places):
            # Frames are in presentation order, so the earliest stamp belongs to the first frame, also where packets
            # were stamped in decoding order.
            known = [p for p in places[part] if (i := order[p]) is not None and self.stamps[i] is not None]
            stamps: list[tuple[int, int]]
            if self.by_place and len(order) == len(self.stamps):
                known = places[part]
                packets: Iterable[int] = (i for i, number in enumerate(self.part) if number == part)
            else:
                packets = (order[p] for p in known)  # type: ignore[misc]
            stamps = sorted((s, i) for i in packets if (s := self.stamps[i]) is not None)
            if not stamps:
                end = None if end is None else end + len(places[part]) * self.step
                continue
            before, behind = known[0] - places[part][0], places[part][-1] - known[-1]  # frames without a stamp
            if end is not None:
                shift = end + before * self.step - (stamps[0][0] * factor - zero) / divisor
            for place, (stamp, _) in zip(known, stamps, strict=False):
                seconds[place] = (stamp * factor - zero) / divisor + shift
            end = (stamps[-1][0] * factor - zero) / divisor + shift + self._length(stamps[-1][1]) + behind * self.step
        return fill_in(seconds, self.step, float((self.least + Fraction(1, 2)) * base) if self.least else 0.0)

    def duration(self, order: Sequence[int | None], seconds: Sequence[float]) -> float:
        """Return the seconds from the start of the first frame to the end of the last."""
        if not seconds:
            return 0.0
        last = order[-1]
        length = self.step if last is None or self.stamps[last] is None else self._length(last)
        if len(seconds) > 1 and self._is_constant(order):
            length = self.step
        return seconds[-1] - seconds[0] + length

    def _is_constant(self, order: Sequence[int | None]) -> bool:
        return len({self.stamps[i] for i in order if i is not None}) <= 1

    def _length(self, packet: int) -> float:
        """Return the display time of a packet's frame in seconds."""
        return float(self.durations[packet] * self.time_base) or self.step


def scan(source: Source) -> Index:
    """Read all packets of a video without decoding and return their index. Raises VideoError."""
    broken = False
    with source.open() as container:
        streams = source.candidates(container)
        tables = {stream.index: _Packets() for stream in streams}
        codecs = {stream.index: stream.codec.name for stream in streams}
        try:
            for packet in container.demux(*streams):
                source.check()
                table = tables[packet.stream.index]  # the packet that ends a stream has stream_index 0
                if packet.size:
                    table.add(packet, codecs[packet.stream.index])
                elif packet.dts is not None or packet.pts is not None:
                    table.empty += 1
        except FFmpegError:
            broken = True
        stream = max(streams, key=lambda stream: _rank(stream, tables[stream.index]))
        source.stream(container, stream.index)  # raises if frames are too large
        return _index(source, container, stream, tables[stream.index], broken)


def _is_hidden_vp9(packet: av.Packet) -> bool:
    """Tell whether a packet holds a single VP9 picture that is only a reference (VP9 bitstream, 6.2 and B)."""
    content = memoryview(packet)
    mark = content[-1]
    index_size = 2 + (mark >> 3 & 3) * (frames := (mark & 7) + 1) + frames
    if mark & 0xE0 == 0xC0 and index_size <= len(content) and content[-index_size] == mark:
        return False  # a superframe: one of its pictures is shown
    first = content[0]
    profile_3 = first & 0x30 == 0x30  # has one more reserved bit
    bits = (first << 1 if profile_3 else first) & 0x0F  # show_existing_frame, frame_type, show_frame, error_resilient
    return not bits & 8 and not bits & 2


def _rank(stream: av.VideoStream, packets: _Packets) -> tuple:
    """Return the sort key that picks the stream to read: more than one frame, then the default, then the largest."""
    impaired = Disposition.hearing_impaired | Disposition.visual_impaired
    size = stream.codec_context.height * stream.codec_context.width
    preferred = bool(stream.disposition & Disposition.default) - bool(stream.disposition & impaired)
    return min(len(packets.key), 2), preferred, size, -stream.index


def _index(
    source: Source,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: _Packets,
    broken: bool,
) -> Index:
    count, kind = len(packets.key), container.format.name
    base = stream.time_base or Fraction(1, av.time_base)
    clock = packets.decoded_at if any(t is not None for t in packets.decoded_at) else packets.shown_at
    # AVI stores no presentation times; FFmpeg's estimates are wrong with B-frames.
    by_place = kind == "avi"
    restarts = kind in _RESTARTING_CONTAINERS
    part, wrong = split_clock(clock, base, restarts)
    shown_at = clock if by_place else packets.shown_at
    if all(t is None for t in shown_at):
        shown_at = clock
    stamps = [None if bad else t for t, bad in zip(shown_at, wrong, strict=True)]
    if restarts:  # FFmpeg may estimate a missing time from the other side of a clock restart
        far = math.ceil(FAR / base)
        stamps = [
            None if t is not None and c is not None and abs(t - c) > far else t
            for t, c in zip(stamps, clock, strict=True)
        ]
    # MPEG-TS continuity counters jump where files were joined. FFmpeg takes that for a loss and marks one of the
    # pictures that its parser still holds as corrupt.
    clocks = list(zip(part, wrong, strict=True))
    joints = {k for i in range(1, count) if clocks[i] != clocks[i - 1] for k in (i - 2, i - 1, i)}
    damaged = not joints.issuperset(packets.damaged)

    first_key = next((i for i, key in enumerate(packets.key) if key), 0)
    # Pictures before the first keyframe, in file or presentation order, refer to pictures that the file lacks.
    first_shown = stamps[first_key] if count and not by_place else None
    leading = set(range(first_key))
    if first_shown is not None and stream.codec_context.has_b_frames:
        leading.update(i for i, t in enumerate(stamps) if t is not None and t < first_shown and part[i] == 0)
    order = [i for i in range(count) if not packets.hidden[i]]
    headless = any(not packets.hidden[i] for i in leading)
    if headless:
        order = [i for i in order if i not in leading]
    order = _sorted_by_presentation(order, stamps, part)

    known = sorted(t for i in order if part[i] == 0 and (t := stamps[i]) is not None)
    rate = stream.average_rate or stream.guessed_rate
    if rate and not stream.average_rate and rate * base >= 1:  # merely the clock's unit, not a frame rate
        rate = None
    step = None if rate else usual_step(known, base, 0)
    fps = float(rate) if rate else 1 / step if step else _UNKNOWN_FPS
    least = least_distance(base, fps)
    step = usual_step(known, base, least)
    origin = Fraction(container.start_time or 0, av.time_base)
    if known and (container.start_time is None or known[0] * base - origin <= Fraction(1, av.time_base)):
        origin = known[0] * base  # the container states no start, or rounds it to microseconds
    truncated = broken or damaged or headless or _is_cut(source, container, stream, packets, order, fps)
    exact = (
        kind.startswith(_INDEXED_CONTAINERS)
        and stream.codec.name in INDEXED_CODECS
        and not (truncated or packets.empty or any(packets.hidden))
        and len(known) == count > 0
        and any(packets.key)
        and (count < 2 or min(map(operator.sub, known[1:], known)) > least)
        and not _stamped_in_decoding_order(stream, stamps)
    )
    return Index(
        stream=stream.index,
        size=(stream.codec_context.height, stream.codec_context.width),
        time_base=base,
        stamps=stamps,
        part=part,
        durations=packets.duration,
        origin=origin,
        fps=fps,
        step=step or 1 / fps,
        least=least,
        by_place=by_place,
        order=order,
        exact=exact,
        keys=sorted(t for t, key in zip(stamps, packets.key, strict=True) if key and t is not None) if exact else [],
        joints=joints,
        first_key=0 if stream.codec.name in INDEXED_CODECS else first_key,
        truncated=truncated,
    )


def _sorted_by_presentation(order: list[int], stamps: Sequence[int | None], part: Sequence[int]) -> list[int]:
    """Sort packets by part and time stamp; a part in which a stamp is missing keeps its file order."""
    missing = Counter(part[i] for i in order if stamps[i] is None)
    if not missing and not any(part):
        return sorted(order, key=stamps.__getitem__)  # type: ignore[arg-type]
    return sorted(order, key=lambda i: (part[i], 0 if missing[part[i]] else stamps[i]))


def _stamped_in_decoding_order(stream: av.VideoStream, stamps: Sequence[int | None]) -> bool:
    """Tell whether frames are reordered for presentation although their time stamps do not show it."""
    if not stream.codec_context.has_b_frames:
        return False
    return all(a is not None and b is not None and a < b for a, b in zip(stamps, stamps[1:], strict=False))


def _is_cut(
    source: Source,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    packets: _Packets,
    order: Sequence[int],
    fps: float,
) -> bool:
    """Tell whether packets are missing at the end, compared with the container's stated sizes, times or counts."""
    kind = container.format.name
    stated_frames, number, base = stream.frames, stream.index, stream.time_base or Fraction(1, av.time_base)
    stated_end = _clock_seconds(stream.metadata.get("DURATION", ""))
    with source.raw() as file:
        place = file.tell()
        cut = is_cut(file, kind)
        file.seek(place)
    if kind.startswith("matroska"):
        if cut is False:
            return False
        # only the index after the last frame may be missing
        if not stated_end and cut and container.duration:
            stated_end = container.duration / av.time_base
        ends = (t + packets.duration[i] for i in order if (t := packets.shown_at[i]) is not None)
        return bool(cut and not stated_end) or float(max(ends, default=0) * base) < stated_end - 1.5 / fps
    if cut is not None:
        return cut
    if kind.startswith("mov") and len(packets.key) + packets.empty < stated_frames:
        # an edit list may hide packets; without it, all packets that the header counts must be there
        with source.open(ignore_editlist="1") as whole:
            return sum(1 for packet in whole.demux(whole.streams[number]) if packet.dts is not None) < stated_frames
    return False


def _clock_seconds(text: str) -> float:
    """Convert Matroska's "00:01:02.500000000" to seconds; return 0 for any other form."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds
