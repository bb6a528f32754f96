"""Facts about a video that its packets tell, read without decoding any."""

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

from ._cut import is_cut
from ._source import Source
from ._times import FAR, fill_in, least_distance, split_clock, usual_step

# Where one packet is one shown frame with its own time, so that frames can be counted and found without
# decoding.
_INDEXED_CONTAINERS = ("mov", "matroska")
# Their decoders withhold pictures that refer to others which are missing; those of other codecs make grey ones up.
INDEXED_CODECS = ("h264", "hevc", "vp9", "av1", "libdav1d")
# Containers whose clock may start anew or jump, as where files were joined or a broadcast was cut.
_RESTARTING_CONTAINERS = ("mpegts", "mpeg")
# FFmpeg takes raw streams, which say nothing of time, for as many frames a second.
_UNKNOWN_FPS = 25.0

Span = tuple[float, float]  # seconds from the start of the file, half-open


@dataclass
class _Packets:
    """Packets of one stream in the order of the file, empty ones left out."""

    shown_at: list[int | None] = field(default_factory=list)  # "pts", in units of the stream's time base
    decoded_at: list[int | None] = field(default_factory=list)  # "dts"
    duration: list[int] = field(default_factory=list)
    key: list[bool] = field(default_factory=list)
    hidden: list[bool] = field(default_factory=list)  # decoded, never shown: outside of an edit list, or by itself
    damaged: list[int] = field(default_factory=list)  # numbers of those that FFmpeg calls corrupt
    empty: int = 0  # packets without content, which stand for no frame

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
    """Facts about a video that its packets tell without decoding.

    A packet is named by its number among those of its stream that are not empty, in the order of the file.

    Attributes:
        stream: number of the stream in its container.
        size: height and width as stored, by the header; 0 where it does not say.
        stamps: time stamp of each packet, in units of ``time_base``; None where it has none that can be relied on.
        part: of each packet, how often the clock had started anew before it.
        origin: start of the file in seconds; times count from here.
        fps: average frames per second.
        step: usual seconds from one frame to the next.
        least: frames no more units of ``time_base`` apart count as shown at the same time.
        order: packets of the frames that are expected, in order of presentation.
        exact: that is what decoding will give, and frames can be found by seeking.
        keys: where ``exact``, the time stamps of the key frames, ascending.
        joints: packets before and behind the places where the clock starts anew.
        first_key: packet where decoding begins.
        truncated: part of the file is missing or damaged, as far as its packets tell.
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
    by_place: bool  # stamps go with the places of frames in the order of presentation, not with packets
    order: list[int]
    exact: bool
    keys: list[int]
    joints: set[int]
    first_key: int
    truncated: bool

    def times(self, order: Sequence[int | None]) -> list[float]:
        """When frames are shown, in seconds from the start of the file, ascending.

        Args:
            order: the packet of each frame, in order of presentation; None where it is not known.
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
            # Frames come in order of presentation, so that the earliest stamp is the first one's. That also holds where
            # packets were stamped in the order of decoding.
            known = [p for p in places[part] if (i := order[p]) is not None and self.stamps[i] is not None]
            stamps: list[tuple[int, int]]
            if self.by_place and len(order) == len(self.stamps):
                known = places[part]
                packets: Iterable[int] = (i for i, own in enumerate(self.part) if own == part)
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
        """Seconds from the first frame's begin to the last one's end."""
        if not seconds:
            return 0.0
        last = order[-1]
        lasts = self.step if last is None or self.stamps[last] is None else self._length(last)
        if len(seconds) > 1 and self._constant(order):
            lasts = self.step
        return seconds[-1] - seconds[0] + lasts

    def _constant(self, order: Sequence[int | None]) -> bool:
        return len({self.stamps[i] for i in order if i is not None}) <= 1

    def _length(self, packet: int) -> float:
        """How long a packet's frame is shown, in seconds."""
        return float(self.durations[packet] * self.time_base) or self.step


def scan(source: Source) -> Index:
    """Read all packets without decoding any. Raises VideoError."""
    broken = False
    with source.open() as container:
        streams = source.candidates(container)
        tables = {stream.index: _Packets() for stream in streams}
        codecs = {stream.index: stream.codec.name for stream in streams}
        try:
            for packet in container.demux(*streams):
                table = tables[packet.stream_index]
                if packet.size:
                    table.add(packet, codecs[packet.stream_index])
                elif packet.dts is not None or packet.pts is not None:
                    table.empty += 1
        except FFmpegError:
            broken = True
        stream = max(streams, key=lambda stream: _rank(stream, tables[stream.index]))
        source.stream(container, stream.index)  # refuses frames that are too large
        return _index(source, container, stream, tables[stream.index], broken)


def _is_hidden_vp9(packet: av.Packet) -> bool:
    """Whether a packet holds one VP9 picture, and that one is only referred to by others (VP9 bitstream, 6.2 and B)."""
    content = memoryview(packet)
    mark = content[-1]
    index_size = 2 + (mark >> 3 & 3) * (frames := (mark & 7) + 1) + frames
    if mark & 0xE0 == 0xC0 and index_size <= len(content) and content[-index_size] == mark:
        return False  # several pictures, of which one is shown
    first = content[0]
    profile_3 = first & 0x30 == 0x30  # has a reserved bit more
    bits = (first << 1 if profile_3 else first) & 0x0F  # show_existing_frame, frame_type, show_frame, error_resilient
    return not bits & 8 and not bits & 2


def _rank(stream: av.VideoStream, packets: _Packets) -> tuple:
    """The greater, the more a stream is what is to be seen: more than a still, the default one, then the largest."""
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
    # An AVI keeps no times of presentation; what FFmpeg gives there is wrong with B-frames.
    by_place = kind == "avi"
    restarts = kind in _RESTARTING_CONTAINERS
    part, wrong = split_clock(clock, base, restarts)
    shown_at = clock if by_place else packets.shown_at
    if all(t is None for t in shown_at):
        shown_at = clock
    stamps = [None if bad else t for t, bad in zip(shown_at, wrong, strict=True)]
    if restarts:  # what FFmpeg makes up for pictures without a time may come from the other side of a joint
        far = math.ceil(FAR / base)
        stamps = [
            None if t is not None and c is not None and abs(t - c) > far else t
            for t, c in zip(stamps, clock, strict=True)
        ]
    # The counters of MPEG-TS packets do not go on where files were joined, which FFmpeg takes for a loss. It notes that
    # at one of the pictures that its parser still holds.
    clocks = list(zip(part, wrong, strict=True))
    joints = {k for i in range(1, count) if clocks[i] != clocks[i - 1] for k in (i - 2, i - 1, i)}
    damaged = not joints.issuperset(packets.damaged)

    first_key = next((i for i, key in enumerate(packets.key) if key), 0)
    # Pictures before the first key frame, in the file or when shown, refer to pictures that are not in the file.
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
    if rate and not stream.average_rate and rate * base >= 1:  # no more than the unit of its clock
        rate = None
    step = None if rate else usual_step(known, base, 0)
    fps = float(rate) if rate else 1 / step if step else _UNKNOWN_FPS
    least = least_distance(base, fps)
    step = usual_step(known, base, least)
    origin = Fraction(container.start_time or 0, av.time_base)
    if known and (container.start_time is None or known[0] * base - origin <= Fraction(1, av.time_base)):
        origin = known[0] * base  # the container does not say, or rounds to microseconds
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
    """Packets by part and stamp; where some have no stamp, the order of the file has to do within their part."""
    missing = Counter(part[i] for i in order if stamps[i] is None)
    if not missing and not any(part):
        return sorted(order, key=stamps.__getitem__)  # type: ignore[arg-type]
    return sorted(order, key=lambda i: (part[i], 0 if missing[part[i]] else stamps[i]))


def _stamped_in_decoding_order(stream: av.VideoStream, stamps: Sequence[int | None]) -> bool:
    """Whether frames are shown in another order than they are decoded in, and their stamps do not say so."""
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
    """Whether packets are missing at the end, by what the container states."""
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
        # what is lost may be no more than the index behind the last frame
        if not stated_end and cut and container.duration:
            stated_end = container.duration / av.time_base
        ends = (t + packets.duration[i] for i in order if (t := packets.shown_at[i]) is not None)
        return bool(cut and not stated_end) or float(max(ends, default=0) * base) < stated_end - 1.5 / fps
    if cut is not None:
        return cut
    if kind.startswith("mov") and len(packets.key) + packets.empty < stated_frames:
        # an edit list may leave packets away; without it, all that the header counts are there
        with source.open(ignore_editlist="1") as whole:
            return sum(1 for packet in whole.demux(whole.streams[number]) if packet.dts is not None) < stated_frames
    return False


def _clock_seconds(text: str) -> float:
    """Matroska's "00:01:02.500000000" in seconds; 0 if it is not of that form."""
    parts = text.split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
    except ValueError:
        return 0.0
    return hours * 3600 + minutes * 60 + seconds
