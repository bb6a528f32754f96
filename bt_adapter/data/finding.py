"""Finds the file of a video or still by the name a list gives it: one rule for training, questions and annotations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bt_adapter.data.images import STILL_SUFFIXES, is_animation
from bt_adapter.data.video import VideoError

# in the order of preference where a video is there in several formats
SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".m2ts", ".mts", ".asf",
    ".3gp", ".ogv", ".vob", ".f4v", ".mxf", ".rm", ".rmvb", ".divx", ".y4m", ".gif",
)  # fmt: skip


class VideoFolder:
    """A folder of videos. What is in it is listed once, when it is first needed.

    Args:
        folder: may have sub-folders.
        suffixes: of the files that may be named without one, in the order of preference.
    """

    def __init__(self, folder: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> None:
        self.folder, self.suffixes = os.fspath(folder), suffixes
        self._listed: dict[str, _Names] = {}
        self._below: dict[str, list[str]] | None = None

    def find(self, name: str, fronts: Sequence[str] = ("",)) -> str:
        """Path of a video.

        Taken is, in this order: the file of exactly this name; the video of this name and a usual suffix
        (``suffixes``, in capitals too), never another file of that stem, as subtitles or stored features; the same
        in a sub-folder, where it is in one alone and the name has no folder of its own.

        Args:
            name: relative to the folder, as "clip", "clip.mp4" or "part/clip".
            fronts: what may stand before the name, as "v_" before ActivityNet's; tried in this order.

        Raises:
            VideoError: there is none, or one in each of several sub-folders.
        """
        for front in fronts:
            folder, own = os.path.split(name)
            if (found := self._names(folder).find(front + own)) is not None:
                return os.path.join(self.folder, folder, found)
        for front in fronts:
            if os.path.dirname(name) == "" and (places := self._everywhere().get(front + name)):
                if len(places) > 1:
                    shown = ", ".join(sorted(places)[:3])
                    raise VideoError(f"{name} is there {len(places)} times in {self.folder}: {shown}; name its folder")
                return os.path.join(self.folder, places[0])
        path = os.path.join(self.folder, name)
        kind = "video" if self.suffixes is SUFFIXES else "picture"
        raise VideoError(f"there is no {path}, nor with a {kind}'s suffix, nor once in a sub-folder")

    def _names(self, folder: str) -> _Names:
        if folder not in self._listed:
            path = os.path.join(self.folder, folder)
            try:
                with os.scandir(path or ".") as entries:
                    files = [entry.name for entry in entries if entry.is_file()]
            except OSError:
                files = []
            self._listed[folder] = _Names(files, self.suffixes)
        return self._listed[folder]

    def _everywhere(self) -> dict[str, list[str]]:
        """Paths of the videos in all sub-folders, from the folder on, by their names and by their stems."""
        if self._below is None:
            self._below = {}
            for path, folders, files in os.walk(self.folder):
                folders.sort()
                place = os.path.relpath(path, self.folder)
                if place == ".":
                    continue
                for name, file in _Names(files, self.suffixes).suited():
                    self._below.setdefault(name, []).append(os.path.join(place, file))
        return self._below


class _Names:
    """The files of one folder."""

    def __init__(self, files: Sequence[str], suffixes: Sequence[str]) -> None:
        self.files, self.suffixes = set(files), suffixes
        self.stems: dict[str, str] = {}  # of files with one of the suffixes; of several formats the preferred one
        ranks = {suffix: rank for rank, suffix in enumerate(suffixes)}
        known = ((ranks.get(os.path.splitext(file)[1].lower(), -1), file) for file in files)
        for _, file in sorted(pair for pair in known if pair[0] >= 0):
            self.stems.setdefault(os.path.splitext(file)[0], file)

    def find(self, name: str) -> str | None:
        return name if name in self.files else self.stems.get(name)

    def suited(self) -> list[tuple[str, str]]:
        """Each file with one of the suffixes under its name, and the preferred one of a stem under its stem."""
        named = [(file, file) for file in self.files if os.path.splitext(file)[1].lower() in self.suffixes]
        return [*named, *((stem, file) for stem, file in self.stems.items() if stem not in self.files)]


class VisualFolder:
    """A folder of videos and stills.

    Args:
        folder: may have sub-folders.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._videos, self._stills = VideoFolder(folder), VideoFolder(folder, (*STILL_SUFFIXES, ".gif"))
        self._animations: dict[str, bool] = {}  # each file is opened once

    def find(self, name: str, kind: str, fronts: Sequence[str] = ("",)) -> tuple[Path, str]:
        """Path of a file, and whether it is a video or a still: "video" or "image".

        A name given as a video's whose file is a picture (a name with one of :data:`STILL_SUFFIXES`) and no animation
        is a still. Where there is no file, the path is the place that the name says: who reads it finds none there.

        Args:
            name: as for :meth:`VideoFolder.find`. kind: "video" or "image", as what the name was given.
            fronts: what may stand before the name.
        """
        places = [self._videos] if kind == "video" else []
        if kind == "image" or is_still(name):
            places.append(self._stills)
        for place in places:
            try:
                path = place.find(name, fronts)
                break
            except VideoError:
                path = os.path.join(self.folder, name)
        if kind == "video" and is_still(path):
            if path not in self._animations:
                self._animations[path] = is_animation(path)
            kind = "video" if self._animations[path] else "image"
        return Path(path), kind


def is_still(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in STILL_SUFFIXES


def named_with_suffixes(stem: str) -> list[str]:
    """All names that a video of this stem may have."""
    return [stem + suffix for suffix in SUFFIXES]
