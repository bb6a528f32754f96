"""Shards of webdataset, read as an index of what is where in them."""

from __future__ import annotations

import json
import os
import tarfile
from typing import Any, BinaryIO

from bt_adapter.data.clips import Member
from bt_adapter.data.finding import SUFFIXES
from bt_adapter.data.gathering import Gathered, captions_of, seconds

VIDEOS = frozenset(suffix[1:] for suffix in SUFFIXES)


def read_tar(path: str, gathered: Gathered) -> None:
    """Take the clips of a tar; what is broken off or incomplete is noted. Raises OSError."""
    shard = os.path.basename(path)
    samples: dict[str, dict[str, Member]] = {}
    lost: dict[str, str] = {}
    for member, whole in _members(path, gathered):
        key, extension = group_of(member.name)
        if not whole:
            lost[key] = f"the tar ends inside its .{extension}"
        elif samples.setdefault(key, {}).setdefault(extension, member) is not member:
            where = f"{member.name} at byte {member.offset} of {path}"
            gathered.skipped.add(where, "another file before it has the same name")
    with open(path, "rb") as file:
        for key, parts in samples.items():
            if key in lost:
                continue
            try:
                video, about = _sample(parts, file)
                start, end = seconds("start", about.get("start")), seconds("end", about.get("end"))
            except ValueError as error:
                gathered.skipped.add(f"{shard}/{key}", str(error))
                continue
            name, label = about.get("key"), about.get("label")
            name = name if isinstance(name, str) and name else key
            if name in gathered:  # many makers of shards count from 0 in each
                name = f"{shard}/{name}"
            label = label if isinstance(label, int) else None
            gathered.take(f"{path}, {key}", name, video, captions_of(about), start, end, label)
    for key, reason in lost.items():
        gathered.skipped.add(f"{shard}/{key}", reason)


def _members(path: str, gathered: Gathered) -> list[tuple[Member, bool]]:
    """Every file in it, and whether all its bytes are there; damage of the tar itself is noted."""
    size, found = os.path.getsize(path), []
    try:
        with tarfile.open(path, "r:") as tar:
            while (info := tar.next()) is not None:
                whole = info.offset_data + info.size <= size
                if info.isreg() and not info.issparse():
                    found.append((Member(path, info.offset_data, info.size, info.name), whole))
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all, and needs none of them
                if not whole:
                    return found
            end = tar.offset
    except tarfile.TarError as error:
        gathered.skipped.add(path, f"is broken as a tar ({error})")
        return found
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if any(block):
        gathered.skipped.add(path, f"is broken as a tar at byte {end} of {size}: what follows is lost")
    elif len(block) < tarfile.BLOCKSIZE:
        gathered.skipped.add(path, f"breaks off at byte {size}: what followed is lost")
    return found


def _sample(parts: dict[str, Member], file: BinaryIO) -> tuple[Member, dict[str, Any]]:
    """The video, and what is said of it. Raises ValueError."""
    videos = [member for extension, member in parts.items() if extension.rpartition(".")[2] in VIDEOS]
    if len(videos) != 1:
        beside = ", ".join(f".{extension}" for extension in parts)
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
    file.seek(member.offset)
    return file.read(member.size).decode("utf-8-sig", errors="surrogateescape")


def group_of(name: str) -> tuple[str, str]:
    """Key and extension of a member of a shard: webdataset cuts the file's name at its first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()
