"""A language model behind an OpenAI-style endpoint scores answers, many requests at once, resumed after a kill."""

from __future__ import annotations

import json
import math
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any

from bt_adapter.chat.rows import Rows
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.eval.reply import read_verdict
from bt_adapter.pretrain.loop import Stopped, signals
from bt_adapter.progress import Progress

PROMPTS = 1  # raised whenever the wording below changes: scores of two wordings do not compare
_LONGEST_PAUSE = 60.0  # seconds waited between two requests, whatever the endpoint asks for
_REFUSALS = 3  # in a row, and no fewer than run at once: the fault is then taken to be the request's form

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


class _NoVerdict(Exception):
    """What came instead. tries: requests sent. pause: seconds that the endpoint asks to wait, or None."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.tries, self.pause = 0, pause


class _Nonsense(_NoVerdict):
    """A reply that holds no verdict."""


class _Unreachable(_NoVerdict):
    """No reply."""


class _Refused(_NoVerdict):
    """The endpoint does not take this request: its text is too long or filtered, or it takes none of this form."""


class _Denied(_NoVerdict):
    """The endpoint will judge none."""


@dataclass(frozen=True)
class Case:
    """What is judged: pairs of question and answer given (two for "consistency"), and the right answer."""

    id: str
    given: tuple[tuple[str, str], ...]
    right: str


@dataclass(frozen=True)
class Verdict:
    """score: 0 to 5. right: yes or no, of "match" alone. model, fingerprint: as the endpoint named itself.

    tries: requests it took.
    """

    score: float
    right: bool | None
    model: str | None
    fingerprint: str | None
    tries: int = 1


@dataclass(frozen=True)
class Judge:
    """An endpoint ``url`` (".../v1") and the ``model`` asked there.

    key: sent as the bearer token. timeout: seconds a request may take. tries: of each request; pauses between them
    begin with ``pause`` seconds and double up to a minute, or are what the endpoint asks for. parallel: requests at
    once. temperature: of the judge's replies; None sends none, for endpoints that refuse it.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0
    parallel: int = 8
    temperature: float | None = 0.0

    def verdict(self, case: Case, aspect: str, stop: threading.Event) -> Verdict:
        """Ask until a verdict comes, or ``stop`` is set.

        Raises _Refused and _Denied at once; _Unreachable and _Nonsense after all tries.
        """
        for attempt in range(1, self.tries + 1):
            try:
                return replace(_read(self._post(_messages(case, aspect)), aspect), tries=attempt)
            except _NoVerdict as error:
                last = error
            except (OSError, HTTPException) as error:  # refused, timed out, cut off
                said = getattr(error, "reason", None) or error
                last = _Unreachable(f"is not reached: {' '.join(str(said).split()) or type(error).__name__}")
            last.tries = attempt
            pause = min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) if last.pause is None else last.pause
            if isinstance(last, (_Refused, _Denied)) or attempt == self.tries or stop.wait(pause):
                break
        raise last

    def _post(self, messages: list[dict[str, str]]) -> Any:
        asked: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.temperature is not None:
            asked["temperature"] = self.temperature
        body = json.dumps(asked).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + "/chat/completions", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                data = reply.read()
        except urllib.error.HTTPError as error:
            raise _of_status(error) from error
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:  # nested too deeply is the latter
            raise _Nonsense(f"not JSON: {data[:100]!r}") from error


def judge_all(
    judge: Judge, cases: Sequence[Case], aspect: str, rows: Rows, progress: Progress | None = None
) -> Skipped:
    """Verdicts on the cases that ``rows`` lacks; each is on disk as soon as it is there.

    A row: id, the given answers, tries (requests so far); then score, right (of "match") and how the endpoint named its
    model; or score None and either "refused" with the endpoint's reason (too long, filtered) or "failed" where only
    nonsense, or after all tries nothing, came. Both kinds are returned, and asked again next time, those refused last.
    Until the endpoint has replied once, no row is written: what stands in the file is about a judge that works.

    Raises JudgeError: the endpoint denies access; ``judge.parallel`` cases in a row (or all) could not reach it; or it
    refuses, from the start or from one moment on, so many requests in a row (at least three, or all) that the fault
    must lie in what all of them share. Stopped: SIGINT or SIGTERM came. Requests under way are waited for and what they
    bring is kept, in all of these.
    """
    skipped, fresh, refused = Skipped(), [], []
    for case in cases:
        row = rows.done.get(case.id)
        if row is None or "failed" in row:
            fresh.append(case)
        elif "refused" in row:
            refused.append(case)
        elif row["given"] != _given(case):
            raise CommandError(
                f"{rows.path}: the verdict on {case.id!r} is about another answer than the one there now"
            )
    pending = fresh + refused
    waiting, done, stop = iter(pending), 0, threading.Event()
    strikes = _Strikes(judge.parallel, len(pending), rows)
    trouble: _NoVerdict | None = None
    running: dict[Future[Verdict], Case] = {}
    held: list[dict[str, Any]] = []  # rows that are written once the endpoint has replied

    def keep(future: Future[Verdict]) -> _NoVerdict | None:
        case, outcome = running.pop(future), _outcome(future)
        before = rows.done.get(case.id)
        held.append(_row(case, outcome, before))
        if isinstance(outcome, (Verdict, _Nonsense)) or rows.done:
            rows.append(held)
            held.clear()
        if isinstance(outcome, Verdict):
            strikes.clear()
            return None
        skipped.add(case.id, str(outcome))
        return outcome if strikes.is_trouble(outcome, before) else None

    with ThreadPoolExecutor(judge.parallel) as pool:
        try:
            with signals(stop.set):
                while trouble is None:
                    while (
                        not stop.is_set()
                        and len(running) < judge.parallel
                        and (following := next(waiting, None)) is not None
                    ):
                        running[pool.submit(judge.verdict, following, aspect, stop)] = following
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        trouble, done = keep(future) or trouble, done + 1
                        if progress is not None:
                            progress(done, len(pending))
        finally:
            stopped = stop.is_set()
            stop.set()  # whatever ended this, no request is sent again
            for future in list(running):
                if not future.cancel():
                    keep(future)
    judged = sum(_judged(rows.done.get(case.id)) for case in cases)
    kept = f"{judged} of {len(cases)} answers are judged and kept in {rows.path}: run again to go on"
    if stopped:
        raise Stopped(f"stopped; {kept}")
    if trouble is not None:
        raise JudgeError(f"the judge at {judge.url} {trouble}{_advice(judge, trouble)}; {kept}") from trouble
    return skipped


class _Strikes:
    """Counts cases in a row without a reply: an endpoint that takes no request is told from a few it does not take."""

    def __init__(self, parallel: int, pending: int, rows: Rows) -> None:
        self.parallel, self.pending, self.rows = parallel, pending, rows
        self.unreached = self.refused = 0

    def clear(self) -> None:
        """The endpoint replied."""
        self.unreached = self.refused = 0

    def is_trouble(self, outcome: _NoVerdict, before: dict[str, Any] | None) -> bool:
        """Count this outcome, and tell whether it is no use to go on. ``before``: the case's row of an earlier run."""
        if isinstance(outcome, _Unreachable):
            self.unreached += 1
            return self.unreached >= self.parallel or self.unreached == self.pending
        if isinstance(outcome, _Refused):
            works = any(map(_judged, self.rows.done.values()))
            if works and before is not None and "refused" in before:  # it was this answer then, and is again
                return False
            self.refused += 1
            return self.refused >= max(_REFUSALS, self.parallel) or (not works and self.refused == self.pending)
        if isinstance(outcome, _Nonsense):
            self.clear()
        return isinstance(outcome, _Denied)


def _advice(judge: Judge, trouble: _NoVerdict) -> str:
    if isinstance(trouble, _Refused) and judge.temperature is not None:
        return " (where it takes no temperature: --judge-temperature None)"
    return ""


def summary(cases: Sequence[Case], aspect: str, rows: Rows) -> dict[str, Any]:
    """Mean score, the share judged right (of "match"), counts, and who judged; of these cases' answers alone.

    requests: over all runs. retries: those beyond the first of each case. failures: those that brought no verdict.
    """
    asked = [row for c in cases if (row := rows.done.get(c.id)) is not None and row["given"] == _given(c)]
    found = [row for row in asked if _judged(row)]
    requests = sum(row["tries"] for row in asked)
    result: dict[str, Any] = {
        "judged": len(found),
        "unjudged": len(cases) - len(found),
        "refused": sum("refused" in row for row in asked),
        "requests": requests,
        "retries": requests - len(asked),
        "failures": requests - len(found),
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
    """The verdict in an endpoint's reply. Raises _Nonsense."""
    try:
        choice = reply["choices"][0]
        content = choice["message"]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _Nonsense(f"no message in the reply: {str(reply)[:100]}") from error
    try:
        score, right = read_verdict(text, aspect == "match")
    except ValueError as error:
        cut = ", which was cut off at the endpoint's limit" if choice.get("finish_reason") == "length" else ""
        raise _Nonsense(f"{error} in the reply{cut}: {text[-100:]!r}") from error
    return Verdict(score, right, reply.get("model"), reply.get("system_fingerprint"))


def _given(case: Case) -> list[str]:
    return [answer for _, answer in case.given]


def _judged(row: dict[str, Any] | None) -> bool:
    return row is not None and row["score"] is not None


def _outcome(future: Future[Verdict]) -> Verdict | _NoVerdict:
    try:
        return future.result()
    except _NoVerdict as error:
        return error


def _row(case: Case, outcome: Verdict | _NoVerdict, before: dict[str, Any] | None) -> dict[str, Any]:
    """``before``: the row of an earlier run that failed."""
    row: dict[str, Any] = {"id": case.id, "given": _given(case)}
    if isinstance(outcome, Verdict):
        row |= vars(outcome)
    else:
        kind = "refused" if isinstance(outcome, _Refused) else "failed"
        row |= {"score": None, "tries": outcome.tries, kind: str(outcome)}
    if before is not None:
        row["tries"] += before["tries"]
    return row


def _of_status(error: urllib.error.HTTPError) -> _NoVerdict:
    """What a status other than 2xx means for the case it answers."""
    code, said = error.code, " ".join(error.read(300).decode(errors="replace").split())
    if code in (408, 409, 425, 429) or code >= 500:
        return _Unreachable(f"answers {code}: {said}", _asked_pause(error.headers.get("Retry-After")))
    if code not in (400, 413, 422, 451):  # key, credit, address, method or model: wrong for every case
        return _Denied(f"answers {code}: {said}")
    return _Refused(f"refuses with {code}: {said}")


def _asked_pause(header: str | None) -> float | None:
    """Seconds of a Retry-After, which is a number of seconds or a date; at most a minute."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # neither, or a date without a zone
            return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else None
