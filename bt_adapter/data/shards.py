"""Writes shards that the webdataset library and :func:`~bt_adapter.data.manifests.read_clips` can read."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from bt_adapter.data.clips import Clip, Member
from bt_adapter.data.loading import in_order
from bt_adapter.data.packed import Packed
from bt_adapter.data.patience import is_full, read_patiently
from bt_adapter.data.sampling import check_count
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.tars import VIDEOS
from bt_adapter.data.video import VideoError, write_video
from bt_adapter.errors import CommandError
from bt_adapter.files import digest, lock_folder, remove_unfinished, write_json, writing
from bt_adapter.progress import Progress

# Every frame is a keyframe, without the filters that are slowest to decode.
ENCODING = {"crf": "18", "g": "1", "tune": "fastdecode"}
PLAN = "shards.json"


def write_shards(
    clips: Sequence[Clip],
    folder: str | os.PathLike,
    per_shard: int,
    frames: int | None = None,
    short_side: int = 256,
    workers: int = 0,
    progress: Progress | None = None,
) -> Skipped:
    """Write clips as shards ``000000.tar``, ``000001.tar`` ... of ``per_shard`` clips each.

    A clip is ``NAME.mp4`` (or its file's own suffix) and ``NAME.json``: key, captions and, if set, start, end and
    label; a clip with one caption also has ``NAME.txt``. NAME is the clip's number and the part of its key that is safe
    in file names. A shard appears only when it is complete; its broken clips are listed in ``000000.json`` in the same
    folder. The same call resumes a killed run.

    Args:
        clips: clips to write.
        folder: created if missing.
        per_shard: clips per shard, including broken ones.
        frames: None: every file is copied unchanged. T: T frames, evenly spread over the clip, are encoded as H.264
            with only keyframes; start and end are dropped.
        short_side: with ``frames``, pixels of the short side; a smaller clip keeps its size.
        workers: processes that write shards in parallel; 0: this process writes them.
        progress: called with (shards done, shards in total).

    Returns:
        The clips that cannot be decoded and so are in no shard.

    Raises:
        CommandError: ``folder`` holds shards of other clips or settings, or another process writes into it.
        OSError, VideoError: the disk is full, or the folder is not writable.
    """
    check_count("per_shard", per_shard)
    check_count("short_side", short_side)
    if frames is not None:
        check_count("frames", frames)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(clips) // per_shard)
    with lock_folder(folder):
        _plan(folder, {"per_shard": per_shard, "frames": frames, "short_side": short_side if frames else None}, clips)
        missing = [number for number in range(count) if not _tar(folder, number).exists()]
        remove_unfinished(folder)
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left)
        shards = _Shards(clips, folder, per_shard, frames, short_side, missing)
        for done, _ in enumerate(in_order(shards, 0, len(missing), workers), count - len(missing) + 1):
            if progress is not None:
                progress(done, count)
    skipped = Skipped()
    for number in range(count):
        skipped.load_state_dict(json.loads(_note(folder, number).read_text(encoding="utf-8")))
    return skipped


def clips_lost(shards: Iterable[str]) -> Skipped:
    """Return the clips that :func:`write_shards` could not put into these .tar files, with the reasons.

    Shards that another program wrote have no such record and contribute nothing. Raises OSError.
    """
    lost = Skipped()
    for path in sorted(set(shards)):
        note = Path(path).with_suffix(".json")
        if note.with_name(PLAN).exists() and note.exists():
            lost.load_state_dict(json.loads(note.read_text(encoding="utf-8")))
    return lost


class _Shards(Dataset):
    """A data set whose item i writes shard ``missing[i]`` and returns its number."""

    def __init__(
        self, clips: Sequence[Clip], folder: Path, per_shard: int, frames: int | None, short_side: int,
        missing: list[int],
    ) -> None:  # fmt: skip
        self.clips, self.folder, self.per_shard = Packed(clips), folder, per_shard
        self.frames, self.short_side, self.missing = frames, short_side, missing

    def __getitem__(self, item: int) -> int:
        number, skipped = self.missing[item], Skipped()
        first = number * self.per_shard
        aside = tempfile.TemporaryDirectory(prefix=".writing-", dir=self.folder)
        with aside, writing(_tar(self.folder, number)) as tar_path:  # a shard counts as done once its .tar exists
            # The GNU format allows any file size, the POSIX 1988 format only 8 GiB.
            with tarfile.open(tar_path, "w", format=tarfile.GNU_FORMAT) as tar:
                for place in range(first, min(first + self.per_shard, len(self.clips))):
                    clip = self.clips[place]
                    try:
                        read_patiently(clip.path, self._store, tar, place, clip, Path(aside.name) / "clip.mp4")
                    except VideoError as error:
                        if is_full(error):
                            raise
                        skipped.add(clip.key, str(error))
            write_json(_note(self.folder, number), skipped.state_dict(), indent=1)
        return number

    def _store(self, tar: tarfile.TarFile, place: int, clip: Clip, aside: Path) -> None:
        """Add a clip to the tar completely or not at all. Raises VideoError, OSError."""
        begin = tar.offset
        try:
            suffix, video = self._video(clip, aside)
            _add(tar, f"{place:08d}-{_safe(clip.key)}", suffix, video, clip, whole=self.frames is None)
        except BaseException:
            assert tar.fileobj is not None
            tar.fileobj.seek(begin)
            tar.fileobj.truncate()  # type: ignore[attr-defined]
            tar.offset = begin
            raise

    def _video(self, clip: Clip, aside: Path) -> tuple[str, Member]:
        """Return the suffix of a clip and the location of its bytes. Raises VideoError, OSError."""
        if self.frames is None:
            clip.read(1, side=self.short_side)
            source = clip.source
            if isinstance(source, str):
                source = Member(source, 0, os.path.getsize(source), source)
            suffix = Path(source.name).suffix.lower()
            return suffix if suffix[1:] in VIDEOS else ".mp4", source
        video = clip.read(self.frames, repeat=True, side=self.short_side)
        seconds = float(video.timestamps[-1] - video.timestamps[0])
        rate = (self.frames - 1) / seconds if seconds > 0 else 1.0
        write_video(aside, _shrink(video.frames, self.short_side), fps=max(rate, 0.01), options=ENCODING)
        return ".mp4", Member(str(aside), 0, aside.stat().st_size, aside.name)


def _shrink(frames: torch.Tensor, short_side: int) -> torch.Tensor:
    """Resize uint8 ``[T, 3, H, W]`` to a short side of at most ``short_side`` and even sides, which H.264 needs."""
    height, width = frames.shape[-2:]
    factor = min(1.0, short_side / min(height, width))
    size = tuple(max(2, round(side * factor / 2) * 2) for side in (height, width))
    if size == (height, width):
        return frames
    return F.interpolate(frames, size=size, mode="bicubic", antialias=True)


def _add(tar: tarfile.TarFile, name: str, suffix: str, video: Member, clip: Clip, whole: bool) -> None:
    about: dict[str, Any] = {"key": clip.key, "captions": list(clip.captions)}
    about |= {"start": clip.start, "end": clip.end} if whole else {}
    about |= {"label": clip.label}
    about = {field: value for field, value in about.items() if value is not None}
    with open(video.path, "rb") as file:
        file.seek(video.offset)
        _add_file(tar, name + suffix, video.size, file)
    add_bytes(tar, name + ".json", json.dumps(about, ensure_ascii=False).encode())
    if len(clip.captions) == 1:
        add_bytes(tar, name + ".txt", clip.captions[0].encode())


def add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file of no user and no time to a tar, so that the same content gives the same bytes."""
    _add_file(tar, name, len(content), io.BytesIO(content))


def _add_file(tar: tarfile.TarFile, name: str, size: int, file: BinaryIO) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    tar.addfile(info, file)


def _plan(folder: Path, settings: dict[str, Any], clips: Sequence[Clip]) -> None:
    """Store the settings and a digest of the clips in the folder; raise CommandError if it holds others."""
    found = digest((repr(clip).encode(errors="surrogatepass") for clip in clips), 32)
    plan = {**settings, "clips": len(clips), "digest": found}
    path = folder / PLAN
    if path.exists():
        old = json.loads(path.read_text(encoding="utf-8"))
        if wrong := [f"{name} {old.get(name)}, now {plan[name]}" for name in plan if old.get(name) != plan[name]]:
            raise CommandError(
                f"{folder} holds shards of other clips or settings ({'; '.join(wrong)}): name another folder"
            )
        return
    if any(folder.glob("*.tar")):
        raise CommandError(f"{folder} holds .tar files of another program: name another folder")
    write_json(path, plan, indent=1)


def _safe(key: str) -> str:
    """Return the part of a key that is safe in a member's name: no slash, and no dot, which would begin the suffix."""
    stem = re.sub(r"\.[A-Za-z0-9]{1,4}$", "", key)
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[-60:].strip("_-") or "clip"


def _tar(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.tar"


def _note(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.json"
