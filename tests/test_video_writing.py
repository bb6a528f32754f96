# ruff: noqa: F811 (fixtures)
"""Video files out: sizes, rates, codecs, and what cannot be written."""

import os

import av
import pytest
import torch
from video_files import clip, folder, numbered, numbers  # noqa: F401 (fixtures)

from bt_adapter.data import VideoError, read_video, write_video


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_odd_sizes_are_padded(tmp_path, suffix):
    path = tmp_path / f"odd{suffix}"
    write_video(path, torch.full((3, 3, 33, 47), 180, dtype=torch.uint8))
    frames = read_video(path, None).frames
    assert frames.shape == (3, 3, 34, 48) and (frames.float() - 180).abs().max() < 8


@pytest.mark.parametrize("fps", [8, 0.5, 29.97, 30000 / 1001])
def test_frame_rates(tmp_path, fps):
    write_video(tmp_path / "rate.mp4", numbered(6), fps=fps)
    video = read_video(tmp_path / "rate.mp4", None)
    assert video.fps == pytest.approx(fps, rel=1e-4)
    assert video.timestamps.tolist() == pytest.approx([i / fps for i in range(6)], rel=1e-3)


def test_codec_by_name(tmp_path):
    write_video(tmp_path / "old.avi", numbered(5), codec="mpeg4", options={"qscale": "3"})
    with av.open(str(tmp_path / "old.avi")) as container:
        assert container.streams.video[0].codec.name == "mpeg4"
    assert numbers(read_video(tmp_path / "old.avi", None).frames) == list(range(5))


def test_default_codecs(tmp_path, clip):
    write_video(tmp_path / "clip.webm", numbered(3))
    for path, name in ((clip, "h264"), (tmp_path / "clip.webm", "vp9")):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            assert (stream.codec.name, stream.codec_context.pix_fmt) == (name, "yuv420p")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    for codec in ("no-such-codec", "libvpx", "pcm_s16le"):
        with pytest.raises(VideoError, match=rf"clip.mp4: cannot be written with codec '{codec}'"):
            write_video(path, numbered(3), codec=codec)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["clip.mp4"]
    with pytest.raises(VideoError, match=r"nowhere.*cannot be written"):
        write_video(tmp_path / "nowhere" / "clip.mp4", numbered(3))


@pytest.mark.parametrize(
    ("frames", "fps", "error", "message"),
    [
        (torch.zeros(3, 3, 8, 8), 8, TypeError, "uint8"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), 8, ValueError, "rank 4"),
        (torch.zeros(3, 1, 8, 8, dtype=torch.uint8), 8, ValueError, "3 channels"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), 8, ValueError, "empty"),
        (numbered(2), 0, ValueError, "fps must be a number above 0, but is 0"),
        (numbered(2), float("nan"), ValueError, "fps"),
        (numbered(2), "8", ValueError, "fps"),
    ],
)
def test_wrong_writes(tmp_path, frames, fps, error, message):
    with pytest.raises(error, match=message):
        write_video(tmp_path / "x.mp4", frames, fps)
    assert os.listdir(tmp_path) == []
