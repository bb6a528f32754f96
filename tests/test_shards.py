"""Shards: what is written is read back, by ourselves and by the webdataset library, and a killed run goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace

import av
import pytest
import torch
from clip_files import write_folder
from video_files import numbered, numbers

from bt_adapter.commands import cli
from bt_adapter.data import TrainTransform, write_video
from bt_adapter.data import shards as module
from bt_adapter.data.clips import Clip
from bt_adapter.data.loading import TrainingClips, batches
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.shards import write_shards
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 clips, 4 of them broken, 4 cut: manifest and names of the broken ones."""
    return write_folder(tmp_path_factory.mktemp("clips") / "folder", 40)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Three clips with odd names, parts and captions."""
    path = tmp_path_factory.mktemp("odd") / "a.b.c.mp4"
    write_video(path, numbered(24))
    wide = path.with_name("wide.mp4")
    write_video(wide, numbered(8, 96, 192))
    return [
        Clip("x/a.b.c.mp4", str(path), ("läuft", "runs")),
        Clip("x_a.b.c.mp4", str(path), ("a part",), start=1.0, end=2.0),
        Clip("☃", str(wide), ("class",), label=3),
    ]


def test_files_as_they_are(odd, tmp_path):
    assert len(write_shards(odd, tmp_path, 2)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".lock", "000000.json", "000000.tar", "000001.json", "000001.tar", "shards.json",
    ]  # fmt: skip
    back, skipped = read_clips(tmp_path)
    assert len(skipped) == 0
    assert [replace(clip, source="") for clip in back] == [replace(clip, source="") for clip in odd]
    for clip, original in zip(back, odd, strict=True):
        with open(original.source, "rb") as file:
            assert clip.source.read() == file.read()
    assert numbers(back[1].read(4).frames) == [9, 11, 13, 15]  # of 8 to 15


def test_a_few_key_frames_of_each(odd, tmp_path):
    assert len(write_shards(odd, tmp_path, 10, frames=4, short_side=48)) == 0
    back, _ = read_clips(tmp_path)
    assert [(clip.key, clip.captions, clip.start, clip.end, clip.label) for clip in back] == [
        (clip.key, clip.captions, None, None, clip.label) for clip in odd
    ]
    assert numbers(back[0].read(4).frames) == [3, 9, 15, 21]
    assert numbers(back[1].read(4).frames) == [9, 11, 13, 15]
    assert tuple(back[2].read(4).frames.shape) == (4, 3, 48, 96)
    for clip, seconds in zip(back, (3.0, 1.0, 1.0), strict=True):
        assert clip.read(4).duration == pytest.approx(seconds, rel=0.02)
        with av.open(clip.source.open()) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            assert len(packets) == 4 and all(packet.is_keyframe for packet in packets)


def test_the_webdataset_library_reads_them(odd, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset (extra: train)")
    write_shards(odd, tmp_path, 2, frames=2)
    urls = sorted(str(path) for path in tmp_path.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["json"]["captions"] for sample in samples] == [list(clip.captions) for clip in odd]
    assert len({sample["__key__"] for sample in samples}) == 3
    assert [sample.get("txt") for sample in samples] == [None, "a part", "class"]
    assert all(len(sample["mp4"]) > 100 for sample in samples)


def test_shards_of_the_webdataset_library_are_read(odd, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="needs webdataset (extra: train)")
    with open(odd[2].source, "rb") as file, webdataset.TarWriter(str(tmp_path / "0.tar")) as writer:
        video = file.read()
        writer.write({"__key__": "one", "mp4": video, "txt": "läuft"})
        writer.write({"__key__": "deep/two", "mp4": video, "json": {"caption": "sits"}})
    clips, skipped = read_clips(tmp_path)
    assert {clip.key: clip.captions for clip in clips} == {"one": ("läuft",), "deep/two": ("sits",)}
    assert len(skipped) == 0 and all(numbers(clip.read(8).frames) == list(range(8)) for clip in clips)


@pytest.mark.parametrize("frames", [None, 2])
def test_broken_clips_are_in_no_shard_and_named(folder, tmp_path, frames):
    clips, _ = read_clips(folder[0])
    seen = []
    skipped = write_shards(clips, tmp_path, 8, frames, 32, workers=2, progress=lambda *step: seen.append(step))
    assert set(skipped.reasons) == folder[1] and seen == [(n, 5) for n in range(1, 6)]
    back, rest = read_clips(tmp_path)
    assert {clip.key for clip in back} == {clip.key for clip in clips} - folder[1] and len(rest) == 0


def test_the_same_shards_whatever_the_workers(folder, tmp_path):
    clips = read_clips(folder[0])[0][:8]
    for workers in (0, 2):
        write_shards(clips, tmp_path / str(workers), 4, frames=2, workers=workers)
    for number in range(2):
        mine, theirs = ((tmp_path / workers / f"00000{number}.tar").read_bytes() for workers in "02")
        assert mine == theirs


def test_a_killed_run_goes_on_without_writing_a_whole_shard_again(folder, tmp_path, monkeypatch):
    clips = read_clips(folder[0])[0][:20]
    video = module._Shards._video

    def killed(self, clip, aside):
        if clip.key == clips[9].key:  # inside the third shard of four clips
            raise KeyboardInterrupt
        return video(self, clip, aside)

    monkeypatch.setattr(module._Shards, "_video", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(clips, tmp_path, 4)
    (tmp_path / ".writing-left").mkdir()
    whole = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*.tar")}
    assert set(whole) == {"000000.tar", "000001.tar"}
    monkeypatch.setattr(module._Shards, "_video", video)
    skipped = write_shards(clips, tmp_path, 4)
    assert set(skipped.reasons) == folder[1] & {clip.key for clip in clips}
    for name, before in whole.items():
        assert (tmp_path / name).stat().st_mtime_ns == before[0]
    assert len(list(tmp_path.glob("*.tar"))) == 5 and not list(tmp_path.glob(".writing*"))
    assert {clip.key for clip in read_clips(tmp_path)[0]} == {clip.key for clip in clips} - set(skipped.reasons)


def test_a_full_disk_is_no_broken_clip(odd, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module._Shards, "_video", full)
    with pytest.raises(OSError, match="No space"):
        write_shards(odd, tmp_path, 2)
    assert not list(tmp_path.glob("*.tar"))


def test_other_clips_and_other_shards_are_not_mixed(odd, tmp_path):
    write_shards(odd[:1], tmp_path, 2)
    for arguments, message in (
        ((odd[:2], tmp_path, 2), "clips 1, now 2"),
        ((odd[:1], tmp_path, 3), "per_shard 2, now 3"),
        ((odd[:1], tmp_path, 2, 4), "frames None, now 4"),
    ):
        with pytest.raises(CommandError, match=message):
            write_shards(*arguments)
    (tmp_path / "shards.json").unlink()
    with pytest.raises(CommandError, match="of another program"):
        write_shards(odd[:1], tmp_path, 2)


def test_a_shard_with_a_broken_member_and_one_that_breaks_off_are_trained_on(folder, tmp_path):
    manifest, broken = folder
    clips, _ = read_clips(manifest)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w", dereference=True) as tar:  # no links inside
            for clip in clips[20 * shard : 20 * shard + 20]:
                stem = clip.key.removesuffix(".mp4")
                tar.add(clip.source, f"{stem}.mp4")
                text = tmp_path / "caption.txt"
                text.write_text(clip.captions[0])
                tar.add(text, f"{stem}.txt")
    content = (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        end = tar.getmember("clip039.mp4").offset_data + 300
    (tmp_path / "1.tar").write_bytes(content[:end])
    listed, skipped = read_clips(tmp_path)
    failed = Skipped()
    seen = set()
    clips_of = TrainingClips(listed, 2, TrainTransform(16), 0)
    for batch in batches(clips_of, len(listed) // 4, 0, 1, 0, 4 * 3, 0):
        seen |= set(batch.captions)
        for key, reason in batch.failed:
            failed.add(key, reason)
    lost = {"1.tar/clip039"} | {f"{n}.tar/{k.removesuffix('.mp4')}" for n, k in empty(clips, broken)}
    assert set(skipped.reasons) == lost
    named = {key.removesuffix(".mp4") for key in broken} - {name.partition("/")[2] for name in lost}
    assert set(failed.reasons) == named and named
    assert len(seen) == 40 - len(broken | {"clip039.mp4"})


def empty(clips: list[Clip], broken: set[str]) -> list[tuple[int, str]]:
    """Shard and key of the broken clips without a byte: those are seen in the tar already."""
    return [(n // 20, c.key) for n, c in enumerate(clips) if c.key in broken and not os.path.getsize(c.source)]


def test_the_command_writes_and_tells_what_is_missing(folder, tmp_path, capsys):
    arguments = ["shards", "--data", str(folder[0]), "--out", str(tmp_path / "out"), "--per-shard", "30"]
    assert cli.main([*arguments, "--frames", "2", "--short-side", "32"]) == 0
    out, err = capsys.readouterr()
    assert "36 clips in 2 shards" in out and all(key in err for key in folder[1])
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["short_side"] == 32
    for wrong in (["--frames", "0"], ["--workers", "-1"], ["--max-skipped", "2"]):
        assert cli.main([*arguments, *wrong]) == 2
        assert f"{wrong[0]} must" in capsys.readouterr().err
    assert cli.main([*arguments, "--frames", "2", "--short-side", "32", "--max-skipped", "0.05"]) == 2
    assert "4 of 40 clips cannot be used" in capsys.readouterr().err
    assert cli.main([*arguments, "--frames", "3"]) == 2
    assert "frames 2, now 3" in capsys.readouterr().err


def test_where_no_clip_can_be_decoded_the_command_fails(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video " * 20)
    (tmp_path / "clips.jsonl").write_text('{"video": "a.mp4", "caption": "x"}\n')
    assert cli.main(["shards", "--data", str(tmp_path / "clips.jsonl"), "--out", str(tmp_path / "out")]) == 2
    assert "none of 1 clips can be decoded" in capsys.readouterr().err


def test_two_processes_do_not_write_into_one_folder(odd, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (tmp_path / ".writing-other").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(CommandError, match="--out .* is in use"):
            write_shards(odd, tmp_path, 2)
        other.communicate(b"\n")
    assert (tmp_path / ".writing-other").exists()
    write_shards(odd, tmp_path, 2)
    assert not (tmp_path / ".writing-other").exists()


def test_frames_shrink_to_even_sides_and_never_grow():
    sizes = {(100, 300): (64, 192), (301, 101): (190, 64), (30, 31): (30, 32), (64, 64): (64, 64)}
    for size, expected in sizes.items():
        found = module._shrink(torch.zeros(1, 3, *size, dtype=torch.uint8), 64)
        assert tuple(found.shape[-2:]) == expected


def test_a_video_of_more_than_8_gib_is_copied_without_being_held(tmp_path, monkeypatch):
    """It is one large hole, and what would be copied of it is noted instead."""
    size, big, copied = (8 << 30) + 5, tmp_path / "big.mp4", []
    big.touch()
    os.truncate(big, size)
    monkeypatch.setattr(Clip, "read", lambda self, frames, **rest: None)
    monkeypatch.setattr(tarfile, "copyfileobj", lambda file, tar, length, **rest: copied.append((file, length)))
    assert len(write_shards([Clip("big", str(big), ("long",))], tmp_path / "out", 3)) == 0
    assert (copied[0][0].name, copied[0][1]) == (str(big), size)
    with open(tmp_path / "out" / "000000.tar", "rb") as file:
        assert tarfile.TarInfo.frombuf(file.read(512), "utf-8", "strict").size == size


@pytest.mark.parametrize("at_once", [0, 1 << 30])
def test_a_large_member_of_a_shard_is_read_as_it_is_needed(odd, tmp_path, monkeypatch, at_once):
    write_shards(odd, tmp_path, 3)
    monkeypatch.setattr("bt_adapter.data.clips._AT_ONCE", at_once)
    back, _ = read_clips(tmp_path)
    for clip, original in zip(back, odd, strict=True):
        with open(original.source, "rb") as file, clip.source.open() as member:
            content = file.read()
            assert member.read() == content == clip.source.read()
            member.seek(-5, os.SEEK_END)
            assert member.read() == content[-5:] and member.name.endswith(".mp4")
        assert torch.equal(clip.read(4).frames, original.read(4).frames)


def test_a_clip_that_fails_while_it_is_copied_leaves_nothing_in_the_shard(odd, tmp_path, monkeypatch):
    add, left = module._add_file, [2]

    def failing(tar, name, size, file):
        if name.startswith("00000001") and name.endswith(".json") and left[0]:
            left[0] -= 1
            tar.fileobj.write(b"half of it")
            raise OSError(5, "Input/output error")
        add(tar, name, size, file)

    monkeypatch.setattr("bt_adapter.data.patience.WAITS", (0.0,) * 5)
    monkeypatch.setattr(module, "_add_file", failing)
    assert len(write_shards(odd, tmp_path / "failing", 3)) == 0 and left == [0]
    monkeypatch.setattr(module, "_add_file", add)
    write_shards(odd, tmp_path / "whole", 3)
    assert (tmp_path / "failing" / "000000.tar").read_bytes() == (tmp_path / "whole" / "000000.tar").read_bytes()
