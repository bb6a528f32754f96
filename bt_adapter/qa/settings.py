"""Options of the command ``eval qa``. It is imported before the arguments are read, so it needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from tyro.conf import arg

from bt_adapter.chat.settings import BatchChatModel
from bt_adapter.errors import CommandError
from bt_adapter.training.settings import NATURAL, POSITIVE, check_numbers

Aspect = Literal["match", "correctness", "detail", "context", "temporal", "consistency"]


@dataclass(frozen=True, kw_only=True)
class QaData:
    """Questions, files and answers."""

    help_group: ClassVar[str] = "data"

    data: Annotated[Path, arg(metavar="FILE")]
    """The questions: generic_qa.json, temporal_qa.json, consistency_qa.json, test_q.json, test_qa.json."""
    videos: Annotated[Path, arg(metavar="FOLDER")]
    """Folder of the videos and stills."""
    answers: Annotated[Path | None, arg(metavar="FILE")] = None
    """The right answers where they are in a separate file (ActivityNet-QA's test_a.json)."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("qa")
    """Folder of answers.jsonl, predictions.json (as Video-ChatGPT's scorers read it), verdicts and scores.json."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """The language model that scores answers."""

    help_group: ClassVar[str] = "judge"

    judge_url: str | None = None
    """Base URL of an OpenAI-style endpoint, as "http://127.0.0.1:8000/v1"; default: no judge."""
    judge_model: str | None = None
    """Name of the judge with its version; scores differ by up to 10 points between versions."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key."""
    judge_parallel: int = 8
    """Requests at once."""
    judge_timeout: float = 60.0
    """Seconds after which a request fails."""
    judge_tries: int = 5
    """Times a request is sent before its answer counts as not judged."""
    judge_temperature: float | None = 0.0
    """Sampling temperature sent with each request; "None" sends none, for endpoints that refuse it."""
    aspects: tuple[Aspect, ...] = ()
    """Aspects that are judged; default: those of the benchmark."""


@dataclass(frozen=True, kw_only=True)
class Qa(BatchChatModel, JudgeOptions, QaData):
    """Answer a benchmark's questions and score the answers; both resume when a killed run is started again.

    Under torchrun each process answers its share; the first one scores.

    Takes Video-ChatGPT's generic, temporal and consistency questions, ActivityNet-QA, MSVD-QA and MSRVTT-QA as they are
    published, and lists of {"id", "question", "answer", "video_id"}. With "image" instead of the video's name, or where
    the named file is a picture, a question is about a still, as the image chat model takes it.

    Scores: exact match, also for each "type" of record, and with --judge-url the scores that a language model gives.
    The judge's wording is this package's own: its scores compare with one another, not with published ones.
    """

    def check(self) -> None:
        """Raise CommandError for invalid options, missing files, and a judge's endpoint that cannot be one."""
        super().check()
        names = ("judge_parallel", "judge_tries", "judge_timeout")
        check_numbers(self, dict.fromkeys(names, POSITIVE) | {"judge_temperature": NATURAL})
        for label, path in (("data", self.data), ("answers", self.answers)):
            if path is not None and not path.is_file():
                raise CommandError(f"--{label} {path}: there is no such file")
        if not self.videos.is_dir():
            raise CommandError(f"--videos {self.videos}: there is no such folder")
        if (self.judge_url is None) != (self.judge_model is None):
            raise CommandError("--judge-url and --judge-model go together")
        if self.judge_url is not None:
            check_endpoint(self.judge_url, os.environ.get(self.judge_key), self.judge_key)


def check_endpoint(url: str, key: str | None, variable: str) -> None:
    """Raise CommandError for an invalid address or key, or without the client's package; no request is sent.

    Args:
        url: value of ``--judge-url``. key: value of the environment ``variable``, or None; it is not shown.
    """
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an open bracket, or a port that is no number
        complete = False
    if not complete or any(letter.isspace() or not letter.isprintable() for letter in url):
        raise CommandError(
            f"--judge-url must begin with http:// or https:// and a host, as http://localhost:8000/v1, got {url!r}"
        )
    if key and not all("!" <= letter <= "~" for letter in key):
        raise CommandError(
            f"the judge's key in the environment variable {variable} must be ASCII letters, digits and signs without "
            "spaces or line breaks, but holds other characters"
        )
    if find_spec("openai") is None:
        raise CommandError("--judge-url needs the package openai: pip install 'bt-adapter[judge]'")
