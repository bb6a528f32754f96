"""Pictures and videos that are to be shown turned or mirrored come out upright, for each of the eight orientations."""

import gc
import io
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bt_adapter.data import read_image, read_video, write_video
from bt_adapter.data.orientation import Orientation, OrientationReader

# Upper left red, upper right green, lower left blue, lower right yellow.
CORNERS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "Y": (255, 255, 0)}
ONE = 1 << 16
# EXIF's number -> the matrix of a video to the same effect (a, b, c, d: libavutil/display.h), and what is to be seen.
ORIENTATIONS = {
    1: ((ONE, 0, 0, ONE), "RG/BY"),
    2: ((-ONE, 0, 0, ONE), "GR/YB"),
    3: ((-ONE, 0, 0, -ONE), "YB/GR"),
    4: ((ONE, 0, 0, -ONE), "BY/RG"),
    5: ((0, ONE, ONE, 0), "RB/GY"),
    6: ((0, ONE, -ONE, 0), "BR/YG"),
    7: ((0, -ONE, -ONE, 0), "YG/BR"),
    8: ((0, -ONE, ONE, 0), "GY/RB"),
}


def stored() -> np.ndarray:
    """uint8 [64, 96, 3]."""
    quarters = [[np.full((32, 48, 3), CORNERS[c], np.uint8) for c in row] for row in ("RG", "BY")]
    return np.concatenate([np.concatenate(row, 1) for row in quarters])


def corners(pixels) -> str:
    """The colours of the four quarters of [3, H, W] by name."""
    height, width = pixels.shape[1:]
    names = []
    for y in (height // 4, 3 * height // 4):
        for x in (width // 4, 3 * width // 4):
            colour = pixels[:, y, x].float().numpy()
            names.append(min(CORNERS, key=lambda name: np.abs(colour - CORNERS[name]).sum()))  # noqa: B023
    return "{}{}/{}{}".format(*names)


@pytest.mark.parametrize("number", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "avif"])
def test_pictures(tmp_path, suffix, number):
    path, tags = tmp_path / f"picture.{suffix}", Image.Exif()
    tags[0x112] = number
    Image.fromarray(stored()).save(path, exif=tags)
    pixels = read_image(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    assert pixels.shape == (3, *expected.shape[:2])
    assert corners(pixels) == ORIENTATIONS[number][1]


@pytest.mark.parametrize("number", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize("scale", [1, 0.5])
def test_videos(tmp_path, suffix, number, scale):
    path = tmp_path / f"video.{suffix}"
    (a, b, c, d), seen = ORIENTATIONS[number]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.set_display_matrix([int(v * scale) for v in (a, b, 0, c, d, 0)] + [0, 0, 1 << 30])
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(stored(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for method in ("sequential", "seek"):
        video = read_video(path, 2, method=method)
        assert video.frames.shape[2:] == ((96, 64) if number > 4 else (64, 96))
        assert [corners(frame) for frame in video.frames] == [seen] * 2


def test_frames_that_were_read_are_freed(tmp_path):
    """PyAV's frames and their side data hold each other, until Python looks for such cycles."""
    path = tmp_path / "video.mp4"
    write_video(path, torch.zeros(60, 3, 64, 96, dtype=torch.uint8))
    reader = OrientationReader()
    gc.collect()
    gc.disable()
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                assert reader.read(frame) == Orientation()
        del frame
        held = [o for o in gc.get_objects() if isinstance(o, av.VideoFrame) and o.width * o.height > 4]
        assert len(held) == 0
    finally:
        gc.enable()


def test_side_data_of_a_kind_that_pyav_does_not_know(tmp_path):
    """Pictures of a Motion JPEG may have EXIF, at which PyAV gives up showing any side data."""
    content, tags = io.BytesIO(), Image.Exif()
    tags[0x112] = 6
    Image.fromarray(stored()).save(content, "jpeg", exif=tags)
    path = tmp_path / "photos.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p"
        for i in range(3):
            packet = av.Packet(content.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, i, i, Fraction(1, 10)
            packet.is_keyframe = True
            container.mux(packet)
    video = read_video(path, 2)
    assert video.frames.shape[2:] == (96, 64)
    assert [corners(frame) for frame in video.frames] == [ORIENTATIONS[6][1]] * 2
