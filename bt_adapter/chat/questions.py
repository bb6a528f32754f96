"""Read a list of questions about videos and stills, and divide it among processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bt_adapter.data.finding import VisualFolder
from bt_adapter.errors import CommandError
from bt_adapter.files import parse_lines, read_text
from bt_adapter.training.processes import Processes


@dataclass(frozen=True)
class Question:
    """A question about a video or a still image.

    id: unique key of the answer. video: path of the file. extra: fields copied into the answer's row. given: the file
    as the question named it, which distinguishes files of the same name in two folders; None: the file's name. kind:
    "video" or "image"; the answer's row stores the file's name under this key.
    """

    id: str
    video: Path
    text: str
    extra: dict[str, Any] = field(default_factory=dict)
    given: str | None = None
    kind: str = "video"

    @property
    def name(self) -> str:
        """The name of the video or still."""
        return self.video.name if self.given is None else self.given


def read_questions(path: Path, videos: Path) -> list[Question]:
    """Read a JSON-lines file of questions.

    A line is {"video" or "image", "question"}, optionally with "id" (default: the line number) and "answer".
    ``videos``: the folder of the files (names may lack their suffix), or one file that all questions are about. A
    picture named under "video" is treated as a still image.

    Raises CommandError with the line number: not UTF-8, not JSON, a missing field, both a video and an image, an empty
    question, a duplicate id.
    """
    questions: dict[str, Question] = {}
    folder = VisualFolder(videos.parent if videos.is_file() else videos)
    for number, row in parse_lines(read_text(path).split("\n")):
        where = f"{path}, line {number}"
        if isinstance(row, ValueError):
            raise CommandError(f"{where}: not JSON ({row})") from row
        kind = "image" if isinstance(row, dict) and row.get("image") is not None else "video"
        wanted = ("question",) if videos.is_file() else (kind, "question")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in wanted):
            wanted = wanted if videos.is_file() else ("video (or image)", "question")
            raise CommandError(f"{where}: expected an object with the texts {' and '.join(wanted)}")
        if kind == "image" and row.get("video") is not None:
            raise CommandError(f"{where}: names a video and an image; name one of them")
        if not row["question"].strip():
            raise CommandError(f"{where}: the question is empty")
        key = str(row.get("id", number))
        if key in questions:
            raise CommandError(f"{where}: id {key!r} is used twice; ids must be unique")
        given = None if videos.is_file() else row[kind]
        path, kind = folder.find(videos.name, "video") if given is None else folder.find(given, kind)
        extra = {k: row[k] for k in ("answer",) if k in row}
        questions[key] = Question(key, path, row["question"], extra, given, kind)
    if not questions:
        raise CommandError(f"{path}: holds no question; expected one JSON object per line")
    return list(questions.values())


def share_of(questions: Sequence[Question], processes: Processes) -> list[Question]:
    """Select the questions of this process: equal shares, ordered so that questions about one video are adjacent."""
    place = {video: number for number, video in enumerate(dict.fromkeys(question.video for question in questions))}
    ordered = sorted(questions, key=lambda question: place[question.video])
    first, last = (len(ordered) * rank // processes.world for rank in (processes.rank, processes.rank + 1))
    return ordered[first:last]
