"""Detects files that are truncated: shorter than their own container states."""

from __future__ import annotations

import os
from typing import BinaryIO

_LARGEST_INDEX = 1 << 24  # bytes


def is_cut(file: BinaryIO, container: str) -> bool | None:
    """Tell whether a file is truncated, by the sizes that its container states; None if it states none.

    Args:
        file: opened in binary mode and seekable.
        container: FFmpeg's name of its format, such as "matroska,webm".
    """
    size = file.seek(0, os.SEEK_END)
    if container.startswith("mov"):
        return _cut_fragments(file, size)
    if container.startswith("matroska"):
        return _cut_segment(file, size)
    if container == "avi":
        return _cut_riff(file, size)
    return None


def _cut_fragments(file: BinaryIO, size: int) -> bool | None:
    """Tell whether a fragment of a fragmented MP4 exceeds the file, or one that its index ("sidx") lists is missing.

    Returns None for other MP4 files: their header counts their frames.
    """
    at, fragmented, stated = 0, False, 0
    while at + 8 <= size:
        head = _read(file, at, 16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        elif length == 0:  # the box extends to the end of the file
            length = size - at
        if length < 8:
            return None
        fragmented |= kind == b"moof"
        if kind == b"sidx" and length <= _LARGEST_INDEX:
            stated = max(stated, at + length + _indexed(_read(file, at, length)))
        if at + length > size:
            return fragmented or None
        at += length
    # at < size: the remaining bytes are too few for a box header
    return at < size or size < stated if fragmented else None


def _indexed(box: bytes) -> int:
    """Sum the sizes of the fragments that a segment index lists, in bytes after it (ISO/IEC 14496-12, 8.16.3)."""
    if len(box) < 32:
        return 0
    has_64_bit_fields = box[8] > 0  # the box's version
    at = 36 if has_64_bit_fields else 28
    offset = int.from_bytes(box[28:36] if has_64_bit_fields else box[24:28], "big")
    at += 4
    sizes = [int.from_bytes(box[place : place + 4], "big") & 0x7FFFFFFF for place in range(at, len(box) - 11, 12)]
    return offset + sum(sizes)


def _cut_segment(file: BinaryIO, size: int) -> bool | None:
    """Tell whether the segment of a Matroska file is longer than the file."""
    at = 0
    while at + 2 <= size:
        head = _read(file, at, 16)
        width = _ebml_width(head[0])
        if width > 4 or len(head) <= width:
            return None
        kind, length_width = head[:width], _ebml_width(head[width])
        content = int.from_bytes(head[width : width + length_width], "big") & ((1 << 7 * length_width) - 1)
        if length_width > 8 or content == (1 << 7 * length_width) - 1:  # unknown size: a live recording
            return None
        end = at + width + length_width + content
        if kind == b"\x18\x53\x80\x67":  # the segment
            return end > size
        at = end
    return None


def _ebml_width(first: int) -> int:
    """Return the length of an EBML number in bytes: the leading zero bits of its first byte, plus one."""
    return 9 - first.bit_length()


def _cut_riff(file: BinaryIO, size: int) -> bool | None:
    """Tell whether one of the RIFF chunks of an AVI is longer than the file."""
    at, found = 0, None
    while at + 12 <= size:
        head = _read(file, at, 8)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):  # data after the video, or a size not filled in
            return found
        at += 8 + length
        found = at > size
        at += length % 2
    return found


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)
