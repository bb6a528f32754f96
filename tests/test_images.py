"""Pictures: which formats are read, as which colours, and what is told of those that cannot be."""

from __future__ import annotations

import errno
import os
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from bt_adapter.data import VideoError, read_image
from bt_adapter.data.patience import read_patiently
from bt_adapter.tune.batches import VisualReader
from bt_adapter.tune.conversations import Source

MEDIA = Path(__file__).parent / "media"
# How a picture is written, and by how much a colour may be off.
FORMATS = {
    "jpg": ({"quality": 95}, 4), "jpeg": ({"quality": 95, "progressive": True}, 4), "png": ({}, 0),
    "webp": ({"lossless": True}, 0), "gif": ({}, 4), "bmp": ({}, 0), "tif": ({}, 0),
    "tiff": ({"compression": "tiff_lzw"}, 0), "jp2": ({}, 0), "avif": ({"quality": 95}, 4), "ppm": ({}, 0),
}  # fmt: skip
COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (220, 220, 30))


def blocks(height: int = 64, width: int = 96) -> np.ndarray:
    """uint8 ``[H, W, 3]``: four quarters of one colour each."""
    pixels = np.empty((height, width, 3), np.uint8)
    for i, colour in enumerate(COLOURS):
        row, column = i // 2 * height // 2, i % 2 * width // 2
        pixels[row : row + height // 2, column : column + width // 2] = colour
    return pixels


def noise(height: int = 64, width: int = 96, channels: int = 3) -> np.ndarray:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def channels_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_colours_written(tmp_path, suffix):
    options, tolerance = FORMATS[suffix]
    Image.fromarray(blocks()).save(tmp_path / f"a.{suffix}", **options)
    pixels = read_image(tmp_path / f"a.{suffix}")
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 64, 96)
    for row in (0, 1):
        for column in (0, 1):
            found = pixels[:, 16 + 32 * row, 24 + 48 * column].to(int)
            assert (found - torch.tensor(COLOURS[2 * row + column])).abs().max() <= tolerance
    misnamed = tmp_path / "picture.dat"
    (tmp_path / f"a.{suffix}").rename(misnamed)
    assert torch.equal(read_image(str(misnamed)), pixels)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize(
    "name", ["shot%d", "%03d", "frame-%5d", "%%d", "a*", "a[12]", "a?", "{1,2}", "concat:a", "pipe:0"]
)
def test_a_name_is_no_pattern_and_no_address(tmp_path, monkeypatch, suffix, name):
    monkeypatch.chdir(tmp_path)
    for other in ("shot1", "001", "frame-00001", "%1", "a1", "aa", "1", "a"):
        Image.new("RGB", (8, 8), (0, 0, 0)).save(f"{other}.{suffix}")
    Image.new("RGB", (8, 8), (250, 250, 250)).save(
        f"{name}.{suffix}", format=Image.registered_extensions()[f".{suffix}"]
    )
    assert read_image(f"{name}.{suffix}").float().mean() > 240


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_a_file_that_is_cut_short_is_an_error_that_names_it(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise()).save(path, **FORMATS[suffix][0])
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with warnings.catch_warnings(), pytest.raises(VideoError, match=f"a.{suffix}: cannot be read as an image"):
        warnings.simplefilter("ignore")  # Pillow's own, of TIFF
        read_image(path)


def test_cut_stills_are_named_where_conversations_are_tuned_on(tmp_path):
    with pytest.raises(VideoError, match="truncated.jpg: cannot be read as an image .*truncated"):
        VisualReader(16, 2)(Source(str(MEDIA / "truncated.jpg"), "image"))


@pytest.mark.parametrize("name", ["animated.png", "animated.webp"])
def test_of_an_animation_the_first_picture_is_read(name):
    with Image.open(MEDIA / name) as image:
        assert image.n_frames > 1
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(channels_last(read_image(MEDIA / name)), expected)


@pytest.mark.parametrize("suffix", ["png", "webp", "gif", "tiff", "avif"])
def test_the_first_of_several_pictures(tmp_path, suffix):
    pictures = [Image.new("RGB", (32, 24), (value, value, value)) for value in (40, 120, 240)]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:])
    assert (read_image(tmp_path / f"a.{suffix}").float() - 40).abs().max() <= 3


def test_a_photo_of_two_pictures_as_phones_write_them(tmp_path):
    pictures = [Image.new("RGB", (32, 24), (value, value, value)) for value in (40, 240)]
    pictures[0].save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    assert (read_image(tmp_path / "a.jpg").float() - 40).abs().max() <= 3


def test_gray_palettes_and_transparency_become_rgb(tmp_path):
    wide = noise(channels=4)
    colour, gray = wide[..., :3], wide[..., 0]
    Image.fromarray(wide).save(tmp_path / "rgba.png")
    Image.fromarray(wide).save(tmp_path / "rgba.webp", lossless=True, exact=True)
    Image.fromarray(gray).save(tmp_path / "l.png")
    Image.fromarray(wide[..., :2], "LA").save(tmp_path / "la.png")
    palette = Image.fromarray(blocks()).quantize(8)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p.gif", transparency=1)
    palette.save(tmp_path / "pt.png", transparency=bytes(range(0, 256, 32)))
    Image.fromarray(gray > 127).save(tmp_path / "1.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {path.name: channels_last(read_image(path)) for path in tmp_path.iterdir()}
    for name in ("rgba.png", "rgba.webp"):
        assert np.array_equal(found[name], colour)
    for name in ("l.png", "la.png"):
        assert np.array_equal(found[name], np.repeat(gray[..., None], 3, 2))
    assert np.array_equal(found["1.png"], np.repeat((gray > 127)[..., None], 3, 2) * 255)
    for name in ("p.png", "p.gif", "pt.png"):
        assert np.abs(found[name].astype(int) - blocks()).max() <= 4


def test_inks_become_rgb(tmp_path):
    inks = np.zeros((16, 16, 4), np.uint8)
    inks[..., 0] = 255  # cyan alone
    for name in ("a.jpg", "a.tiff"):
        Image.fromarray(inks, "CMYK").save(tmp_path / name)
        assert (read_image(tmp_path / name)[:, 8, 8].to(int) - torch.tensor([0, 255, 255])).abs().max() <= 3


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.jp2", "a.pgm"])
def test_sixteen_bits_become_eight(tmp_path, name):
    values = np.linspace(0, 65535, 64 * 96).reshape(64, 96).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    found = channels_last(read_image(tmp_path / name)).astype(int)
    assert np.abs(found - values[..., None] / 257).max() <= 0.51 and found.max() == 255


def test_sixteen_bits_of_each_colour(tmp_path):
    rows = np.repeat(np.array([[0, 0x8000, 0xFFFF]], ">u2"), 4, 0)  # one row: a black, gray and white pixel would be 9
    raw = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in rows)
    write_png(tmp_path / "a.png", 3, 4, raw, depth=16)
    found = channels_last(read_image(tmp_path / "a.png"))
    assert found[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


def test_pixels_that_are_no_colours_are_refused(tmp_path):
    for kind in (np.float32, np.int32):
        Image.fromarray(np.zeros((8, 8), kind)).save(tmp_path / "a.tiff")
        with pytest.raises(VideoError, match="a.tiff: .*32-bit numbers; only 8 or 16 bits"):
            read_image(tmp_path / "a.tiff")


def write_png(path: Path, width: int, height: int, raw: bytes, depth: int = 8) -> None:
    """RGB; ``raw``: rows with the number of their filter before each."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("size", [(20000, 20000), (1 << 30, 1 << 30), (1, 1 << 30)])
def test_a_picture_of_too_many_pixels_is_an_error_that_names_it(tmp_path, size):
    write_png(tmp_path / "huge.png", *size, b"\0" * 100)
    with (
        warnings.catch_warnings(),
        pytest.raises(VideoError, match="huge.png: has too many pixels; .*MAX_IMAGE_PIXELS"),
    ):
        warnings.simplefilter("ignore")
        read_image(tmp_path / "huge.png")


def test_a_picture_for_which_there_is_no_memory_is_named(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")

    def full(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", full)
    monkeypatch.setattr("bt_adapter.data.patience.WAITS", (0.0,) * 5)
    with pytest.raises(VideoError, match="a.png: not enough memory to read it"):
        read_patiently(tmp_path / "a.png", read_image, tmp_path / "a.png")


def test_an_error_of_storage_is_not_the_pictures_own(tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    errors = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]
    load = PngImagePlugin.PngImageFile.load

    def failing(self):
        if errors:
            raise errors.pop()
        return load(self)

    monkeypatch.setattr("bt_adapter.data.patience.WAITS", (0.0,) * 5)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", failing)
    read_patiently(tmp_path / "a.png", read_image, tmp_path / "a.png")
    assert not errors


def test_what_is_no_regular_file_is_said_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(tmp_path / "socket.png"))
        for name, message in (
            ("pipe.png", "no regular file"), ("socket.png", "no regular file"), ("folder.png", "a directory"),
            ("none.png", "no such file"), ("loop.png", "cannot be read as an image"), ("/dev/zero", "no regular file"),
        ):  # fmt: skip
            with pytest.raises(VideoError, match=f"{name}: .*{message}"):
                read_image(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"no picture at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>"]
)
def test_of_another_format_the_error_says_which_are_read(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(VideoError, match="a.png: .*none of JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF"):
        read_image(tmp_path / "a.png")


def test_exif_that_is_damaged_says_nothing(tmp_path):
    Image.fromarray(blocks()).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff" + b"\xff" * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert read_image(tmp_path / "a.jpg").shape == (3, 64, 96)


def test_bytes_and_a_limit_on_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (6, 5), (1, 2, 3)).save(path)
    assert torch.equal(read_image(path.read_bytes(), 30), read_image(path))
    with pytest.raises(VideoError, match="a.png: its 6 x 5 pixels are more than the limit of 29"):
        read_image(path, 29)
    with pytest.raises(VideoError, match="<bytes>: cannot be read as an image"):
        read_image(b"no picture")
    with pytest.raises(ValueError, match="max_pixels"):
        read_image(path, 0)


def test_a_check_is_called_while_a_picture_is_read(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "a.png")
    content, calls = (tmp_path / "a.png").read_bytes(), []
    assert (read_image(content, check=lambda: calls.append(1)) == read_image(content)).all()
    assert len(calls) > len(content) / 4096

    def stop():
        raise VideoError("enough")

    with pytest.raises(VideoError, match="^enough$"):
        read_image(content, check=stop)
    with pytest.raises(TypeError, match="check is called for bytes only"):
        read_image(tmp_path / "a.png", check=stop)
