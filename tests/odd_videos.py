"""Videos that are odd in one way each, made from packets of short clips whose frames show their numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np

FPS = 10
HEIGHT, WIDTH = 48, 80
H264 = {"preset": "ultrafast", "crf": "15", "g": "10", "bf": "2", "b-adapt": "0", "sc_threshold": "0"}
OPEN = H264 | {"x264-params": "repeat-headers=1:open-gop=1:keyint=12:min-keyint=12:bframes=2:b-adapt=0:scenecut=0"}
HEVC = {"preset": "ultrafast", "x265-params": "log-level=none:keyint=10:min-keyint=10:bframes=3:open-gop=1:scenecut=0"}
MPEG = {"g": "10", "bf": "2", "q:v": "2", "sc_threshold": "1000000000"}
VP9 = {"g": "10", "b": "0", "crf": "20", "cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0"}
FLV = {"g": "10"}
CODECS = {
    "libx264": H264, "libx265": HEVC, "mpeg4": MPEG, "mpeg2video": MPEG, "libvpx-vp9": VP9, "mjpeg": {}, "flv": FLV
}  # fmt: skip


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 [H, W, 3] that shows a number below 1024: ten blocks, two rows of five, white is 1, lowest bit first."""
    bits = np.array([number >> bit & 1 for bit in range(10)], np.uint8).reshape(2, 5)
    return np.repeat(np.kron(bits, np.ones((height // 2, width // 5), np.uint8))[:, :, None] * 200 + 20, 3, 2)


def number(frame) -> int:
    """The number that a picture [3, H, W] shows."""
    grey = np.asarray(frame).astype(float).mean(0)
    height, width = grey.shape
    found = 0
    for bit in range(10):
        row, column = divmod(bit, 5)
        y, x = height * (2 * row + 1) // 4, width * (2 * column + 1) // 10
        found |= int(grey[y - height // 8 : y + height // 8, x - width // 20 : x + width // 20].mean() > 120) << bit
    return found


@dataclass(frozen=True)
class Bare:
    """A packet: its bytes, times in ticks of 1/1000 s, and whether it is a key frame."""

    data: bytes
    pts: int | None
    dts: int | None
    key: bool
    duration: int = 1000 // FPS

    def at(self, shift: int) -> Bare:
        return Bare(
            self.data, self.pts if self.pts is None else self.pts + shift,
            self.dts if self.dts is None else self.dts + shift, self.key, self.duration,
        )  # fmt: skip


@cache
def clip(codec: str = "libx264", first: int = 0, count: int = 40, size: tuple[int, int] = (HEIGHT, WIDTH), **more: str):
    """Packets of frames that show ``first``, ``first + 1``, … at ten a second, and the stream they can be muxed as."""
    options = OPEN if more.get("open") else CODECS[codec]
    content = io.BytesIO()
    with av.open(content, "w", format="flv" if codec == "flv" else "matroska") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.codec_context.thread_count = 1
        packets = []
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + i, *size), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, FPS)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        step = 1000 // FPS
        times = [(p.pts * step, p.dts * step) for p in packets]
        for packet in packets:
            container.mux(packet)
    template = av.open(io.BytesIO(content.getvalue()))
    with av.open(io.BytesIO(content.getvalue())) as container:  # as the muxer has formatted them
        written = [(bytes(p), p.is_keyframe) for p in container.demux() if p.size]
    return [Bare(data, *when, key) for (data, key), when in zip(written, times, strict=True)], template


def hidden_vp9(bare: Bare) -> Bare:
    """A packet of :func:`clip`'s VP9 whose picture others refer to, and nobody sees."""
    head = "".join(f"{byte:08b}" for byte in bare.data[:5])
    assert head[:4] == "1000" and head[4:7] == "011" and head[-1] == "0", "another header than this encoder's"
    # not shown; the bit intra_only follows then, for which there is room before the header's end
    head = head[:6] + "0" + head[7] + "0" + head[8:-1]
    return replace(bare, data=int(head, 2).to_bytes(5, "big") + bare.data[5:])


def mux(path: Path, *clips, packets: Sequence[Sequence[Bare]] | None = None, setup: Callable | None = None, **options):
    """Write packets, of several streams if so many clips are given, as they are."""
    packets = packets if packets is not None else [bare for bare, _ in clips]
    with av.open(str(path), "w", **options) as container:
        streams = [container.add_stream_from_template(template.streams.video[0]) for _, template in clips]
        for stream in streams:
            stream.time_base = Fraction(1, 1000)
        if setup is not None:
            setup(container, streams)
        rows = [(b.dts if b.dts is not None else b.pts or 0, i, b) for i, list_ in enumerate(packets) for b in list_]
        for _, i, bare in sorted(rows, key=lambda row: row[:2]):
            packet = av.Packet(bare.data) if bare.data else av.Packet(0)
            packet.pts, packet.dts, packet.duration = bare.pts, bare.dts, bare.duration
            packet.time_base, packet.is_keyframe = Fraction(1, 1000), bare.key
            packet.stream = streams[i]
            container.mux(packet)
    return path


def joined(path: Path, *parts: Iterable[Bare] | tuple, codec: str = "libx264") -> Path:
    """One file after another, each with packets of its own: ``cat``."""
    whole = b""
    for k, (packets, template) in enumerate(parts):
        piece = path.with_name(f"{path.stem}.{k}{path.suffix}")
        whole += mux(piece, (packets, template)).read_bytes()
        piece.unlink()
    path.write_bytes(whole)
    return path


def edit(path: Path, entries: Sequence[tuple[int, int]]) -> Path:
    """Give an MP4 file with its header behind an edit list: (duration, begin) in ms, begin -1 for an empty edit."""
    data = path.read_bytes()
    at = data.index(b"moov") - 4
    moov = data[at:]
    scale = int.from_bytes(moov[moov.index(b"mdhd") + 16 :][:4], "big")
    movie = int.from_bytes(moov[moov.index(b"mvhd") + 16 :][:4], "big")
    old = moov.index(b"edts") - 4
    old_size = int.from_bytes(moov[old : old + 4], "big")
    rows = b"".join(
        (duration * movie // 1000).to_bytes(4, "big")
        + (begin if begin < 0 else begin * scale // 1000).to_bytes(4, "big", signed=True)
        + bytes([0, 1, 0, 0])
        for duration, begin in entries
    )
    elst = (16 + len(rows)).to_bytes(4, "big") + b"elst" + bytes(4) + len(entries).to_bytes(4, "big") + rows
    edts = (8 + len(elst)).to_bytes(4, "big") + b"edts" + elst
    trak = moov.index(b"trak") - 4
    more = len(edts) - old_size
    moov = bytearray(moov[:old] + edts + moov[old + old_size :])
    for box in (0, trak):
        moov[box : box + 4] = (int.from_bytes(moov[box : box + 4], "big") + more).to_bytes(4, "big")
    path.write_bytes(data[:at] + bytes(moov))
    return path


@dataclass
class Odd:
    """A video and what is to be found in it; times None: not held to anything."""

    path: Path
    numbers: list[int]
    times: list[float] | None = None
    truncated: bool | None = False
    duration: float | None = None


def even(count: int, start: float = 0.0) -> list[float]:
    return [start + i / FPS for i in range(count)]
