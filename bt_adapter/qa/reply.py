"""Parses a verdict from the reply text of a judging language model."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# Reasoning models put their reasoning between such tags; some chat templates omit the opening one.
_THOUGHTS_END = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_THOUGHTS_BEGIN = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.IGNORECASE)
_SCORE = re.compile(r"(\d+(?:\.\d+)?)(?:\s*(?:/|out of|of)\s*5(?:\.0+)?)?(?:\s*(?:points?|stars?))?\.?")
# "yes or no" and "yes/no" repeat the question and are no verdict
_WORD = re.compile(r"\W*(yes|no|true|false|correct|incorrect|right|wrong)\b(?!\s*(?:or\b|/|\|))")
_BEGINS_WITH_KEY = re.compile(r"\{\s*['\"]")
_LONGEST = 4000  # most characters of an object that is not JSON, since each brace is tried as its beginning
_AFFIRMATIVE = ("yes", "true", "correct", "right")


def read_verdict(text: str, with_right: bool) -> tuple[float, bool | None]:
    """Parse the score and, if requested, whether the judge considers the answer correct.

    Args:
        text: the whole reply. The last object with a score counts, as JSON or as a Python dictionary, whatever precedes
            it (reasoning, quotations of the answer, code fences).
        with_right: the object must also state yes or no, under "right" or "pred".

    Returns:
        The score, 0 to 5, and whether the answer is right (None unless requested). A number in quotes, "4/5" and "4 out
        of 5" are scores; "Yes." and "yes, it is" mean yes.

    Raises:
        ValueError: there is no object with such a score, or it states neither yes nor no.
    """
    text = _THOUGHTS_END.split(text)[-1]
    if begin := _THOUGHTS_BEGIN.search(text):  # truncated reasoning holds no verdict
        text = text[: begin.start()]
    verdict: dict[str, Any] = {}
    for found in _objects(text):
        if "score" in found:
            verdict = found
    score = _score(verdict.get("score"))
    if score is None:
        raise ValueError("no score of 0 to 5")
    if not with_right:
        return score, None
    right = _right(verdict.get("right", verdict.get("pred")))
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
    """Yield the objects of a text in order, keys in lower case; a nested object follows its parent.

    An object inside a string of another object is not yielded.
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
    """Parse the object that begins at ``start``; return it, or None, and the index after it."""
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
    """Return the index after the brace that closes the one at ``start``, ignoring quoted braces; ``start`` if none."""
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
