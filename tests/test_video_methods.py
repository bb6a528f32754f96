"""Every way to read a video gives the same frames, times and facts, and the right ones, whatever is odd about it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from odd_videos import H264, Odd, clip, edit, even, hidden_vp9, joined, mux, number, picture

from bt_adapter.data import read_video, write_video
from bt_adapter.data.stream import FrameStream

MEDIA = Path(__file__).parent / "media"
METHODS = ("auto", "sequential", "seek")
ODD: dict[str, Callable[[Path], Odd]] = {}


def odd(make: Callable[[Path], Odd]) -> Callable[[Path], Odd]:
    ODD[make.__name__] = make
    return make


def many(**variants: Callable[[Path], Odd]) -> None:
    ODD.update(variants)


def stored(name: str, numbers: list[int], **facts) -> Callable[[Path], Odd]:
    return lambda folder: Odd(Path(shutil.copy(MEDIA / name, folder)), numbers, **facts)


ALL = list(range(40))

# --- files in which nothing is odd --------------------------------------------------------------------------------

PLAIN = [
    ("libx264", "mp4"), ("libx264", "mkv"), ("libx264", "ts"), ("libx264", "flv"),
    ("libx265", "mp4"), ("libx265", "ts"), ("mpeg4", "avi"), ("mpeg4", "mp4"), ("mpeg4", "mkv"), ("mpeg2video", "mpg"),
    ("mpeg2video", "ts"), ("libvpx-vp9", "webm"), ("libvpx-vp9", "mp4"), ("mjpeg", "avi"), ("mjpeg", "mov"),
    ("libx264", "nut"), ("mpeg4", "nut"), ("mpeg4", "asf"),
]  # fmt: skip


def plain(codec: str, suffix: str) -> Callable[[Path], Odd]:
    return lambda folder: Odd(mux(folder / f"plain.{suffix}", clip(codec)), ALL, even(40), duration=4.0)


many(**{f"plain {codec} {suffix}": plain(codec, suffix) for codec, suffix in PLAIN})


@odd
def h264_in_avi(folder: Path) -> Odd:
    """Frames are not in the order of decoding, and an AVI does not say so."""
    pictures = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(40)])
    write_video(folder / "h264.avi", pictures, 10, "libx264", H264)
    return Odd(folder / "h264.avi", ALL, even(40), duration=4.0)


# --- beginnings that cannot be decoded ----------------------------------------------------------------------------


def cut_before(codec: str, suffix: str, first: int) -> Callable[[Path], Odd]:
    """The first packets are missing: all up to the next key frame is lost, and pictures that refer to them are too."""

    def make(folder: Path) -> Odd:
        packets, template = clip(codec)
        kept = [packet.at(-packets[first].dts) for packet in packets[first:]]
        path = mux(folder / f"beginning.{suffix}", (kept, template))
        key = next(packet for packet in packets[first:] if packet.key)
        return Odd(path, list(range(key.pts // 100, 40)), truncated=True)

    return make


HEADLESS = [
    ("libx264", "mp4"), ("libx264", "mkv"), ("libx264", "ts"), ("libx265", "mp4"),
    ("libx265", "mkv"), ("libx265", "ts"), ("mpeg4", "avi"), ("mpeg4", "mp4"), ("mpeg4", "mkv"), ("mpeg2video", "mpg"),
    ("mpeg2video", "ts"), ("libvpx-vp9", "mp4"), ("libvpx-vp9", "webm"),
]  # fmt: skip
many(**{f"headless {codec} {suffix}": cut_before(codec, suffix, 3) for codec, suffix in HEADLESS})


def open_group(codec: str, suffix: str, **more) -> Callable[[Path], Odd]:
    """It begins with a key frame, and pictures that are shown before it refer to what was cut away."""

    def make(folder: Path) -> Odd:
        packets, template = clip(codec, **more)
        first = [i for i, packet in enumerate(packets) if packet.key][1]
        leading = [packet for packet in packets[first + 1 :] if packet.pts < packets[first].pts]
        assert leading, "this encoder makes no open groups"
        kept = [packet.at(-packets[first].dts) for packet in packets[first:]]
        options = {"use_editlist": "0"} if suffix == "mp4" else {}  # it would leave them away
        path = mux(folder / f"open.{suffix}", (kept, template), options=options)
        return Odd(path, list(range(packets[first].pts // 100, 40)), truncated=True)

    return make


many(**{f"open group h264 {suffix}": open_group("libx264", suffix, open=True) for suffix in ("mp4", "mkv", "ts")})
many(**{f"open group hevc {suffix}": open_group("libx265", suffix) for suffix in ("mp4", "mkv", "ts")})
many(**{f"open group mpeg2 {suffix}": open_group("mpeg2video", suffix) for suffix in ("mpg", "ts")})
many(**{"open group whole": lambda folder: Odd(mux(folder / "whole.mp4", clip(open=True)), ALL, even(40))})
many(stored_leading=stored("leading_pictures.mp4", list(range(40, 100)), truncated=True, times=even(60)))

# --- empty packets ------------------------------------------------------------------------------------------------


def with_empty(codec: str, suffix: str) -> Callable[[Path], Odd]:
    def make(folder: Path) -> Odd:
        packets, template = clip(codec)
        key = [i for i, packet in enumerate(packets) if packet.key][20 if codec == "mjpeg" else 2]
        rows = list(packets[:key])
        rows += [replace(packet, data=b"", key=False) for packet in packets[key : key + 5]]
        rows += [packet.at(500) for packet in packets[key:]]
        path = mux(folder / f"empty.{suffix}", (rows, template))
        return Odd(path, ALL, even(20) + even(20, 2.5))

    return make


many(**{
    f"empty {codec} {suffix}": with_empty(codec, suffix)
    for codec, suffix in [("libx264", "mp4"), ("libx264", "mkv"), ("mjpeg", "avi"), ("mjpeg", "mov")]
})  # fmt: skip
many(stored_avi=stored("empty_chunks.avi", list(range(30)), times=even(10) + even(20, 5.0), duration=7.0))

# --- clocks that start anew ---------------------------------------------------------------------------------------


def in_parts(
    suffix: str, codec: str, *parts: tuple[int, int, int], truncated: bool | None = False
) -> Callable[[Path], Odd]:
    """Files one after the other, each of (first number, frames, begin of its clock in ms)."""

    def make(folder: Path) -> Odd:
        pieces, numbers = [], []
        for first, count, begin in parts:
            packets, template = clip(codec, first, count)
            pieces.append(([packet.at(begin) for packet in packets], template))
            numbers += range(first, first + count)
        path = joined(folder / f"joined.{suffix}", *pieces)
        return Odd(path, numbers, even(len(numbers)), truncated, len(numbers) / 10)

    return make


many(
    two_parts=in_parts("ts", "libx264", (0, 40, 0), (40, 40, 0)),
    four_parts=in_parts("ts", "libx264", (0, 40, 0), (40, 20, 0), (60, 30, 0), (90, 10, 0)),
    back=in_parts("ts", "libx264", (0, 40, 900_000), (40, 40, 2_000)),
    ahead=in_parts("ts", "libx264", (0, 40, 0), (40, 40, 3_600_000)),
    ahead_and_back=in_parts("ts", "libx264", (0, 40, 0), (40, 40, 3_600_000), (80, 40, 50_000)),
    overlapping=in_parts("ts", "libx264", (0, 40, 0), (40, 40, 2_000)),
    across_the_wrap=in_parts("ts", "libx264", (0, 40, 95_440_000)),
    # nothing tells this joint, at which time goes on, from a loss
    wrap_between=in_parts("ts", "libx264", (0, 40, 95_439_000), (40, 40, 95_443_000), truncated=None),
    joined_hevc=in_parts("ts", "libx265", (0, 40, 0), (40, 40, 0)),
    joined_mpeg2=in_parts("ts", "mpeg2video", (0, 40, 0), (40, 40, 0), (80, 40, 0)),
    joined_ps=in_parts("mpg", "mpeg2video", (0, 40, 0), (40, 40, 0)),
    ps_ahead=in_parts("mpg", "mpeg2video", (0, 40, 0), (40, 40, 700_000)),
)


@odd
def stray_stamps(folder: Path) -> Odd:
    """A few frames in the middle have stamps of another world; those behind go on with those before."""
    packets, template = clip()
    packets = [packet.at(200) for packet in packets]  # none before 0, which the muxer would move
    at = [i for i, packet in enumerate(packets) if packet.key]
    parts = [packets[: at[1]], [p.at(10_000_000) for p in packets[at[1] : at[1] + 1]]]
    parts += [packets[at[1] + 1 :]]
    path = joined(folder / "stray.ts", *[(part, template) for part in parts])
    return Odd(path, ALL, even(40), False, 4.0)


@odd
def two_sizes(folder: Path) -> Odd:
    """The second half is of another size."""
    path = joined(folder / "sizes.ts", clip(), clip("libx264", 40, 40, (96, 160)))
    return Odd(path, list(range(80)), even(80))


# --- times that are repeated, missing, far ahead ------------------------------------------------------------------


def flv(stamps: list[int], times: list[float] | None = None, duration: float = 4.0) -> Callable[[Path], Odd]:
    """FLV with these times in ms, which no muxer would write."""

    def make(folder: Path) -> Odd:
        path = mux(folder / "stamps.flv", clip("flv"))
        data, at, left = bytearray(path.read_bytes()), 13, list(stamps)
        while at < len(data):
            if data[at] == 9 and left:  # a tag of video
                data[at + 4 : at + 7] = left.pop(0).to_bytes(3, "big")
            at += 15 + int.from_bytes(data[at + 1 : at + 4], "big")
        path.write_bytes(data)
        return Odd(path, ALL, times or even(40), duration=duration)

    return make


def stamped(suffix: str, codec: str, stamps: list[int | None], times: list[float] | None, **facts):
    def make(folder: Path) -> Odd:
        packets, template = clip(codec)
        rows = [replace(packet, pts=t, dts=t) for packet, t in zip(packets, stamps, strict=True)]
        return Odd(mux(folder / f"stamps.{suffix}", (rows, template)), ALL, times, **facts)

    return make


many(
    constant_mkv=stamped("mkv", "libvpx-vp9", [0] * 40, [i / 25 for i in range(40)], duration=1.6),
    constant=flv([0] * 40, [i / 25 for i in range(40)], duration=1.6),
    constant_begin=flv([0] * 20 + list(range(2000, 4000, 100))),
    constant_end=flv(list(range(0, 2000, 100)) + [2000] * 20),
    pairs=flv([i // 2 * 200 for i in range(39)] + [3900], duration=4.1),
    one_far_ahead=flv([9_000_000 if i == 20 else i * 100 for i in range(40)]),
    three_far_ahead=flv([9_000_000 + i if 20 <= i < 23 else i * 100 for i in range(40)]),
    some_back_at_0=flv([0 if i in (20, 21) else i * 100 + 1500 for i in range(40)]),
    out_of_order=flv([(i ^ 1) * 100 for i in range(40)]),
    anew=flv([i % 20 * 100 for i in range(40)]),
    far_end=stamped("mkv", "libvpx-vp9", [*range(0, 3900, 100), 2_000_000_000], [*even(39), 2e6], duration=2e6 + 0.1),
    far_middle=stamped(
        "mp4", "libvpx-vp9", [i * 100 + (i > 19) * 90_000_000 for i in range(40)], even(20) + even(20, 90_002)
    ),
    late_mkv=stamped("mkv", "libvpx-vp9", list(range(70_000, 74_000, 100)), even(40), duration=4.0),
    stored_zero=stored("zero_times.mp4", list(range(100)), times=even(100), duration=10.0),
    stored_gap=stored("gap.mp4", list(range(100)), times=[i + (i > 60) * (2**31 - 2) for i in range(100)]),
)

# --- edit lists ---------------------------------------------------------------------------------------------------


def edited(entries: list[tuple[int, int]], numbers: list[int], **facts) -> Callable[[Path], Odd]:
    """Frame n stands at (n + 2) * 100 ms of the media, whose first frames wait for B-frames."""
    return lambda folder: Odd(edit(mux(folder / "edited.mp4", clip()), entries), numbers, **facts)


many(
    edit_start=edited([(2700, 1500)], list(range(13, 40)), times=even(27), duration=2.7),
    edit_key=edited([(3000, 1200)], list(range(10, 40)), times=even(30), duration=3.0),
    edit_end=edited([(2000, 200)], list(range(20)), times=even(20), duration=2.0),
    edit_both=edited([(1500, 700)], list(range(5, 20)), times=even(15), duration=1.5),
    edit_middle=edited([(1000, 200), (1000, 3200)], [*range(10), *range(30, 40)], times=even(20), duration=2.0),
    edit_delay=edited([(1000, -1), (4000, 200)], ALL, times=even(40), duration=4.0),
    stored_trimmed=stored("trimmed.mp4", list(range(30, 70)), duration=4.0),
)

# --- cut files ----------------------------------------------------------------------------------------------------


def fragmented(
    cut: Callable[[bytes], int] | None, numbers: list[int], truncated: bool, flags: str = "frag_keyframe+empty_moov"
) -> Callable[[Path], Odd]:
    def make(folder: Path) -> Odd:
        path = mux(folder / "fragments.mp4", clip(), options={"movflags": flags})
        data = path.read_bytes()
        path.write_bytes(data if cut is None else data[: cut(data)])
        return Odd(path, numbers, even(len(numbers)), truncated)

    return make


def nth(data: bytes, word: bytes, n: int) -> int:
    at = -1
    for _ in range(n):
        at = data.index(word, at + 1)
    return at


many(
    fragments=fragmented(None, ALL, False),
    fragment_cut_in_moof=fragmented(lambda data: nth(data, b"moof", 4) + 20, list(range(30)), True),
    fragment_cut_in_head=fragmented(lambda data: nth(data, b"moof", 4) - 2, list(range(30)), True),
    fragment_cut_between=fragmented(lambda data: nth(data, b"moof", 4) - 4, list(range(30)), False),
    fragment_cut_in_mdat=fragmented(lambda data: nth(data, b"mdat", 4) + 5, list(range(30)), True),
    stored_fragment=stored("fragment_cut.mp4", list(range(24)), truncated=True),
)

many(
    indexed_fragments=fragmented(None, ALL, False, "frag_keyframe+empty_moov+dash+global_sidx"),
    indexed_fragment_missing=fragmented(
        lambda data: nth(data, b"moof", 4) - 4, list(range(30)), True, "frag_keyframe+empty_moov+dash+global_sidx"
    ),
)

# --- stamps that contradict the decoder, and pictures that are never shown ----------------------------------------


def in_another_order(codec: str, suffix: str, order: Callable[[list[int]], list[int]]) -> Callable[[Path], Odd]:
    """The stamps of the packets change places, so that they do not tell in which order a decoder shows frames."""

    def make(folder: Path) -> Odd:
        packets, template = clip(codec)
        stamps = order([packet.pts for packet in packets])
        rows = [replace(p, pts=t + 4000, dts=100 * i) for i, (p, t) in enumerate(zip(packets, stamps, strict=True))]
        return Odd(mux(folder / f"order.{suffix}", (rows, template)), ALL, truncated=None)

    return make


many(**{
    f"{name} stamps {codec}": in_another_order(codec, "mkv", order)
    for codec in ("libx264", "libx265", "libvpx-vp9")
    for name, order in {
        "reversed": lambda stamps: stamps[::-1],
        "exchanged": lambda stamps: [stamps[i ^ 1] for i in range(len(stamps))],
        "sorted": sorted,
    }.items()
})  # fmt: skip


def hidden_pictures(suffix: str) -> Callable[[Path], Odd]:
    """VP9 pictures that others refer to, and nobody sees, in packets of their own."""

    def make(folder: Path) -> Odd:
        packets, template = clip("libvpx-vp9")
        rows = [hidden_vp9(packet) if i in (4, 5) else packet for i, packet in enumerate(packets)]
        return Odd(mux(folder / f"hidden.{suffix}", (rows, template)), [i for i in ALL if i not in (4, 5)])

    return make


many(hidden_mkv=hidden_pictures("mkv"), hidden_mp4=hidden_pictures("mp4"))

# --- several streams ----------------------------------------------------------------------------------------------


def two_streams(suffix: str, first: str, size: tuple[int, int], count: int, default: int | None):
    """Another stream of video, or a still, stands before the one that is to be seen."""

    def make(folder: Path) -> Odd:
        def setup(container, streams):
            for i, stream in enumerate(streams):
                stream.disposition = av.stream.Disposition.default if i == default else av.stream.Disposition(0)

        other = clip(first, 500, count, size)
        return Odd(mux(folder / f"streams.{suffix}", other, clip(), setup=setup), ALL, even(40))

    return make


many(
    stored_streams=stored("two_streams.mp4", list(range(50)), times=even(50)),
    small_first_mp4=two_streams("mp4", "libx264", (32, 40), 40, 1),
    small_first_mkv=two_streams("mkv", "libx264", (32, 40), 40, 1),
    small_first_ts=two_streams("ts", "libx264", (32, 40), 40, None),
    large_first_mp4=two_streams("mp4", "libx264", (96, 160), 40, 1),
    large_first_mkv=two_streams("mkv", "libx264", (96, 160), 40, 1),
    still_first_mp4=two_streams("mp4", "mjpeg", (96, 160), 1, 0),
    still_first_mov=two_streams("mov", "mjpeg", (96, 160), 1, 0),
    still_first_mkv=two_streams("mkv", "mjpeg", (96, 160), 1, 0),
)


# --- the test -----------------------------------------------------------------------------------------------------


def facts(video) -> tuple:
    return video.total, video.duration, video.fps, video.truncated


@pytest.mark.parametrize("name", ODD)
def test_all_methods_agree_and_are_right(tmp_path, name):
    expected = ODD[name](tmp_path)
    videos = [read_video(expected.path, None, method=method) for method in METHODS]
    video = videos[0]
    times = video.timestamps.tolist()
    assert [number(frame) for frame in video.frames] == expected.numbers
    assert video.indices.tolist() == list(range(len(expected.numbers)))
    assert all(a < b for a, b in zip(times, times[1:], strict=False))
    if expected.times is not None:
        assert times == pytest.approx(expected.times, abs=2e-3)
    if expected.duration is not None:
        assert video.duration == pytest.approx(expected.duration, abs=2e-3)
    if expected.truncated is not None:
        assert video.truncated == expected.truncated
    for other in videos[1:]:
        assert facts(other) == facts(video) and other.timestamps.tolist() == times
        assert torch.equal(other.frames, video.frames) and torch.equal(other.indices, video.indices)

    stream = FrameStream(expected.path, chunk=7)
    assert torch.equal(torch.cat(list(stream)), video.frames) and stream.numbers == video.indices.tolist()
    assert (stream.total, stream.duration, stream.fps, stream.truncated) == facts(video)

    middle = sorted(times)[len(times) // 2]
    for frames, span in ((4, (None, None)), (3, (times[2], middle)), (2, (middle, None))):
        inside = [i for i, t in enumerate(times) if (span[0] or -math.inf) <= t < (span[1] or math.inf)]
        chosen = [read_video(expected.path, frames, start=span[0], end=span[1], method=method) for method in METHODS]
        for some in chosen:
            assert facts(some) == (len(inside), *facts(video)[1:])
            assert set(some.indices.tolist()) <= set(inside)
            assert [times[i] for i in some.indices.tolist()] == some.timestamps.tolist()
            assert torch.equal(some.indices, chosen[0].indices)
            assert torch.equal(some.frames, chosen[0].frames)
            assert [number(frame) for frame in some.frames] == [expected.numbers[i] for i in some.indices]
    few = FrameStream(expected.path, frames=4)
    assert few.numbers == read_video(expected.path, 4).indices.tolist()
    assert [number(frame) for chunk in few for frame in chunk] == [expected.numbers[i] for i in few.numbers]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_stream_goes_on_with_the_right_frames_where_some_cannot_be_decoded(tmp_path, suffix):
    """A packet is missing in the middle of a group of HEVC: its decoder withholds those that refer to it."""
    packets, template = clip("libx265")
    path = mux(tmp_path / f"dropped.{suffix}", (packets[:15] + packets[16:], template))
    shown = [p.pts // 100 for p in packets[:15] + packets[16:]]
    there = [number(frame) for frame in read_video(path, None, method="sequential").frames]
    assert len(there) < 39 and set(there) < set(shown)
    stream = FrameStream(path, chunk=7)
    found = [number(frame) for piece in stream for frame in piece]
    expected = sorted(shown)
    for place, wanted in enumerate(expected):
        assert found[place] == (wanted if wanted in there else found[place - 1])
    assert len(found) == stream.total == 39 and stream.truncated
    few = FrameStream(path, frames=3, chunk=2)
    assert [number(frame) for piece in few for frame in piece] == [found[i] for i in few.numbers]


@pytest.mark.parametrize("suffix", ["apng", "png"])
def test_animated_png_is_a_video_too(tmp_path, suffix):
    path = tmp_path / f"animated.{suffix}"
    shutil.copy(MEDIA / "animated.png", path)
    video = read_video(path, None)
    assert video.total > 1 and torch.equal(torch.cat(list(FrameStream(path))), video.frames)
