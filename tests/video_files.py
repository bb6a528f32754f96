"""Video files for tests, whose frames tell their own numbers."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from bt_adapter.data import write_video

HEIGHT, WIDTH = 48, 64
# Frame i shows the number i as nine bits, bright or dark, in 3 x 3 blocks, which survive lossy coding.
BITS = 9


def numbered(count: int, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """uint8 [count, 3, H, W]: frames that tell their own number."""
    frames = torch.full((count, 3, height, width), 30, dtype=torch.uint8)
    for i in range(count):
        for bit in range(BITS):
            row, column = divmod(bit, 3)
            rows = slice(row * height // 3, (row + 1) * height // 3)
            columns = slice(column * width // 3, (column + 1) * width // 3)
            frames[i, :, rows, columns] = 200 if i >> bit & 1 else 50
    return frames


def numbers(frames: torch.Tensor) -> list[int]:
    """The number each frame shows."""
    height, width = frames.shape[2:]
    grey = frames.float().mean(1)
    result = []
    for frame in grey:
        bits = 0
        for bit in range(BITS):
            row, column = divmod(bit, 3)
            y, x = (2 * row + 1) * height // 6, (2 * column + 1) * width // 6
            bits |= int(frame[y - 3 : y + 3, x - 3 : x + 3].mean() > 125) << bit
        result.append(bits)
    return result


def mux(
    path, frames, pts, codec="libx264", time_base=Fraction(1, 1000), options=None, rotation=None, audio=None,
    sound_codec="aac", sound_first=False,
):  # fmt: skip
    """Write frames at times of our choice, in units of time_base. audio: seconds of sound."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream(sound_codec, rate=16000, layout="mono") if sound_first else None
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if audio and not sound_first:
            sound = container.add_stream(sound_codec, rate=16000, layout="mono")
        for frame, time in zip(frames, pts, strict=True):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts, picture.time_base = int(time), time_base
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
        if sound is not None:
            mux_sound(container, sound, audio)
    return path


def mux_sound(container, stream, seconds):
    for start in range(0, int(16000 * seconds), 1024):
        wave = np.sin(np.arange(start, start + 1024) * 0.1, dtype=np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))


def write_sound(path, codec):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16000, layout="mono")
        mux_sound(container, stream, 0.5)
    return path


def write_tagged(path, source):
    """The video of another file, with a title in Latin-1, as old tools write it."""
    with av.open(str(source)) as old, av.open(content := io.BytesIO(), "w", format="mp4") as container:
        container.metadata["title"] = "a cafe"
        stream = container.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    assert content.getvalue().count(b"a cafe") == 1
    path.write_bytes(content.getvalue().replace(b"a cafe", b"a caf\xe9"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def clip(folder) -> Path:
    """40 frames at 8 frames a second, B-frames, one key frame."""
    write_video(folder / "clip.mp4", numbered(40), fps=8)
    return folder / "clip.mp4"


@pytest.fixture(scope="module")
def long_clip(folder) -> Path:
    """400 frames, a key frame every 20."""
    path = folder / "long.mp4"
    write_video(path, numbered(400), fps=25, options={"g": "20", "preset": "ultrafast", "bf": "2", "crf": "18"})
    return path
