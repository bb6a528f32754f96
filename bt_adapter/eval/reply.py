"""Reading a verdict out of the text a judging language model replies with."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# Models that think aloud put their thoughts between such tags; some chat templates swallow the opening one.
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_THOUGHTS_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_SCORE = re.compile(r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of|of)\s*5(?:\.0+)?)?(?:\s*(?:points?|stars?))?\.?")
# "yes or no" and "yes/no" repeat the question and decide nothing
_WORD = re.compile(r"\W*(yes|no|true|false|correct|incorrect|right|wrong)\b(?!\s*(?:or\b|/|\|))")
_BEGINS_WITH_KEY = re.compile(r"\{\s*['\"]")
_LONGEST = 4000  # characters of an object that is not JSON: it is looked for at each brace
_AFFIRMATIVE = ("yes", "true", "correct", "right")


def read_verdict(text: str, with_right: bool) -> tuple[float, bool | None]:
    """Read the score and, where asked, whether the judge calls the answer right.

    Args:
        text: the whole reply. The last object in it that has a score counts: JSON, or a dictionary as Python writes
            it, whatever stands before it (thoughts, quotations of the answer, code fences).
        with_right: whether the object must also say yes or no, under "right" or "pred".

    Returns:
        The score, 0 to 5, and right, None where it is not asked for. A number in quotes, "4/5" and "4 out of 5" are
        scores; "Yes." and "yes, it is" mean yes.

    Raises:
        ValueError: no object with such a score, or neither yes nor no.
    """
    text = _THOUGHTS_END.split(text)[-1]
    if begin := _THOUGHTS_BEGIN.search(text):  # thoughts that were cut off: what they weigh is no verdict
        text = text[: begin.start()]
    said: dict[str, Any] = {}
    for found in _objects(text):
        if "score" in found:
            said = found
    score = _score(said.get("score"))
    if score is None:
        raise ValueError("no score of 0 to 5")
    if not with_right:
        return score, None
    right = _right(said.get("right", said.get("pred")))
    if right is None:
        raise ValueError("neither yes nor no")
    return score, right


def _score(value: Any) -> float | None:
    if isinstance(value, str):
        match = _SCORE.fullmatch(value.strip().lower())
        value = float(match[1]) if match else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value) if 0 <= value <= 5 else None


def _right(value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    match = _WORD.match(value.lower()) if isinstance(value, str) else None
    return match[1] in _AFFIRMATIVE if match else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a text in order, keys in lower case; an object inside another one follows it.

    An object quoted inside a string of another one is part of that string, and not found.
    """
    place = 0
    while (place := text.find("{", place)) >= 0:
        found, end = _object(text, place)
        if found is None:
            place += 1
        else:
            yield from _nested(found)
            place = end


def _object(text: str, start: int) -> tuple[Any, int]:
    """The object that begins at ``start`` and the place after it; None where none does."""
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        pass
    if not _BEGINS_WITH_KEY.match(text, start):
        return None, start
    end = _closing(text, start)
    try:
        found = ast.literal_eval(text[start:end])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None, start
    return (found, end) if isinstance(found, dict) else (None, start)


def _closing(text: str, start: int) -> int:
    """The place after the brace that closes the one at ``start``; braces inside quotes do not count."""
    depth, quote, place = 0, "", start
    while place < min(len(text), start + _LONGEST):
        letter = text[place]
        if letter == "\\":
            place += 1
        elif quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return place + 1
        place += 1
    return start


def _nested(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield {str(key).strip().lower(): one for key, one in value.items()}
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _nested(one)
