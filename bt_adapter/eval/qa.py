"""Records of public question answering benchmarks: reading, predictions in their scorers' format, exact match.

The fields of a record determine its kind: Video-ChatGPT's generic and temporal questions (Q, A, video_name), its
consistency questions (Q1, Q2, A, video_name), ActivityNet-QA (question_id, question, video_name; answers in a second
file), MSVD-QA and MSRVTT-QA (id, question, answer, video_id). Instead of the video's name any of them may hold
"image", the name of a still. Scores are also reported for each "type" of record.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bt_adapter.errors import CommandError
from bt_adapter.files import parse_lines, read_text, write_json

_VIDEO_FIELDS = ("video_name", "video_id", "video")
_ARTICLES = {"a", "an", "the"}
_APOSTROPHES = re.compile("['\u2018\u2019\u02bc`]")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}\b)")
_CJK = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
# points other than decimal points, hyphens, and dashes other than minus signs
_MARKS = re.compile(r"(?<!\d)\.|\.(?!\d)|(?<=\w)-|-(?!\d)")


@dataclass(frozen=True)
class Item:
    """A record of a benchmark.

    video: name of its video or still. questions: one, or two with the same meaning. kind: the type that it is counted
    under, or None. visual: kind of the file as the record states it, "video" or "image".
    """

    id: str
    video: str
    questions: tuple[str, ...]
    answer: str
    record: dict[str, Any]
    kind: str | None = None
    visual: str = "video"

    @property
    def keys(self) -> list[str]:
        """The key of the answer to each question."""
        count = len(self.questions)
        return [self.id] if count == 1 else [f"{self.id}/{i}" for i in range(1, count + 1)]


def read_items(data: Path, answers: Path | None = None) -> list[Item]:
    """Read the records of a benchmark file, a JSON list or one object per line.

    Raises CommandError, which names option, file and record.
    """
    right = {}
    if answers is not None:
        for number, record in enumerate(_records("--answers", answers), 1):
            if not isinstance(record, dict) or "question_id" not in record or "answer" not in record:
                raise CommandError(f"--answers {answers}, record {number}: expected question_id and answer")
            right[str(record["question_id"])] = record
    items: dict[str, Item] = {}
    for number, record in enumerate(_records("--data", data), 1):
        item = _item(f"--data {data}, record {number}", number, record, right if answers is not None else None)
        if item.id in items:
            raise CommandError(f"--data {data}, record {number}: id {item.id!r} is a duplicate")
        items[item.id] = item
    if not items:
        raise CommandError(f"--data {data}: holds no record")
    return list(items.values())


def write_predictions(path: Path, items: Sequence[Item], given: dict[str, str]) -> None:
    """Write the records with the fields added that Video-ChatGPT's scorers read and its inference writes.

    The scorers read video_name, Q, A and pred, also for ActivityNet-QA, MSVD-QA and MSRVTT-QA, whose inference writes
    id, question, answer and pred; for consistency questions video_name, Q1, Q2, A, pred1 and pred2.
    """
    rows = []
    for item in items:
        keys = item.keys
        names = ["pred"] if len(keys) == 1 else [f"pred{i}" for i in range(1, len(keys) + 1)]
        record = item.record
        if len(keys) == 1 and "Q" not in record:
            front = {"id": record.get("question_id", item.id), "video_name": item.video}
            record = front | record | {"Q": item.questions[0], "A": item.answer}
        elif item.visual == "image":
            record = {"video_name": item.video} | record
        rows.append(record | {n: given[k] for n, k in zip(names, keys, strict=True)})
    write_json(path, rows, indent=1, ascii=False)


def exact_scores(items: Sequence[Item], given: dict[str, str]) -> dict[str, Any]:
    """Compute the shares of answers that equal or contain the correct one after normalisation, in all and per kind."""
    groups: dict[str | None, list[Item]] = {None: list(items)}
    for item in items:
        if item.kind is not None:
            groups.setdefault(item.kind, []).append(item)
    shares = {}
    for kind, members in groups.items():
        pairs = [(normalise(given[key]), normalise(item.answer)) for item in members for key in item.keys]
        shares[kind] = {
            "n": len(pairs),
            "exact": sum(bool(right) and answer == right for answer, right in pairs) / len(pairs),
            "contained": sum(bool(right) and f" {right} " in f" {answer} " for answer, right in pairs) / len(pairs),
        }
    whole = shares.pop(None)
    return {"exact": whole["exact"], "contained": whole["contained"], "questions": whole["n"], "kinds": shares}


def normalise(text: str) -> str:
    """Normalise an answer for exact match.

    The result is in lower case with compatible characters unified (NFKC), without apostrophes, thousands separators,
    other punctuation and articles, with single spaces. Decimal points, minus signs before a number and symbols (C++, $)
    stay, since they change the meaning. Each Chinese or Japanese character is a word. An answer of articles only keeps
    the last one ("A" may be a choice), one of punctuation only is unchanged; only blank answers become empty.
    """
    text = unicodedata.normalize("NFKC", text).casefold().strip()
    plain = _CJK.sub(r" \1 ", _THOUSANDS.sub("", _APOSTROPHES.sub("", text)))
    words = _MARKS.sub(" ", "".join(map(_without_punctuation, plain))).split()
    return " ".join([word for word in words if word not in _ARTICLES] or words[-1:]) or text


def _without_punctuation(letter: str) -> str:
    kind = unicodedata.category(letter)
    return "" if kind == "Cf" else " " if kind.startswith("P") and letter not in ".-" else letter


def _records(option: str, path: Path) -> list[Any]:
    try:
        text = read_text(path)
    except CommandError as error:
        raise CommandError(f"{option} {error}") from error
    if text.lstrip().startswith("["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise CommandError(f"{option} {path}: not JSON ({error})") from error
    records = []
    for number, record in parse_lines(text.split("\n")):
        if isinstance(record, ValueError):
            raise CommandError(f"{option} {path}, line {number}: not JSON ({record})") from record
        records.append(record)
    return records


def _item(where: str, number: int, record: Any, right: dict[str, Any] | None) -> Item:
    if not isinstance(record, dict):
        raise CommandError(f"{where}: expected an object, got {type(record).__name__}")
    kind = record.get("type")
    fields: tuple[str, ...]
    if "Q1" in record:
        key, fields = str(number), ("video_name", "Q1", "Q2", "A")
    elif "Q" in record:
        key, fields = str(number), ("video_name", "Q", "A")
    elif "question_id" in record:
        key, fields = str(record["question_id"]), ("video_name", "question", "answer")
        if right is None and "answer" not in record:
            raise CommandError(f"{where}: holds no answer; pass the file of answers as --answers")
        if right is not None:
            if key not in right:
                raise CommandError(f"{where}: --answers has no answer to question {key!r}")
            record, kind = {**record, "answer": right[key]["answer"]}, right[key].get("type", kind)
    else:
        key, fields = (
            str(record.get("id", number)),
            ("video_id" if "video_id" in record else "video", "question", "answer"),
        )
    visual = "image" if record.get("image") is not None else "video"
    if visual == "image":
        if both := [name for name in _VIDEO_FIELDS if record.get(name) is not None]:
            raise CommandError(f"{where}: names a video ({both[0]}) and an image; keep one of them")
        if not isinstance(record["image"], str):
            found = type(record["image"]).__name__
            raise CommandError(f"{where}: image must be the file name of one still, but is of type {found}")
        fields = ("image", *fields[1:])
    if missing := [field for field in fields if field not in record or (field == fields[0] and record[field] is None)]:
        raise CommandError(f"{where}: holds no {', '.join(missing)}")
    video, *questions, answer = (str(record[field]) for field in fields)
    if not all(question.strip() for question in questions):
        raise CommandError(f"{where}: the question is empty")
    return Item(key, video, tuple(questions), answer, record, None if kind is None else str(kind), visual)
