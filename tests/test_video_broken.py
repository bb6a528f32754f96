# ruff: noqa: F811 (fixtures)
"""Broken video files: a clear error, or what is left of them."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_files import (  # noqa: F401 (fixtures)
    HEIGHT,
    WIDTH,
    clip,
    folder,
    long_clip,
    numbered,
    numbers,
    write_sound,
    write_tagged,
)

from bt_adapter.data import VideoError, _source, read_video, write_video
from bt_adapter.data import _decode as decode


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    made = {
        "missing": (folder / "missing.mp4", "no such file"),
        "directory": (folder / "directory.mp4", "is a directory"),
        "empty": (folder / "empty.mp4", r"the file is empty \(0 bytes\)"),
        "text": (folder / "text.mp4", "cannot be read as a video file"),
        "text.txt": (folder / "text.txt", "cannot be read as a video file"),
        "junk": (folder / "junk.mp4", "cannot be read as a video file"),
        "playlist": (folder / "playlist.m3u8", "cannot be read as a video file"),
        "cut": (folder / "cut.mp4", "cannot be read as a video file|no frame can be decoded"),
        "wav": (folder / "sound.wav", "holds no video, only sound$"),
        "m4a": (folder / "sound.m4a", "holds no video, only sound$"),
        "no frames": (folder / "none.mp4", "no frame can be decoded|holds no video|cannot be read"),
    }
    made["directory"][0].mkdir()
    made["empty"][0].write_bytes(b"")
    for name in ("text", "text.txt"):
        made[name][0].write_text("This is no video.\n" * 100)
    made["junk"][0].write_bytes(np.random.default_rng(0).bytes(20000))
    write_video(folder / "whole.mp4", numbered(10))
    made["playlist"][0].write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nwhole.mp4\n#EXT-X-ENDLIST\n")
    made["cut"][0].write_bytes((folder / "whole.mp4").read_bytes()[:200])
    write_sound(made["wav"][0], "pcm_s16le")
    write_sound(made["m4a"][0], "aac")
    with av.open(str(made["no frames"][0]), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
    return made


BAD = [
    "missing", "directory", "empty", "text", "text.txt", "junk", "playlist", "cut", "wav", "m4a", "no frames"
]  # fmt: skip


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return bad_files(tmp_path_factory.mktemp("bad"))


@pytest.mark.parametrize("kind", BAD)
def test_bad_files(bad, kind):
    path, message = bad[kind]
    with pytest.raises(VideoError, match=message) as caught:
        read_video(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_video_stream_whose_packets_are_gone(tmp_path):
    """A header that announces frames, and nothing behind it."""
    path = tmp_path / "header.mp4"
    write_fast_start(path, numbered(20))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"mdat") + 4])
    with pytest.raises(VideoError, match="header.mp4: no frame can be decoded|header.mp4: cannot be read"):
        read_video(path)


def write_fast_start(path, frames):
    """Header before the frames, so that a cut file still has one."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "0", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_truncated_file_gives_what_is_there(tmp_path, suffix, share):
    generator = torch.Generator().manual_seed(0)
    frames = numbered(40) // 2 + torch.randint(0, 100, (40, 1, HEIGHT, WIDTH), generator=generator).to(torch.uint8)
    whole = tmp_path / f"whole{suffix}"
    write_fast_start(whole, frames) if suffix == ".mp4" else write_video(whole, frames)
    assert not read_video(whole).truncated
    path = tmp_path / f"cut{suffix}"
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    video = read_video(path, None)
    assert video.truncated
    assert 40 * share * 0.4 <= video.total < 40
    assert video.indices.tolist() == list(range(video.total))
    assert video.duration <= video.total / 8 + 0.2
    full = read_video(whole, None).frames
    assert torch.equal(video.frames[: video.total - 2], full[: video.total - 2])  # the last may be half there
    assert read_video(path, 8).frames.shape[0] == 8
    if suffix == ".mp4":
        assert read_video(path.read_bytes(), 8).truncated


def test_a_tag_that_is_not_utf8_is_no_damage(tmp_path, clip):
    path = write_tagged(tmp_path / "tagged.mp4", clip)
    video = read_video(path, None)
    assert numbers(video.frames) == list(range(40)) and not video.truncated


@pytest.mark.parametrize(("where", "message"), [("open", "read as a video file"), ("keep", "decoded")])
def test_whatever_pyav_makes_of_a_file_is_a_video_error(clip, monkeypatch, where, message):
    def fail(*arguments, **options):
        raise ValueError("odd")

    monkeypatch.setattr(_source.av if where == "open" else decode.Taken, where, fail)
    with pytest.raises(VideoError, match=rf"clip.mp4: cannot be {message} \(odd\)"):
        read_video(clip, 2)


def test_damage_in_the_middle(tmp_path, long_clip):
    data = bytearray(long_clip.read_bytes())
    at = len(data) // 2
    data[at : at + 3000] = np.random.default_rng(0).bytes(3000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    video = read_video(path, 8, method="sequential")
    assert video.truncated and video.frames.shape[0] == 8
    assert numbers(video.frames[:2]) == video.indices[:2].tolist()


def test_cover_picture_is_no_video(tmp_path):
    sound = write_sound(tmp_path / "sound.m4a", "aac")
    path = tmp_path / "song.mp4"
    with av.open(str(sound)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        cover = container.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        for packet in source.demux(source.streams.audio[0]):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(VideoError, match="holds no video, only sound and a cover picture$"):
        read_video(path)
