"""A language model behind an OpenAI-style endpoint scores answers, many requests at once, resumed after a kill."""

from __future__ import annotations

import ast
import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any

from bt_adapter.chat.rows import Rows
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.progress import Progress

PROMPTS = 1  # raised whenever the wording below changes: scores of two wordings do not compare

_ASPECTS = {
    "match": "whether the given answer means the same as the right one; synonyms and rewordings count as the same",
    "correctness": "whether what the given answer states agrees with the right one, and nothing in it is false",
    "detail": "how completely and how specifically the given answer covers what the right one says",
    "context": "whether the given answer fits the overall context of what the right one describes",
    "temporal": "whether the given answer has the order and the time of events as the right one has them",
    "consistency": "whether the answers given to two questions that mean the same agree with each other and with the "
    "right answer",
}
ASPECTS = tuple(_ASPECTS)


class JudgeError(CommandError):
    """The endpoint cannot be used; what was judged so far is kept."""


class _Nonsense(ValueError):
    """A reply that holds no verdict."""


class _Unreachable(OSError):
    """No reply, after all tries."""


@dataclass(frozen=True)
class Case:
    """What is judged: pairs of question and answer given (two for "consistency"), and the right answer."""

    id: str
    given: tuple[tuple[str, str], ...]
    right: str


@dataclass(frozen=True)
class Verdict:
    """score: 0 to 5. right: yes or no, of "match" alone. model, fingerprint: as the endpoint named itself."""

    score: float
    right: bool | None
    model: str | None
    fingerprint: str | None


@dataclass(frozen=True)
class Judge:
    """An endpoint ``url`` (".../v1") and the ``model`` asked there.

    key: sent as the bearer token. timeout: seconds a request may take. tries: of each request; pauses between them
    begin with ``pause`` seconds and double, or are what the endpoint asks for. parallel: requests at once.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0
    parallel: int = 8

    def verdict(self, case: Case, aspect: str, stop: threading.Event) -> Verdict:
        """Ask until a verdict comes, or ``stop`` is set.

        Raises JudgeError where asking again is no use, _Unreachable, _Nonsense.
        """
        last: Exception | None = None
        for attempt in range(self.tries):
            pause = self.pause * 2**attempt
            try:
                return _read(self._post(_messages(case, aspect)), aspect)
            except _Nonsense as error:
                last = error
            except urllib.error.HTTPError as error:
                told = f"{self.url} answers {error.code}: {error.read(300).decode(errors='replace').strip()}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise JudgeError(f"the judge at {told}") from error
                last = _Unreachable(told)
                pause = _asked_pause(error.headers.get("Retry-After"), pause)
            except (OSError, HTTPException) as error:  # refused, timed out, cut off
                last = _Unreachable(f"{self.url}: {getattr(error, 'reason', None) or error or type(error).__name__}")
            if attempt + 1 < self.tries and stop.wait(pause):
                break
        assert last is not None
        raise last

    def _post(self, messages: list[dict[str, str]]) -> Any:
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as reply:
            data = reply.read()
        try:
            return json.loads(data)
        except ValueError as error:
            raise _Nonsense(f"not JSON: {data[:100]!r}") from error


def judge_all(
    judge: Judge, cases: Sequence[Case], aspect: str, rows: Rows, progress: Progress | None = None
) -> Skipped:
    """Verdicts on the cases that ``rows`` lacks; each is on disk as soon as it is there.

    A row: id, the given answers, score, right (of "match"), and how the endpoint named its model. Returns the cases
    for which only nonsense, or after all tries nothing, came: they are asked again next time.

    Raises JudgeError: the endpoint refuses, or ``judge.parallel`` cases in a row (or all) could not reach it.
    """
    pending = [case for case in cases if case.id not in rows.done]
    for case in cases:
        row = rows.done.get(case.id)
        if row is not None and row["given"] != [answer for _, answer in case.given]:
            raise CommandError(
                f"{rows.path}: the verdict on {case.id!r} is about another answer than the one there now"
            )
    skipped, waiting, done, failing, stop = Skipped(), iter(pending), 0, 0, threading.Event()
    running: dict[Future[Verdict], Case] = {}
    with ThreadPoolExecutor(judge.parallel) as pool:
        try:
            while True:
                while len(running) < judge.parallel and (following := next(waiting, None)) is not None:
                    running[pool.submit(judge.verdict, following, aspect, stop)] = following
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    case, done = running.pop(future), done + 1
                    try:
                        rows.append([_row(case, future.result())])
                        failing = 0
                    except (_Nonsense, _Unreachable) as error:
                        skipped.add(case.id, str(error))
                        failing += isinstance(error, _Unreachable)
                        if failing >= judge.parallel or failing == len(pending):
                            raise JudgeError(str(error)) from error
                    if progress is not None:
                        progress(done, len(pending))
        except JudgeError as error:
            stop.set()
            for future in running:
                future.cancel()
            for future, case in running.items():  # what was under way is not asked twice
                if not future.cancelled() and future.exception() is None:
                    rows.append([_row(case, future.result())])
            judged = sum(case.id in rows.done for case in cases)
            raise JudgeError(
                f"{error}; {judged} of {len(cases)} answers are judged and kept in {rows.path}: run again to go on"
            ) from error
        finally:
            stop.set()  # whatever ended this, no request is sent again
    return skipped


def summary(cases: Sequence[Case], aspect: str, rows: Rows) -> dict[str, Any]:
    """Mean score, the share judged right (of "match"), counts, and who judged."""
    found = [rows.done[case.id] for case in cases if case.id in rows.done]
    result: dict[str, Any] = {
        "judged": len(found),
        "unjudged": len(cases) - len(found),
        "score": sum(row["score"] for row in found) / len(found) if found else None,
        "models": sorted({str(row["model"]) for row in found}),
        "fingerprints": sorted({str(row["fingerprint"]) for row in found if row["fingerprint"]}),
    }
    if aspect == "match":
        result["accuracy"] = sum(row["right"] for row in found) / len(found) if found else None
    return result


def _messages(case: Case, aspect: str) -> list[dict[str, str]]:
    lines = []
    for number, (question, answer) in enumerate(case.given, 1):
        label = f" {number}" if len(case.given) > 1 else ""
        lines += [f"Question{label}: {question}", f"Given answer{label}: {answer}"]
    form = '{"right": "yes" or "no", "score": 0 to 5}' if aspect == "match" else '{"score": 0 to 5}'
    return [
        {
            "role": "system",
            "content": f"You grade answers to questions about a video you do not see. Grade {_ASPECTS[aspect]}.",
        },
        {
            "role": "user",
            "content": "\n".join([*lines, f"Right answer: {case.right}"])
            + f"\n\nReply with one JSON object and nothing else: {form}. The score is a whole number, 5 is best.",
        },
    ]


def _read(reply: Any, aspect: str) -> Verdict:
    """The verdict in a reply. Raises _Nonsense."""
    try:
        text = reply["choices"][0]["message"]["content"]
        found = re.search(r"\{[^{}]*\}", text)
    except (KeyError, IndexError, TypeError) as error:
        raise _Nonsense(f"no message in the reply: {str(reply)[:100]}") from error
    said = _parse(found[0]) if found else {}
    score = said.get("score")
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 5:
        raise _Nonsense(f"no score of 0 to 5 in the reply: {text[:100]!r}")
    right = None
    if aspect == "match":
        word = str(said.get("right", said.get("pred"))).strip().lower()
        if word not in ("yes", "no", "true", "false"):
            raise _Nonsense(f"neither yes nor no in the reply: {text[:100]!r}")
        right = word in ("yes", "true")
    return Verdict(float(score), right, reply.get("model"), reply.get("system_fingerprint"))


def _parse(text: str) -> dict[str, Any]:
    """JSON, or the Python dictionary that some models write instead; else nothing."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(found, dict):
            return found
    return {}


def _row(case: Case, verdict: Verdict) -> dict[str, Any]:
    return {"id": case.id, "given": [answer for _, answer in case.given], **vars(verdict)}


def _asked_pause(header: str | None, otherwise: float) -> float:
    """Seconds of a Retry-After, at most a minute."""
    return min(float(header), 60.0) if header and re.fullmatch(r"\d+(\.\d+)?", header.strip()) else otherwise
