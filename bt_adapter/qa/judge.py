"""Has a language model at an OpenAI-style endpoint score answers, in parallel; a killed run resumes."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.files import Rows
from bt_adapter.progress import Progress
from bt_adapter.qa.reply import read_verdict
from bt_adapter.training.loop import Stopped, signals

if TYPE_CHECKING:
    from openai import OpenAI

PROMPTS = 1  # version of the prompts below; raised when they change, since scores are then not comparable
_LONGEST_PAUSE = 60.0  # seconds; limit of the pause between two requests, even if the endpoint asks for more
_REFUSALS = 3  # refusals in a row (at least as many as run in parallel) that show a fault in the form of all requests

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
    """The endpoint cannot be used; the verdicts so far are kept."""


class _NoVerdict(Exception):
    """A request gave no verdict. tries: requests sent. pause: seconds that the endpoint asks to wait, or None."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.tries, self.pause = 0, pause


class _InvalidReply(_NoVerdict):
    """The reply holds no verdict."""


class _Unreachable(_NoVerdict):
    """The endpoint did not reply."""


class _Refused(_NoVerdict):
    """The endpoint refuses this request: its text is too long or filtered, or its form is not supported."""


class _Denied(_NoVerdict):
    """The endpoint denies every request."""


@dataclass(frozen=True)
class Case:
    """A case to judge: pairs of question and given answer (two for "consistency"), and the correct answer."""

    id: str
    given: tuple[tuple[str, str], ...]
    right: str


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict. score: 0 to 5. right: whether the answer is correct, for "match" only.

    model, fingerprint: as reported by the endpoint. tries: requests sent.
    """

    score: float
    right: bool | None
    model: str | None
    fingerprint: str | None
    tries: int = 1


@dataclass(frozen=True)
class Judge:
    """A judging ``model`` at an endpoint ``url`` (".../v1").

    key: sent as the bearer token. timeout: seconds per request. tries: attempts per request; the pause between them
    starts at ``pause`` seconds and doubles up to a minute, unless the endpoint states one. parallel: concurrent
    requests. temperature: sampling temperature of the judge; None sends none, for endpoints that refuse it.
    """

    url: str
    model: str
    key: str | None = None
    timeout: float = 60.0
    tries: int = 5
    pause: float = 1.0
    parallel: int = 8
    temperature: float | None = 0.0

    def connect(self) -> OpenAI:
        """Make the client, which keeps connections open and reads proxies from the environment; to be closed."""
        from openai import OpenAI

        # The retries are this class's own: each is counted, a signal ends the pause before it, and a reply without a
        # verdict is retried too. Without a key, the client would read OPENAI_API_KEY; `_post` leaves the header out.
        return OpenAI(base_url=self.url, api_key=self.key or "none", timeout=self.timeout, max_retries=0)

    def verdict(self, client: OpenAI, case: Case, aspect: str, stop: threading.Event) -> Verdict:
        """Send requests until a verdict is received or ``stop`` is set. client: result of :meth:`connect`.

        Raises _Refused and _Denied at once; _Unreachable and _InvalidReply after all tries.
        """
        for attempt in range(1, self.tries + 1):
            try:
                return replace(_read(self._post(client, _messages(case, aspect)), aspect), tries=attempt)
            except _NoVerdict as error:
                last = error
            last.tries = attempt
            pause = min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE) if last.pause is None else last.pause
            if isinstance(last, (_Refused, _Denied)) or attempt == self.tries or stop.wait(pause):
                break
        raise last

    def _post(self, client: OpenAI, messages: Any) -> Any:
        from openai import APIConnectionError, APIStatusError, omit

        try:
            reply = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=messages,
                temperature=omit if self.temperature is None else self.temperature,
                extra_headers={} if self.key else {"Authorization": omit},
            )
        except APIStatusError as error:
            raise _of_status(error.response) from error
        except APIConnectionError as error:  # connection refused, timed out or closed
            cause = error.__cause__ or error
            raise _Unreachable(f"cannot be reached: {' '.join(str(cause).split()) or type(cause).__name__}") from error
        try:
            return json.loads(reply.content)
        except (ValueError, RecursionError) as error:  # RecursionError: nested too deeply
            raise _InvalidReply(f"not JSON: {reply.content[:100]!r}") from error


def judge_all(
    judge: Judge, cases: Sequence[Case], aspect: str, rows: Rows, progress: Progress | None = None
) -> Skipped:
    """Judge the cases that ``rows`` lacks, write each verdict to disk at once, and return the cases without a verdict.

    A row has id, the given answers, tries (requests so far); then score, right (for "match") and the model as reported
    by the endpoint; or score None and either "refused" with the endpoint's reason (too long, filtered) or "failed" if
    all tries gave an invalid reply or none. Rows without a score are tried again in the next run, refused ones last.
    No row is written before the endpoint has replied once, so the file only describes a working judge.

    Raises JudgeError: the endpoint denies access; ``judge.parallel`` cases in a row (or all) could not reach it; or it
    refuses, from the start or at some point, so many requests in a row (at least three, or all) that the fault must be
    common to all of them. Stopped: on SIGINT or SIGTERM. In all these cases, running requests are waited for and their
    verdicts are kept.
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
                f"{rows.path}: the verdict on {case.id!r} is about another answer than the current one; remove the file"
            )
    pending = fresh + refused
    waiting, done, stop = iter(pending), 0, threading.Event()
    failures = _FailureCounter(judge.parallel, len(pending), rows)
    trouble: _NoVerdict | None = None
    running: dict[Future[Verdict], Case] = {}
    held: list[dict[str, Any]] = []  # rows to write once the endpoint has replied

    def keep(future: Future[Verdict]) -> _NoVerdict | None:
        case, outcome = running.pop(future), _outcome(future)
        before = rows.done.get(case.id)
        held.append(_row(case, outcome, before))
        if isinstance(outcome, (Verdict, _InvalidReply)) or rows.done:
            rows.append(held)
            held.clear()
        if isinstance(outcome, Verdict):
            failures.clear()
            return None
        skipped.add(case.id, str(outcome))
        return outcome if failures.add(outcome, before) else None

    with judge.connect() as client, ThreadPoolExecutor(judge.parallel) as pool:
        try:
            with signals(stop.set):
                while trouble is None:
                    while (
                        not stop.is_set()
                        and len(running) < judge.parallel
                        and (following := next(waiting, None)) is not None
                    ):
                        running[pool.submit(judge.verdict, client, following, aspect, stop)] = following
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        trouble, done = keep(future) or trouble, done + 1
                        if progress is not None:
                            progress(done, len(pending))
        finally:
            stopped = stop.is_set()
            stop.set()  # no request is repeated after this
            for future in list(running):
                if not future.cancel():
                    keep(future)
    judged = sum(_judged(rows.done.get(case.id)) for case in cases)
    kept = f"{judged} of {len(cases)} answers are judged and kept in {rows.path}: run again to resume"
    if stopped:
        raise Stopped(f"stopped; {kept}")
    if trouble is not None:
        raise JudgeError(f"the judge at {judge.url} {trouble}{_advice(judge, trouble)}; {kept}") from trouble
    return skipped


class _FailureCounter:
    """Counts consecutive failures, to distinguish an unusable endpoint from a few refused requests."""

    def __init__(self, parallel: int, pending: int, rows: Rows) -> None:
        self.parallel, self.pending, self.rows = parallel, pending, rows
        self.unreached = self.refused = 0

    def clear(self) -> None:
        """Reset the counts after a reply."""
        self.unreached = self.refused = 0

    def add(self, outcome: _NoVerdict, before: dict[str, Any] | None) -> bool:
        """Count a failure and return whether to stop the run. ``before``: the case's row of an earlier run, or None."""
        if isinstance(outcome, _Unreachable):
            self.unreached += 1
            return self.unreached >= self.parallel or self.unreached == self.pending
        if isinstance(outcome, _Refused):
            works = any(map(_judged, self.rows.done.values()))
            if works and before is not None and "refused" in before:  # the same answer was refused before
                return False
            self.refused += 1
            return self.refused >= max(_REFUSALS, self.parallel) or (not works and self.refused == self.pending)
        if isinstance(outcome, _InvalidReply):
            self.clear()
        return isinstance(outcome, _Denied)


def _advice(judge: Judge, trouble: _NoVerdict) -> str:
    if isinstance(trouble, _Refused) and judge.temperature is not None:
        return " (if it does not accept a temperature, pass --judge-temperature None)"
    return ""


def summary(cases: Sequence[Case], aspect: str, rows: Rows) -> dict[str, Any]:
    """Summarise the verdicts on these cases' answers: mean score, accuracy (for "match"), counts and judging models.

    requests: number over all runs. retries: those after the first of each case. failures: those without a verdict.
    """
    tried = [row for c in cases if (row := rows.done.get(c.id)) is not None and row["given"] == _given(c)]
    found = [row for row in tried if _judged(row)]
    requests = sum(row["tries"] for row in tried)
    result: dict[str, Any] = {
        "judged": len(found),
        "unjudged": len(cases) - len(found),
        "refused": sum("refused" in row for row in tried),
        "requests": requests,
        "retries": requests - len(tried),
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
    """Extract the verdict from an endpoint's reply. Raises _InvalidReply."""
    try:
        choice = reply["choices"][0]
        content = choice["message"]["content"]
        text = content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise _InvalidReply(f"no message in the reply: {str(reply)[:100]}") from error
    try:
        score, right = read_verdict(text, aspect == "match")
    except ValueError as error:
        cut = ", which is truncated at the endpoint's limit" if choice.get("finish_reason") == "length" else ""
        raise _InvalidReply(f"{error} in the reply{cut}: {text[-100:]!r}") from error
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
    """Make the row of an outcome. ``before``: the row of an earlier, failed run, or None."""
    row: dict[str, Any] = {"id": case.id, "given": _given(case)}
    if isinstance(outcome, Verdict):
        row |= vars(outcome)
    else:
        kind = "refused" if isinstance(outcome, _Refused) else "failed"
        row |= {"score": None, "tries": outcome.tries, kind: str(outcome)}
    if before is not None:
        row["tries"] += before["tries"]
    return row


def _of_status(response: Any) -> _NoVerdict:
    """Classify the HTTP error status of a client's response by its meaning for the case."""
    code, reason = response.status_code, " ".join(response.text[:300].split())
    if code in (408, 409, 425, 429) or code >= 500:
        return _Unreachable(f"answers {code}: {reason}", _retry_after(response.headers.get("Retry-After")))
    if code not in (400, 413, 422, 451):  # key, credit, address, method or model: wrong for every case
        return _Denied(f"answers {code}: {reason}")
    return _Refused(f"refuses with {code}: {reason}")


def _retry_after(header: str | None) -> float | None:
    """Convert a Retry-After header, a number of seconds or a date, to seconds, at most a minute; None if invalid."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):  # neither a number nor a date with a time zone
            return None
    return min(max(seconds, 0.0), _LONGEST_PAUSE) if math.isfinite(seconds) else None
