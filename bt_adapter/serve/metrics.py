"""Counts and times of a server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        name = "bt_adapter_"
        self.requests = Counter(f"{name}requests", "Answered HTTP requests.", ["path", "status"], registry=registry)
        self.request_seconds = Histogram(
            f"{name}request_seconds", "Time of a chat completion.", buckets=_SECONDS, registry=registry
        )
        self.first_token_seconds = Histogram(
            f"{name}first_token_seconds", "Time from a prompt to its first token.", buckets=_SECONDS, registry=registry
        )
        self.decode_seconds = Histogram(
            f"{name}decode_seconds", "Decoding time of a still or video.", buckets=_SECONDS, registry=registry
        )
        self.encode_seconds = Histogram(
            f"{name}encode_seconds", "Time of tower and branch for a still or video.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_size = Histogram(
            f"{name}batch_size",
            "Prompts answered at once, as a batch begins or others join it.",
            buckets=(1, 2, 4, 8, 16, 32),
            registry=registry,
        )
        self.prompt_tokens = Counter(f"{name}prompt_tokens", "Tokens of prompts.", registry=registry)
        self.answer_tokens = Counter(f"{name}answer_tokens", "Generated tokens.", registry=registry)
        self.frames = Counter(f"{name}frames", "Frames of encoded videos.", registry=registry)
        self.cache = Counter(f"{name}cache", "Requests for a visual's tokens.", ["result"], registry=registry)
        self.cancelled = Counter(f"{name}cancelled", "Requests whose client went away.", registry=registry)

    def watch(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when the metrics are."""
        Gauge(f"bt_adapter_{name}", help, registry=self.registry).set_function(value)

    def count_answer(self, prompt: int, answer: int, first: float) -> None:
        """Count an answer by the tokens of its prompt and its own, and the seconds to its first token."""
        self.prompt_tokens.inc(prompt)
        self.answer_tokens.inc(answer)
        self.first_token_seconds.observe(first)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
