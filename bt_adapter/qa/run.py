"""Evaluates question answering on public benchmarks: answers in their scorers' format, exact match and a judge."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bt_adapter.chat.answer import about, answer_with, begin_processes, settle
from bt_adapter.chat.questions import Question
from bt_adapter.chat.shares import SharedRows
from bt_adapter.data.finding import VisualFolder
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.eval.qa import Item, exact_scores, read_items, write_predictions
from bt_adapter.eval.report import check_overwriting, versions
from bt_adapter.files import Rows, write_json
from bt_adapter.model.dtypes import ChosenDtype
from bt_adapter.progress import make_console, print_table, progress_bar, say
from bt_adapter.qa.judge import ASPECTS, PROMPTS, Case, Judge, judge_all, summary
from bt_adapter.qa.settings import Qa


def evaluate_qa(command: Qa) -> int:
    """Predict, then score; both resume a killed run. Returns the exit code.

    scores.json includes all stored verdicts, of any judge, even if this run is stopped or fails.
    """
    notes = make_console(stderr=True)
    items = read_items(command.data, command.answers)
    folder = VisualFolder(command.videos)
    asked = [question for item in items for question in _questions(item, folder)]
    processes = begin_processes(command.device)
    try:
        notes.quiet = not processes.first
        command, chosen = settle(command, processes)
        say(notes, str(chosen), "dim")
        made = {**about(command), "data": command.data.name}
        with SharedRows(command.out / "answers.jsonl", made, processes) as rows:
            processes.check_in_first(lambda: _check_scores(command))
            skipped = answer_with(command, asked, rows, command.batch_size, notes)
            given = {key: row["prediction"] for key, row in rows.done.items()}
    finally:
        processes.leave()
    return _score(command, items, given, skipped, chosen, notes) if processes.first else 0


def _score(
    command: Qa, items: Sequence[Item], given: dict[str, str], skipped: Skipped, chosen: ChosenDtype, notes: Console
) -> int:
    """Write predictions and scores, and have the judge, if any, score the answers."""
    if skipped:
        say(notes, skipped.report(), "yellow")
    answered = [item for item in items if all(key in given for key in item.keys)]
    if not answered:
        raise CommandError(f"none of the {len(items)} records of --data {command.data} could be answered")
    write_predictions(command.out / "predictions.json", answered, given)
    scores: dict[str, Any] = {
        "data": command.data.name,
        "records": len(items),
        "answered": len(answered),
        "skipped": skipped.reasons,
        **exact_scores(answered, given),
        "made": {**_settings(command), "dtype_chosen": chosen.why, **versions()},
    }
    cases = [
        Case(item.id, tuple(zip(item.questions, (given[k] for k in item.keys), strict=True)), item.answer)
        for item in answered
    ]
    scores |= _stored(command.out, cases)
    write_json(command.out / "scores.json", scores)
    if command.judge_url is not None:
        try:
            _judge(command, cases, command.aspects or aspects_of(answered, command.data), notes)
        finally:
            scores |= _stored(command.out, cases)
            write_json(command.out / "scores.json", scores)
    _print(scores)
    return 0


def _settings(command: Qa) -> dict[str, Any]:
    """Return everything that the scores depend on, except the judge."""
    answers = None if command.answers is None else command.answers.name
    return {**about(command), "data": command.data.name, "answers": answers}


def _check_scores(command: Qa) -> None:
    """Raise CommandError if the folder holds scores of other settings."""
    check_overwriting(command.out / "scores.json", _settings(command), "name another folder, or remove it", "made")


def aspects_of(items: Sequence[Item], data: Path) -> tuple[str, ...]:
    """Return the aspects that a judge scores for such records."""
    if len(items[0].questions) == 2:
        return ("consistency",)
    if "Q" not in items[0].record:
        return ("match",)
    return ("temporal",) if "temporal" in data.name.lower() else ("correctness", "detail", "context")


def _judge(command: Qa, cases: Sequence[Case], aspects: Sequence[str], notes: Console) -> None:
    assert command.judge_url is not None and command.judge_model is not None
    key = os.environ.get(command.judge_key)
    judge = Judge(
        command.judge_url, command.judge_model, key, command.judge_timeout, command.judge_tries,
        parallel=command.judge_parallel, temperature=command.judge_temperature,
    )  # fmt: skip
    for aspect in aspects:
        about = {"url": judge.url, "model": judge.model, "prompts": PROMPTS, "aspect": aspect}
        if judge.temperature != 0:  # files from before the option existed do not store it: it was 0
            about["temperature"] = "left out" if judge.temperature is None else judge.temperature
        with Rows(_verdicts(command.out, aspect), about) as rows:
            with progress_bar(notes, f"judging {aspect}") as progress:
                skipped = judge_all(judge, cases, aspect, rows, progress)
            refused = summary(cases, aspect, rows)["refused"]
        if skipped:
            say(notes, f"no verdict on {aspect}: {skipped.report(10)}", "yellow")
        if refused:
            say(notes, f"{refused} of them are refused; the next run tries them again", "yellow")


def _verdicts(folder: Path, aspect: str) -> Path:
    return folder / f"judged-{aspect}.jsonl"


def _stored(folder: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Summarise the folder's verdicts on these cases with the judge: {"judge": {"aspects": …}}, or {} without any."""
    found = {}
    for aspect in ASPECTS:
        path = _verdicts(folder, aspect)
        about_path = path.with_name(path.name + ".about.json")
        if path.is_file() and about_path.is_file():
            about = json.loads(about_path.read_text(encoding="utf-8"))
            with Rows(path, about) as rows:
                settings = {name: value for name, value in about.items() if name != "aspect"}
                found[aspect] = settings | summary(cases, aspect, rows)
    return {"judge": {"aspects": found}} if found else {}


def _questions(item: Item, folder: VisualFolder) -> list[Question]:
    path, kind = _find(folder, item.video, item.visual)
    return [
        Question(key, path, text, {"answer": item.answer}, item.video, kind)
        for key, text in zip(item.keys, item.questions, strict=True)
    ]


def _find(folder: VisualFolder, name: str, visual: str = "video") -> tuple[Path, str]:
    """Find the file of a benchmark's video or still; return it and its kind, "video" or "image".

    ActivityNet's files are named v_…, MSRVTT-QA's video7, MSVD-QA's vid7.
    """
    return folder.find(name, visual, ("", "v_", "video", "vid") if visual == "video" else ("",))


def _print(scores: dict[str, Any]) -> None:
    rows = [["exact match", f"{100 * scores['exact']:.1f} %"], ["contains it", f"{100 * scores['contained']:.1f} %"]]
    for aspect, found in scores.get("judge", {}).get("aspects", {}).items():
        if found["score"] is None:
            continue
        if "accuracy" in found:
            rows.append([f"{found['model']}: right", f"{100 * found['accuracy']:.1f} %"])
        rows.append([f"{found['model']}: {aspect}, 0 to 5", f"{found['score']:.2f}"])
    print_table([f"{scores['answered']} of {scores['records']} records", ""], rows)
