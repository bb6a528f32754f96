"""Functions of the task ``mini_motion`` of lmms-eval: questions about clips of the small stack, and their scores."""

from __future__ import annotations

from typing import Any

from bt_adapter.mini import data_folder

QUESTION = "How is it moving?"


def motion_only(documents: Any) -> Any:
    """Keep the clips of a single event."""
    return documents.filter(lambda document: document["question"] == QUESTION)


def visual(document: dict[str, Any]) -> list[str]:
    """Return the clip's file."""
    return [str(data_folder() / "clips" / document["file"])]


def text(document: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the question."""
    return document["question"]


def target(document: dict[str, Any]) -> str:
    """Return the event: "moving left" of "a white boot moving left"."""
    return document["truth"].split(" ", 3)[3]


def score(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score 1 if the answer is the event in the words of the small world: "It is moving left."."""
    return {"accuracy": float(results[0].strip() == f"It is {target(document)}.")}
