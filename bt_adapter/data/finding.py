"""Finds the file of a video or still by its name in a list; training, questions and annotations share this rule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from bt_adapter.data.images import STILL_SUFFIXES, is_animation
from bt_adapter.data.video import VideoError

# in order of preference, for a video that exists in several formats
SUFFIXES = (
    ".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts", ".m2ts", ".mts", ".asf",
    ".3gp", ".ogv", ".vob", ".f4v", ".mxf", ".rm", ".rmvb", ".divx", ".y4m", ".gif",
)  # fmt: skip


class VideoFolder:
    """A folder of videos, listed once at the first search.

    Args:
        folder: path; may have sub-folders.
        suffixes: suffixes that a name may omit, in order of preference.
    """

    def __init__(self, folder: str | os.PathLike[str], suffixes: Sequence[str] = SUFFIXES) -> None:
        self.folder, self.suffixes = os.fspath(folder), suffixes
        self._listed: dict[str, _Names] = {}
        self._below: dict[str, list[str]] | None = None

    def find(self, name: str, fronts: Sequence[str] = ("",)) -> str:
        """Return the path of a video.

        Tried in this order: the file of exactly this name; the video of this name with one of ``suffixes`` (in any
        case), never another file of that stem such as subtitles; the same in a sub-folder, if exactly one sub-folder
        has it and the name includes no folder.

        Args:
            name: relative to the folder, such as "clip", "clip.mp4" or "part/clip".
            fronts: prefixes that the file name may have, such as "v_" in ActivityNet; tried in this order.

        Raises:
            VideoError: the video is missing, or several sub-folders have it.
        """
        for front in fronts:
            folder, base = os.path.split(name)
            if (found := self._names(folder).find(front + base)) is not None:
                return os.path.join(self.folder, folder, found)
        for front in fronts:
            if os.path.dirname(name) == "" and (places := self._everywhere().get(front + name)):
                if len(places) > 1:
                    shown = ", ".join(sorted(places)[:3])
                    raise VideoError(
                        f"{name} is in {len(places)} sub-folders of {self.folder}: {shown}; write its folder before it"
                    )
                return os.path.join(self.folder, places[0])
        path = os.path.join(self.folder, name)
        kind = "video" if self.suffixes is SUFFIXES else "picture"
        raise VideoError(f"there is no {path}, neither with a {kind}'s suffix nor in a sub-folder")

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
        """Return the paths, relative to the folder, of the videos in all sub-folders by file name and by stem."""
        if self._below is None:
            self._below = {}
            for path, folders, files in os.walk(self.folder):
                folders.sort()
                place = os.path.relpath(path, self.folder)
                if place == ".":
                    continue
                for name, file in _Names(files, self.suffixes).videos():
                    self._below.setdefault(name, []).append(os.path.join(place, file))
        return self._below


class _Names:
    """Index of the file names of one folder."""

    def __init__(self, files: Sequence[str], suffixes: Sequence[str]) -> None:
        self.files, self.suffixes = set(files), suffixes
        self.stems: dict[str, str] = {}  # stem to file; of several formats the preferred one
        ranks = {suffix: rank for rank, suffix in enumerate(suffixes)}
        known = ((ranks.get(os.path.splitext(file)[1].lower(), -1), file) for file in files)
        for _, file in sorted(pair for pair in known if pair[0] >= 0):
            self.stems.setdefault(os.path.splitext(file)[0], file)

    def find(self, name: str) -> str | None:
        return name if name in self.files else self.stems.get(name)

    def videos(self) -> list[tuple[str, str]]:
        """List the files with one of the suffixes by name, and the preferred file of each stem by stem."""
        named = [(file, file) for file in self.files if os.path.splitext(file)[1].lower() in self.suffixes]
        return [*named, *((stem, file) for stem, file in self.stems.items() if stem not in self.files)]


class VisualFolder:
    """A folder of videos and stills.

    Args:
        folder: path; may have sub-folders.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)
        self._videos, self._stills = VideoFolder(folder), VideoFolder(folder, (*STILL_SUFFIXES, ".gif"))
        self._animations: dict[str, bool] = {}  # each file is opened once

    def find(self, name: str, kind: str, fronts: Sequence[str] = ("",)) -> tuple[Path, str]:
        """Return the path of a file and its kind, "video" or "image".

        A name given as a video is a still if its file has one of :data:`STILL_SUFFIXES` and is no animation. If there
        is no file, the path is the folder joined with the name, and reading it raises the error.

        Args:
            name: as for :meth:`VideoFolder.find`. kind: the expected kind, "video" or "image".
            fronts: prefixes that the file name may have.
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
    """Tell whether a file name has the suffix of a picture."""
    return os.path.splitext(name)[1].lower() in STILL_SUFFIXES


def named_with_suffixes(stem: str) -> list[str]:
    """List all file names that a video with this stem may have."""
    return [stem + suffix for suffix in SUFFIXES]
