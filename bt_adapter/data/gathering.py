"""Checks the rows of a data set's list and builds clips from them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from typing import Any

from bt_adapter.data.clips import Clip, Member
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError


@dataclass(frozen=True)
class Row:
    """An unchecked row of a list. ``where``: its file and line, for messages."""

    where: str
    id: Any
    videos: list[str]  # candidate paths, relative to the folder of the videos
    captions: Any
    start: Any = None
    end: Any = None
    label: int | None = None


class Gathered:
    """Collects the usable clips and the skipped rows while a list is read.

    Attributes:
        folder: folder that video names are relative to.
        skipped: rows that cannot be used, with reasons.
    """

    def __init__(self, folder: str) -> None:
        self.folder, self.skipped = folder, Skipped()
        self._clips: dict[str, Clip] = {}
        self._alternatives: dict[str, dict[str, None]] = {}  # captions of clips with several rows, in order
        self._listed: dict[str, _Listing | None] = {}  # by folder; None: it cannot be listed

    def add(self, row: Row) -> None:
        """Check a row whose video is a file and add its clip."""
        key = row.id if isinstance(row.id, str) and row.id else str(row.id or next(iter(row.videos), ""))
        if not key or not row.videos:
            self.skipped.add(row.where, "names no video")
            return
        try:
            start, end = seconds("start", row.start), seconds("end", row.end)
            if (start or 0.0) >= (math.inf if end is None else end):
                raise ValueError(f"start {start} is not before end {end}")
            path = self._find(row.videos)
        except ValueError as error:
            self.skip(key, row.where, str(error))
            return
        if not row.id and (start is not None or end is not None):
            key = f"{key}#{start or 0:g}-{'' if end is None else f'{end:g}'}"
        self.take(row.where, key, path, row.captions, start, end, row.label)

    def take(
        self, where: str, key: str, source: str | Member, captions: Any, start: float | None = None,
        end: float | None = None, label: int | None = None,
    ) -> None:  # fmt: skip
        """Check the captions and add the clip."""
        if not _is_text(key):
            self.skipped.add(where, "its name is not UTF-8")
            return
        good = self._captions(key, where, captions)
        if not good:
            return
        clip = Clip(key, source, good, start, end, label)
        earlier = self._clips.setdefault(key, clip)
        if earlier is clip:
            return
        if (earlier.source, earlier.start, earlier.end, earlier.label) != (source, start, end, label):
            self.skip(key, where, "an earlier clip has the same name")
            return
        self._alternatives.setdefault(key, dict.fromkeys(earlier.captions)).update(dict.fromkeys(good))

    def __contains__(self, key: str) -> bool:
        return key in self._clips

    def result(self, name: str) -> tuple[list[Clip], Skipped]:
        """Return the clips and the skipped rows. Raises CommandError if no clip is usable."""
        if not self._clips:
            raise CommandError(f"{name}: holds no usable clip; {self.skipped.report(3)}")
        for key, captions in self._alternatives.items():
            self._clips[key] = replace(self._clips[key], captions=tuple(captions))
        return list(self._clips.values()), self.skipped

    def skip(self, key: str, where: str, reason: str) -> None:
        """Record an unusable row under its key; a key already taken gets the row's place appended."""
        name = f"{key} ({where})" if key in self._clips or key in self.skipped.reasons else key
        self.skipped.add(name.encode(errors="backslashreplace").decode(), reason)

    def _captions(self, key: str, where: str, value: Any) -> tuple[str, ...]:
        """Return the usable captions and record the others as skipped; with none left the clip is skipped."""
        values = value if isinstance(value, list | tuple) else [value]
        wrong = [_wrong_caption(caption) for caption in values] or ["no caption"]
        good = tuple(dict.fromkeys(c.strip() for c, why in zip(values, wrong, strict=False) if why is None))
        for number, why in enumerate(wrong, 1):
            if why is not None:
                self.skip(f"{key}, caption {number}" if good else key, where, why)
                if not good:
                    break
        return good

    def _find(self, places: list[str]) -> str:
        """Return the path of the first candidate that exists. Raises ValueError."""
        for place in places:
            if "://" in place:
                raise ValueError("its video is an address, not a file")
            if "\0" in place:
                raise ValueError("the name of its video holds a byte 0")
            if not _is_text(place):
                raise ValueError("the name of its video is not UTF-8")
            path = os.path.join(self.folder, place)
            if self._exists(path):
                return path
        raise ValueError(f"no such video in {self.folder or '.'}")

    def _exists(self, path: str) -> bool:
        """Tell whether a file exists, by its folder's listing. Raises ValueError if it is no regular file."""
        folder, name = os.path.split(path)
        if folder not in self._listed:
            try:
                self._listed[folder] = _Listing.of(folder or ".")
            except (FileNotFoundError, NotADirectoryError):
                self._listed[folder] = _Listing()
            except PermissionError:  # files may be accessible although the folder cannot be listed
                self._listed[folder] = None
        listing = self._listed[folder]
        if listing is None:
            return os.path.exists(path)
        if name in listing.others:
            raise ValueError("its video is a folder, pipe, socket or device, not a regular file")
        return name in listing.files


@dataclass
class _Listing:
    """Names in a folder: ``files`` are regular files and links, ``others`` cannot be videos."""

    files: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: str) -> _Listing:
        """List a folder without a stat per entry where the file system gives entry types. Raises OSError."""
        listing = cls()
        with os.scandir(folder) as entries:
            for entry in entries:
                usable = entry.is_file(follow_symlinks=False) or entry.is_symlink()
                (listing.files if usable else listing.others).add(entry.name)
        return listing


def captions_of(value: dict[str, Any]) -> Any:
    """Return the captions or caption of a JSON object, unchecked; None if it has neither."""
    found = value.get("captions")
    return value.get("caption") if found is None or found == [] else found


def _wrong_caption(caption: Any) -> str | None:
    if caption is None:
        return "no caption"
    if not isinstance(caption, str):
        return f"its caption is of type {type(caption).__name__}, not text"
    if not caption.strip():
        return "its caption is empty"
    return None if _is_text(caption) else "its caption is not UTF-8"


def _is_text(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)


def seconds(name: str, value: Any) -> float | None:
    """Convert a time in a list, a number or digits, to seconds; None if it is empty. Raises ValueError."""
    if value is None or value == "":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be a number of seconds of at least 0, got {value!r}")
    return number
