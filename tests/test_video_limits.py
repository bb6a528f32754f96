"""What is refused before it is opened, frames too large, rates of any size, and PyAV's own logging."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import video_files
from odd_videos import clip, mux, number, picture

from bt_adapter.data import VideoError, read_video, write_video
from bt_adapter.data._times import shown_at_rate
from bt_adapter.data.stream import FrameStream

MEDIA = Path(__file__).parent / "media"


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    os.symlink("loop.mp4", tmp_path / "loop.mp4")
    os.symlink("/dev/zero", tmp_path / "zero.mp4")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.mp4"))
        for name, what in {
            "pipe.mp4": "is a named pipe, not a regular file",
            "socket.mp4": "is a socket, not a regular file",
            "zero.mp4": "is a device, not a regular file",
            "loop.mp4": "cannot be read",
            "": "is a directory, not a regular file",
        }.items():
            for read in (read_video, FrameStream):
                with pytest.raises(VideoError, match=f"{name}: {what}"):
                    read(tmp_path / name)


def test_large_frames_are_refused_or_scaled_down(tmp_path, monkeypatch):
    frames = torch.stack([torch.from_numpy(picture(i, 480, 640)).permute(2, 0, 1) for i in range(4)])
    path = tmp_path / "large.mp4"
    write_video(path, frames)
    for read in (read_video, FrameStream):
        with pytest.raises(
            VideoError, match="large.mp4: its frames of 640 x 480 pixels are larger than the limit of 300,000"
        ):
            read(path, 4, max_pixels=300_000)
    monkeypatch.setenv("BT_ADAPTER_MAX_PIXELS", "300000")
    with pytest.raises(VideoError, match="BT_ADAPTER_MAX_PIXELS"):
        read_video(path, 4)
    monkeypatch.setenv("BT_ADAPTER_MAX_PIXELS", "much")
    with pytest.raises(ValueError, match="must be a number of pixels, got 'much'"):
        read_video(path, 4)
    monkeypatch.delenv("BT_ADAPTER_MAX_PIXELS")
    for side, shape in ((80, (480, 640)), (79, (316, 421))):  # 6 times 80 is not too large
        video = read_video(path, 4, side=side)
        assert video.frames.shape == (4, 3, *shape) and [number(frame) for frame in video.frames] == [0, 1, 2, 3]
        assert torch.equal(torch.cat(list(FrameStream(path, 4, side=side, chunk=3))), video.frames)


def test_a_limit_on_pixels_holds_before_memory_is_taken(tmp_path):
    """FFmpeg decodes a first frame to learn about a stream; of these frames one takes 96 MiB."""
    path = tmp_path / "huge.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
        stream.pix_fmt, stream.width, stream.height = "yuv420p", 8192, 8192
        black = np.zeros((8192 * 3 // 2, 8192), dtype=np.uint8)  # what compresses badly takes memory as packets
        container.mux(stream.encode(av.VideoFrame.from_ndarray(black, "yuv420p")))
        container.mux(stream.encode(None))
    # In a process of its own: other threads of this one may take memory meanwhile.
    done = subprocess.run([sys.executable, "-c", GROWTH, path], capture_output=True, text=True, check=True)
    told, growth = done.stdout.splitlines()
    assert "8192 x 8192 pixels are larger than the limit of 8,912,896" in told and float(growth) < 40


GROWTH = """
import pathlib, re, sys
from bt_adapter.data import VideoError
from bt_adapter.data.stream import FrameStream
content, status = pathlib.Path(sys.argv[1]).read_bytes(), pathlib.Path("/proc/self/status")
def mebibytes(name):
    return int(re.search(name + r":\\s+(\\d+)", status.read_text())[1]) / 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
before = mebibytes("VmRSS")
try:
    FrameStream(content, 1, max_pixels=4096 * 2176)
except VideoError as error:
    print(error)
print(mebibytes("VmHWM") - before)
"""


def test_a_check_ends_the_reading(tmp_path):
    content = mux(tmp_path / "clip.mp4", clip()).read_bytes()
    calls = []
    stream = FrameStream(content, 3, check=lambda: calls.append(None), threads=1)
    counted = len(calls)
    assert counted >= stream.total and torch.equal(torch.cat(list(stream)), read_video(content, 3).frames)
    assert len(calls) > counted

    def stop():
        raise VideoError("it takes too long")

    with pytest.raises(VideoError, match="^it takes too long$"):
        FrameStream(content, 3, check=stop)


def test_want_of_memory_is_an_error_that_names_file_and_size(tmp_path, monkeypatch):
    path = mux(tmp_path / "clip.mp4", clip())

    def no_room(*arguments):
        raise MemoryError

    monkeypatch.setattr("bt_adapter.data._decode.np.empty", no_room)
    with pytest.raises(VideoError, match="clip.mp4: not enough memory for 3 frames of 80 x 48 pixels"):
        read_video(path, 3)


def test_rates_of_any_size():
    seconds = [i / 10 for i in range(40)]
    assert shown_at_rate(seconds, 4.0, 1.0) == [5, 15, 25, 35]
    for fps in (10, 1000, 1e9, 1e300):
        assert shown_at_rate(seconds, 4.0, fps) == list(range(40))
    for fps in (0.1, 1e-9, 1e-300):
        assert shown_at_rate(seconds, 4.0, fps) == [20]
    assert shown_at_rate([0.0, 1.0, 1e9], 1e9 + 1, 1.0) == [0, 1, 2]  # a tick without a new frame costs nothing


@pytest.mark.parametrize("level", ["ERROR", "VERBOSE"])
def test_reading_ends_where_pyav_logs(tmp_path, level):
    """Damaged HEVC: its threads have something to log while the decoder is closed, also before its end."""
    code = (
        "import av; from bt_adapter.data.video import read_video; from bt_adapter.data.stream import FrameStream\n"
        f"av.logging.set_level(av.logging.{level})\n"
        "for method in ('seek', 'sequential', 'auto'): print(read_video('log_level.mp4', 3, method=method).total)\n"
        "for _ in range(5): next(iter(FrameStream('log_level.mp4', chunk=2)))\n"
    )
    shutil.copy(MEDIA / "log_level.mp4", tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["54"] * 3


def test_pixels_that_are_not_square_are_not_stretched():
    assert read_video(MEDIA / "wide_pixels.mp4", 1).frames.shape == (1, 3, 96, 128)


def test_a_song_with_a_cover_is_no_video():
    with pytest.raises(VideoError, match="song.mp3: holds no video, only sound and a cover picture$"):
        read_video(MEDIA / "song.mp3")


@pytest.mark.parametrize(("suffix", "sound", "codec"), [("mp4", "aac", "libx264"), ("webm", "libopus", "libvpx")])
def test_a_video_behind_its_sound_is_read(tmp_path, suffix, sound, codec):
    """The packet that ends a stream says stream 0, which is then the sound."""
    path = tmp_path / f"sound-first.{suffix}"
    video_files.mux(
        path, video_files.numbered(8), range(0, 800, 100), codec, audio=0.5, sound_codec=sound, sound_first=True
    )
    with av.open(str(path)) as container:
        assert [stream.type for stream in container.streams] == ["audio", "video"]
    assert video_files.numbers(read_video(path, 8).frames) == list(range(8))
