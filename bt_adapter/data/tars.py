"""Shards of webdataset, read as an index of what is where in them."""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from bt_adapter.data.clips import Member
from bt_adapter.data.finding import SUFFIXES
from bt_adapter.data.gathering import Gathered, captions_of, seconds
from bt_adapter.data.patience import is_mistake, is_passing, read_patiently
from bt_adapter.data.video import VideoError

VIDEOS = frozenset(suffix[1:] for suffix in SUFFIXES)


_LARGEST_HEADER = 1 << 20  # bytes that one header may take: long names and PAX records
_LARGEST_TEXT = 1 << 24  # bytes of a .json or .txt
_PADDING = 20 * tarfile.BLOCKSIZE  # zeros that tar writes behind the last member
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"\x04\"M\x18": "lz4",
    b"PK\3\4": "zip",
}  # fmt: skip
_KINDS = {
    tarfile.LNKTYPE: "a hard link to {0.linkname}", tarfile.SYMTYPE: "a symbolic link to {0.linkname}",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


def looks_like_tar(path: str) -> bool:
    """Whether a file begins as tars do. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"


def compression(path: str) -> str | None:
    """By what a file is compressed, as its first bytes say. Raises OSError."""
    with open(path, "rb") as file:
        begin = file.read(8)
    return next((name for mark, name in _COMPRESSED.items() if begin.startswith(mark)), None)


def read_shard(path: str, gathered: Gathered) -> None:
    """Take the clips of a tar. Whatever is broken, incomplete or of no use in it is noted, and nothing raised for it.

    Raises CommandError where storage fails.
    """
    shard = os.path.basename(path)
    try:
        found = read_patiently(path, _list_members, path)
        for key, reason in found.lost.items():
            gathered.skipped.add(f"{shard}/{key}", reason)
        with open(path, "rb") as file:
            for key, parts in found.samples.items():
                if key not in found.lost:
                    _take(gathered, path, key, parts, file)
    except VideoError as error:
        gathered.skipped.add(path, str(error).removeprefix(f"{path}: "))
        return
    for where, reason in found.problems.items():
        gathered.skipped.add(where, reason)


def _take(gathered: Gathered, path: str, key: str, parts: dict[str, Member], file: BinaryIO) -> None:
    shard = os.path.basename(path)
    try:
        video, about = _sample(parts, file)
        start, end = seconds("start", about.get("start")), seconds("end", about.get("end"))
    except ValueError as error:
        gathered.skipped.add(f"{shard}/{key}", str(error))
        return
    name, label = about.get("key"), about.get("label")
    name = name if isinstance(name, str) and name else key
    if name in gathered:  # many makers of shards count from 0 in each
        name = f"{shard}/{name}"
    label = label if isinstance(label, int) else None
    gathered.take(f"{path}, {key}", name, video, captions_of(about), start, end, label)


@dataclass
class _Found:
    """The files in a tar.

    Attributes:
        samples: by key and extension. lost: by key, why a file of it cannot be used. problems: of the tar, by where.
    """

    samples: dict[str, dict[str, Member]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class _Headers(io.FileIO):
    """A tar of which headers alone are read: no damaged one makes the reader ask for gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _list_members(path: str) -> _Found:
    """Every file in a tar, up to where it is damaged. Raises OSError, and VideoError for what is no tar at all."""
    found = _Found()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise VideoError(f"{path}: is no regular file")
    packed = compression(path)
    if packed is not None:
        raise VideoError(f"{path}: is compressed by {packed}; members are read by their place, so unpack it before")
    size, end = os.path.getsize(path), 0
    try:
        with _Headers(path) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if tar.offset <= info.offset or info.size < 0:
                    raise tarfile.ReadError("a size below 0")
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all, and needs none of them
                end = tar.offset
                if not _note(found, path, info, size):
                    return found
            end = tar.offset
    except Exception as error:  # of damaged headers tarfile raises much more than its own errors
        if is_passing(error) or is_mistake(error):
            raise
        found.problems[path] = f"is broken as a tar at byte {end} of {size} ({error}): what follows is lost"
        return found
    with open(path, "rb") as file:
        file.seek(end)
        block, rest = file.read(tarfile.BLOCKSIZE), file.read(_PADDING)
    if any(block):
        found.problems[path] = f"is broken as a tar at byte {end} of {size}: what follows is lost"
    elif len(block) < tarfile.BLOCKSIZE:
        found.problems[path] = f"breaks off at byte {size}: what followed is lost"
    elif any(rest):
        found.problems[path] = f"goes on after its end mark at byte {end} (joined tars?): what follows is not read"
    return found


def _note(found: _Found, path: str, info: tarfile.TarInfo, size: int) -> bool:
    """Put a member where it belongs. Returns whether the tar, of ``size`` bytes, goes on behind it."""
    key, extension = group_of(info.name)
    if info.isdir():
        return True
    if not info.isreg():
        kind = _KINDS.get(info.type, f"no file but of type {info.type!r}").format(info)
        found.lost.setdefault(key, f"its .{extension} is {kind}; only files stored as such are read")
    elif info.issparse():
        found.lost.setdefault(key, f"its .{extension} is stored with holes (sparse), of which a tar leaves bytes out")
    elif info.offset_data + info.size > size:
        found.lost.setdefault(key, f"the tar ends inside its .{extension}")
        return False
    else:
        member = Member(path, info.offset_data, info.size, info.name)
        if found.samples.setdefault(key, {}).setdefault(extension, member) is not member:
            where = f"{info.name} at byte {info.offset_data} of {path}"
            found.problems[where] = "another file before it has the same name"
    return True


def _sample(parts: dict[str, Member], file: BinaryIO) -> tuple[Member, dict[str, Any]]:
    """The video, and what is said of it. Raises ValueError."""
    videos = [member for extension, member in parts.items() if extension.rpartition(".")[2] in VIDEOS]
    if len(videos) != 1:
        beside = ", ".join(f".{extension}" for extension in parts)
        if not videos:
            raise ValueError(f"no video under its key (only {beside})")
        raise ValueError(f"{len(videos)} videos under one key ({beside}); a key holds no dot")
    if videos[0].size == 0:
        raise ValueError("its video is empty (0 bytes)")
    about: dict[str, Any] = {}
    if "json" in parts:
        try:
            value = json.loads(_text(parts["json"], file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .json is no JSON ({error})") from error
        about = value if isinstance(value, dict) else {}
    if captions_of(about) is None and "txt" in parts:
        about["caption"] = _text(parts["txt"], file)
    return videos[0], about


def _text(member: Member, file: BinaryIO) -> str:
    if member.size > _LARGEST_TEXT:
        raise ValueError(f"its {member.name} has {member.size} bytes, more than the {_LARGEST_TEXT} of a text")
    content = read_patiently(member.path, _bytes, member, file)
    return content.decode("utf-8-sig", errors="surrogateescape")


def _bytes(member: Member, file: BinaryIO) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def group_of(name: str) -> tuple[str, str]:
    """Key and extension of a member of a shard: webdataset cuts the file's name at its first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
