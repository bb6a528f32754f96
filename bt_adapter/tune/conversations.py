"""Questions and answers about videos and stills, in the formats of VideoInstruct-100K and LLaVA."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_adapter.data.finding import VideoFolder
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.video import VideoError
from bt_adapter.errors import CommandError
from bt_adapter.files import parse_lines

PLACE = re.compile(r"<(video|image)>")


class RecordError(ValueError):
    """A record that cannot be used."""


@dataclass(frozen=True, slots=True)
class Source:
    """A file that a conversation is about. kind: "video" or "image"."""

    path: str
    kind: str


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question, the number of videos and stills that come with it, and the answer.

    In the question ``<video>`` and ``<image>`` mark their places; marks that all precede the text are left out.
    """

    question: str
    visuals: int
    answer: str


@dataclass(frozen=True, slots=True)
class TrainingConversation:
    """A conversation, from which one sequence is made.

    Attributes:
        key: its name in reports.
        exchanges: at least one.
        sources: the videos and stills, in the order of their places.
    """

    key: str
    exchanges: tuple[Exchange, ...]
    sources: tuple[Source, ...] = ()


def read_conversations(
    path: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> tuple[list[TrainingConversation], Skipped]:
    """Read the usable conversations of a file, and the unusable ones with the reasons.

    Args:
        path: a JSON list, or one JSON object per line. Each is either ``{"q", "a", "video_id"}`` or ``{"id", "video" or
            "image", "conversations": [{"from": "human", "value": "<video>\\nquestion"}, {"from": "gpt", "value":
            "answer"}, …]}``; "video" and "image" may be lists, with as many places ``<video>`` or ``<image>`` (either
            mark serves where there is only one kind), which keep their place in the question. Records with neither are
            text alone.
        folder: of the videos and stills; None: that of ``path``. A video may lack its suffix and its sub-folder: see
            ``VideoFolder``.

    Raises:
        CommandError: the file is missing, is no JSON of either kind, or holds no usable record.
    """
    path = Path(path)
    files = _Files(Path(folder) if folder is not None else path.parent)
    found, skipped = [], Skipped()
    for name, record in _records(path, skipped):
        try:
            found.append(_conversation(name, record, files))
        except RecordError as error:
            skipped.add(_key(name, record), str(error))
    if not found:
        raise CommandError(f"--data {path} holds no usable conversation; {skipped.report(10)}")
    return found, skipped


def _records(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    """Yield each record with its name."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--data {path}: {error}") from error
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise CommandError(f"--data {path} is no JSON: {error}") from error
        yield from ((f"record {number}", record) for number, record in enumerate(records))
        return
    for number, record in parse_lines(text.split("\n")):
        if isinstance(record, ValueError):
            skipped.add(f"line {number}", f"no JSON ({record})")
        else:
            yield f"line {number}", record


def _key(name: str, record: Any) -> str:
    given = record.get("id", record.get("video_id")) if isinstance(record, dict) else None
    return name if given is None else f"{name} ({given})"


def _conversation(name: str, record: Any, files: _Files) -> TrainingConversation:
    if not isinstance(record, dict):
        raise RecordError(f"an object was expected, but it is a {type(record).__name__}")
    if "conversations" in record:
        return _llava_conversation(_key(name, record), record, files)
    if missing := [field for field in ("q", "a", "video_id") if not isinstance(record.get(field), str)]:
        raise RecordError(f"has neither conversations nor {', '.join(missing)}")
    _in_order(PLACE.findall(record["q"]) or ["video"], {"video": [record["video_id"]]})
    exchange = Exchange(_placed(record["q"], iter(["video"])), 1, _text(record["a"], "answer"))
    return TrainingConversation(_key(name, record), (exchange,), (files.source(record["video_id"], "video"),))


def _llava_conversation(key: str, record: dict[str, Any], files: _Files) -> TrainingConversation:
    names = {kind: _names(record.get(kind), kind) for kind in ("video", "image")}
    turns, said = record["conversations"], []
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        raise RecordError("conversations must be pairs of a question and its answer")
    for asked, answered in zip(turns[::2], turns[1::2], strict=True):
        said.append((_said(asked, "human"), _text(_said(answered, "gpt"), "answer")))
    sources = _in_order([place for question, _ in said for place in PLACE.findall(question)], names)
    kinds = iter(kind for _, kind in sources)
    exchanges = [Exchange(_placed(asked, kinds), len(PLACE.findall(asked)), answer) for asked, answer in said]
    return TrainingConversation(key, tuple(exchanges), tuple(files.source(name, kind) for name, kind in sources))


def _placed(question: str, kinds: Iterator[str]) -> str:
    """A question whose marks name the kind of each visual, as in the prompts of inference."""
    placed = PLACE.sub(lambda _: f"<{next(kinds)}>", question).strip()
    text = _text(PLACE.sub("", placed), "question")
    return text if placed.endswith(text) else placed  # inference puts visuals before a question without places


def _in_order(places: list[str], names: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Name and kind of the visual at each mark."""
    kinds = [kind for kind in names if names[kind]]
    if len(kinds) < 2:  # either mark serves
        kind = kinds[0] if kinds else "video"
        if len(places) != len(names[kind]):
            raise RecordError(_wrong(len(places), "<video> or <image>", len(names[kind]), kind))
        return [(name, kind) for name in names[kind]]
    for kind in kinds:
        if places.count(kind) != len(names[kind]):
            raise RecordError(_wrong(places.count(kind), f"<{kind}>", len(names[kind]), kind))
    left = {kind: iter(names[kind]) for kind in kinds}
    return [(next(left[kind]), kind) for kind in places]


def _wrong(places: int, words: str, count: int, kind: str) -> str:
    if not places:
        return f"no place {words} in the prompt for its {count} {kind}s"
    return f"{places} places {words} in the prompt for its {count} {kind}s"


def _said(turn: Any, who: str) -> str:
    if not isinstance(turn, dict) or turn.get("from") != who or not isinstance(turn.get("value"), str):
        raise RecordError(f'a turn must be {{"from": "{who}", "value": text}}, human and gpt by turns')
    return turn["value"]


def _text(text: str, what: str) -> str:
    if not text.strip():
        raise RecordError(f"an empty {what}")
    return text.strip()


def _names(value: Any, kind: str) -> list[str]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in values):
        raise RecordError(f"{kind} must be a file name or a list of them")
    return values


class _Files:
    """The videos and stills that records name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.videos = folder, VideoFolder(folder)
        self.stills: dict[str, bool] = {}  # whether each exists

    def source(self, name: str, kind: str) -> Source:
        """Find a video, by its name with or without the suffix, or a still by its name."""
        if kind == "video":
            try:
                return Source(self.videos.find(name), kind)
            except VideoError as error:
                raise RecordError(str(error)) from error
        path = os.path.join(self.folder, name)
        if path not in self.stills:
            self.stills[path] = os.path.isfile(path)
        if not self.stills[path]:
            raise RecordError(f"there is no {path}")
        return Source(path, kind)
