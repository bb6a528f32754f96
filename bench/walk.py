"""Follow a video through the package: ``python bench/walk.py [VIDEO]`` traces ``bt-adapter chat`` on the small stack.

It prints the files of ``bt_adapter`` in the order in which a function of each is first called, from the opening of the
video to the end of the answer, indented by how deep the calls are nested. A folder is entered late if a folder that
stands after it (``bench/rooms.py``) was entered before and has been left: a reader would have to turn back.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from itertools import groupby
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from rooms import ROOMS, room_of  # noqa: E402

FIRST = ("chat/watch.py", "watch")  # the call with which a video's walk begins


class Entry(NamedTuple):
    """The first call of a file's functions.

    folder, file: below ``bt_adapter``; "" for a top-level file. depth: calls of this package that it is nested in.
    late: folders after it in `ROOMS` that had been left.
    """

    folder: str
    file: str
    depth: int
    late: tuple[str, ...]


class Walk:
    """A profile function that records the first call of each file, of all threads."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.files: set[str] = set()
        self.visited: set[str] = set()
        self.open: Counter[str] = Counter()  # calls in progress, per folder
        self.has_begun = False
        self.lock = threading.Lock()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Record an event of sys.setprofile."""
        name = frame.f_code.co_filename
        if event not in ("call", "return") or not name.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return
        path = Path(name)
        folder, file = room_of(path), str(path.relative_to(PACKAGE))
        with self.lock:
            if event == "return":
                self.open[folder] -= 1
                return
            self.has_begun = self.has_begun or (file, frame.f_code.co_name) == FIRST
            if self.has_begun and file not in self.files:
                self.files.add(file)
                left = [other for other in self.visited if self.open[other] <= 0]
                late = tuple(other for other in left if ROOMS.index(other) > ROOMS.index(folder))
                is_first = folder not in self.visited and folder != ""
                self.entries.append(Entry(folder, file, sum(self.open.values()), late if is_first else ()))
                self.visited.add(folder)
            self.open[folder] += 1


PACKAGE = str(ROOT / "bt_adapter")


def trace(video: Path) -> list[Entry]:
    """Ask the small stack a question about a video and return the files entered, in order."""
    from bt_adapter.commands.cli import main

    walk = Walk()
    threading.setprofile(walk)
    sys.setprofile(walk)
    try:
        code = main(["chat", "What moves?", "--video", str(video), "--device", "cpu", "--dtype", "float32"])
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    if code:
        raise SystemExit(code)
    return walk.entries


def main() -> None:
    """Print what the module's docstring says; exit with 1 if a folder is entered late."""
    from bt_adapter.mini import data_folder

    video = Path(sys.argv[1]) if sys.argv[1:] else sorted((data_folder() / "clips").glob("*.mp4"))[0]
    entries = trace(video)
    stays = len(list(groupby(entry.folder for entry in entries)))
    for entry in entries:
        late = f"  <- after {', '.join(entry.late)} had been left" if entry.late else ""
        print(f"{'  ' * entry.depth}{entry.file}{late}")
    print(f"{len(entries)} files of {len({entry.folder for entry in entries})} folders, {stays} stays")
    raise SystemExit(any(entry.late for entry in entries))


if __name__ == "__main__":
    main()
