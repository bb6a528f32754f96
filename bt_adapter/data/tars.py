"""Reads webdataset shards: lists their members with offsets, without extracting them."""

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

_LARGEST_HEADER = 1 << 20  # most bytes of one header, with long names and PAX records
_LARGEST_TEXT = 1 << 24  # most bytes of a .json or .txt
_PADDING = 20 * tarfile.BLOCKSIZE  # zeros that tar writes after the last member
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd", b"\x04\"M\x18": "lz4",
    b"PK\3\4": "zip",
}  # fmt: skip
_KINDS = {
    tarfile.LNKTYPE: "a hard link to {0.linkname}", tarfile.SYMTYPE: "a symbolic link to {0.linkname}",
    tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device", tarfile.FIFOTYPE: "a pipe",
}  # fmt: skip


def looks_like_tar(path: str) -> bool:
    """Tell whether a file begins with a tar header. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(tarfile.BLOCKSIZE)[257:262] == b"ustar"


def compression(path: str) -> str | None:
    """Return the compression format that a file's first bytes show, or None. Raises OSError."""
    with open(path, "rb") as file:
        begin = file.read(8)
    return next((name for mark, name in _COMPRESSED.items() if begin.startswith(mark)), None)


def read_shard(path: str, gathered: Gathered) -> None:
    """Add the clips of a tar to ``gathered``; broken, incomplete or useless members are recorded as skipped.

    Raises CommandError if storage fails.
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
    if name in gathered:  # keys often count from 0 in each shard
        name = f"{shard}/{name}"
    label = label if isinstance(label, int) else None
    gathered.take(f"{path}, {key}", name, video, captions_of(about), start, end, label)


@dataclass
class _Found:
    """The files in a tar.

    Attributes:
        samples: members by key and extension. lost: reason why a file of a key cannot be used, by key.
        problems: damage of the tar itself, by place.
    """

    samples: dict[str, dict[str, Member]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


class _Headers(io.FileIO):
    """A file that only allows reads of header size, so that a damaged header cannot request gigabytes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= _LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _list_members(path: str) -> _Found:
    """List the files of a tar up to any damage. Raises OSError, and VideoError if it is not an uncompressed tar."""
    found = _Found()
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise VideoError(f"{path}: is not a regular file")
    packed = compression(path)
    if packed is not None:
        raise VideoError(f"{path}: is compressed with {packed}; members are read by offset, so decompress it first")
    size, end = os.path.getsize(path), 0
    try:
        with _Headers(path) as headers, tarfile.open(fileobj=headers, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if tar.offset <= info.offset or info.size < 0:
                    raise tarfile.ReadError("a size below 0")
                tar.members = []  # type: ignore[attr-defined]  # frees memory: tarfile keeps all of them
                end = tar.offset
                if not _note(found, path, info, size):
                    return found
            end = tar.offset
    except Exception as error:  # for damaged headers tarfile raises many kinds of error
        if is_passing(error) or is_mistake(error):
            raise
        found.problems[path] = f"is a damaged tar at byte {end} of {size} ({error}): the rest is lost"
        return found
    with open(path, "rb") as file:
        file.seek(end)
        block, rest = file.read(tarfile.BLOCKSIZE), file.read(_PADDING)
    if any(block):
        found.problems[path] = f"is a damaged tar at byte {end} of {size}: the rest is lost"
    elif len(block) < tarfile.BLOCKSIZE:
        found.problems[path] = f"is truncated at byte {size}: the rest is lost"
    elif any(rest):
        found.problems[path] = f"continues after its end mark at byte {end} (joined tars?): the rest is not read"
    return found


def _note(found: _Found, path: str, info: tarfile.TarInfo, size: int) -> bool:
    """Record a member in ``found``. Returns whether the tar, of ``size`` bytes, continues after it."""
    key, extension = group_of(info.name)
    if info.isdir():
        return True
    if not info.isreg():
        kind = _KINDS.get(info.type, f"no file but of type {info.type!r}").format(info)
        found.lost.setdefault(key, f"its .{extension} is {kind}; only regular files are read")
    elif info.issparse():
        found.lost.setdefault(key, f"its .{extension} is stored as a sparse file; store it in full")
    elif info.offset_data + info.size > size:
        found.lost.setdefault(key, f"the tar ends inside its .{extension}")
        return False
    else:
        member = Member(path, info.offset_data, info.size, info.name)
        if found.samples.setdefault(key, {}).setdefault(extension, member) is not member:
            where = f"{info.name} at byte {info.offset_data} of {path}"
            found.problems[where] = "an earlier file has the same name"
    return True


def _sample(parts: dict[str, Member], file: BinaryIO) -> tuple[Member, dict[str, Any]]:
    """Return the video member of a key and its metadata. Raises ValueError."""
    videos = [member for extension, member in parts.items() if extension.rpartition(".")[2] in VIDEOS]
    if len(videos) != 1:
        extensions = ", ".join(f".{extension}" for extension in parts)
        if not videos:
            raise ValueError(f"no video under its key (only {extensions})")
        raise ValueError(f"{len(videos)} videos under one key ({extensions}); a key must not contain a dot")
    if videos[0].size == 0:
        raise ValueError("its video is empty (0 bytes)")
    about: dict[str, Any] = {}
    if "json" in parts:
        try:
            value = json.loads(_text(parts["json"], file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its .json is not JSON ({error})") from error
        about = value if isinstance(value, dict) else {}
    if captions_of(about) is None and "txt" in parts:
        about["caption"] = _text(parts["txt"], file)
    return videos[0], about


def _text(member: Member, file: BinaryIO) -> str:
    if member.size > _LARGEST_TEXT:
        raise ValueError(f"its {member.name} has {member.size} bytes, above the limit of {_LARGEST_TEXT} for a text")
    content = read_patiently(member.path, _bytes, member, file)
    return content.decode("utf-8-sig", errors="surrogateescape")


def _bytes(member: Member, file: BinaryIO) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def group_of(name: str) -> tuple[str, str]:
    """Return the key and extension of a shard member: webdataset splits the file name at its first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
