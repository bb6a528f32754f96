"""Runs an evaluation from the arguments of the command line to its result file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bt_adapter.data.annotations import class_names, read_annotations
from bt_adapter.data.clips import Clip
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.skipped import Skipped
from bt_adapter.eval import recognition, retrieval
from bt_adapter.eval.cache import FeatureCache
from bt_adapter.eval.features import Features, Look, extract
from bt_adapter.eval.report import check_overwriting, device_name, versions
from bt_adapter.eval.settings import Evaluation, Recognition, Retrieval
from bt_adapter.eval.similarities import read_settings, write_similarities
from bt_adapter.eval.stack import Stack, load_stack
from bt_adapter.files import write_json
from bt_adapter.model.dtypes import choose_dtype
from bt_adapter.progress import Progress, make_console, print_table, progress_bar, say
from bt_adapter.training.processes import Processes

FRAMES = {"msrvtt": 12, "didemo": 64, "lsmdc": 64, "activitynet": 64, "hmdb51": 16, "ucf101": 16, "kinetics400": 16}
_OTHER_FRAMES = 8
_FEATURES = 1  # version of the cached features; raised when a change of this package changes them


def evaluate(command: Evaluation) -> int:
    """Run an evaluation on every process of torchrun; the first one writes and prints the result. Returns 0.

    Raises:
        CommandError: there is nothing to evaluate, or arguments do not fit. OSError: as ``load_stack``.
    """
    processes = Processes(command.device)
    try:
        return _evaluate(command, processes)
    finally:
        processes.leave()


def _evaluate(command: Evaluation, processes: Processes) -> int:
    notes = make_console(stderr=True)
    clips, skipped = read_annotations(command.layout, command.data, command.videos, command.split)
    stack = load_stack(command.clip, command.branch, not command.no_branch)
    stack.model.to(processes.device)
    frames = command.frames or FRAMES.get(command.layout, _OTHER_FRAMES)
    look = Look(frames, command.sampling, command.views, command.long)
    precision = processes.gather(choose_dtype(command.dtype, processes.device))[0]
    if processes.first:
        say(notes, str(precision))
    if precision.dtype != torch.float32:
        stack.model.tower.optimize(precision.dtype)
    about = _about(stack, look, precision.name)
    settings = _settings(command, stack, look, precision.name)
    if not command.overwrite:
        advice = "name another file, or pass --overwrite"
        processes.check_in_first(lambda: check_overwriting(command.out, settings, advice))
        if isinstance(command, Retrieval) and command.scores is not None:
            path = command.scores
            processes.check_in_first(
                lambda: check_overwriting(path, _of_features(settings), advice, option="scores", read=read_settings)
            )
    cache = FeatureCache(None if command.no_cache else command.cache, about)
    began = time.perf_counter()
    with _bar(notes, processes.first) as progress:
        features = extract(
            stack.model, clips, look, stack.branch, command.batch_size, command.workers, cache, processes, progress
        )
    seconds = time.perf_counter() - began
    if not processes.first:
        return 0
    stack.text.to(processes.device)
    figures, table = _figures(command, features, clips, stack, settings)
    for number, reason in features.failed.items():
        skipped.add(clips[number].key, reason)
    result = {
        **settings,
        **versions(),
        "device": device_name(processes.device),
        "processes": processes.world,
        "precision_chosen": precision.why,
        "dtype": str(stack.model.tower.dtype).removeprefix("torch."),
        "trained_steps": stack.model.trained_steps if stack.branch else None,
        "clips": len(features.kept),
        **figures,
        "skipped": skipped.reasons,
        "damaged": [clips[number].key for number in features.truncated],
        "seconds": round(seconds, 3),
        "computed": features.computed,
        "clips_per_second": round(features.computed / seconds, 3) if features.computed else None,
    }
    write_json(command.out, result)
    print_table(*table)
    _print_notes(notes, command, result, skipped, cache.damaged)
    return 0


def _settings(command: Evaluation, stack: Stack, look: Look, precision: str) -> dict[str, Any]:
    """Return everything that the metrics depend on; a result with the same settings may be overwritten."""
    settings = {
        "task": "retrieval" if isinstance(command, Retrieval) else "recognition",
        "layout": command.layout,
        "data": str(command.data),
        "videos": None if command.videos is None else str(command.videos),
        "split": command.split,
        "clip": stack.clip,
        "branch": stack.source,
        "branch_used": stack.branch,
        "fingerprint": stack.fingerprint,
        "precision": precision,
        "images": stack.model.images.to_dict(),
        "frames": look.frames,
        "sampling": look.sampling,
        "views": look.views,
        "long": look.long,
    }
    if isinstance(command, Recognition):
        return settings | {"templates": list(recognition.read_templates(command.templates))}
    return settings | {"dual_softmax_temperature": command.temperature if command.dual_softmax else None}


def _about(stack: Stack, look: Look, precision: str) -> dict[str, Any]:
    """Return everything that a feature depends on besides the clip."""
    return {
        "format": _FEATURES,
        "model": stack.fingerprint,
        "branch": stack.branch,
        "precision": precision,
        "frames": look.frames,
        "sampling": look.sampling,
        "views": look.views,
        "long": look.long,
        "transform": _transform(stack.model.images),
    }


def _transform(images: ImageSettings) -> str | dict[str, Any]:
    """Describe the preprocessing: by a fixed text for CLIP's (existing caches use it), else by all settings."""
    is_default = images == ImageSettings(images.size)
    return f"short side and centre {images.size}, bicubic" if is_default else images.to_dict()


def _of_features(settings: dict[str, Any]) -> dict[str, Any]:
    """Select the settings that the similarities of captions and clips depend on."""
    return {name: value for name, value in settings.items() if name != "dual_softmax_temperature"}


def _figures(
    command: Evaluation, features: Features, clips: list[Clip], stack: Stack, settings: dict[str, Any]
) -> tuple[dict[str, Any], Any]:
    """Compute the metrics and the table of an evaluation, and write the file of ``--scores``."""
    if isinstance(command, Retrieval):
        compared = [clips[number] for number in features.kept]
        captions = [clip.captions for clip in compared]
        scores = retrieval.score(features.vectors, captions, stack.text)
        if command.scores is not None:
            write_similarities(command.scores, scores, compared, _of_features(settings))
        temperature = command.temperature if command.dual_softmax else None
        figures = retrieval.figures(scores, captions, stack.text, temperature)
        return figures, retrieval.rows(figures)
    names, templates = class_names(command.layout, command.data), recognition.read_templates(command.templates)
    figures = recognition.figures(features, clips, names, templates, stack.text)
    return figures, recognition.rows(figures)


def _print_notes(
    notes: Console, command: Evaluation, result: dict[str, Any], skipped: Skipped, damaged: list[Path]
) -> None:
    """Print what the table does not show: speed, files, damaged and skipped clips."""
    speed = f", {result['clips_per_second']:.1f} clips/s" if result["computed"] else ""
    lines = [
        f"{result['clips']} clips, {result['frames']} frames; {result['computed']} computed in "
        f"{result['seconds']:.1f} s{speed}; the result is in {command.out}"
    ]
    if isinstance(command, Retrieval) and command.scores is not None:
        lines.append(f"the similarities of captions and clips are in {command.scores}")
    if shared := result.get("captions_of_several_videos"):
        lines.append(f"{shared} captions belong to several videos: only a query's own video counts as correct")
    if result["damaged"]:
        lines.append(f"{len(result['damaged'])} damaged or truncated, but used: {', '.join(result['damaged'])}")
    lines.extend(f"{path} is damaged and was not used; it can be deleted" for path in damaged)
    if len(skipped):
        lines.append(skipped.report())
    say(notes, "\n".join(lines))


@contextmanager
def _bar(notes: Console, first: bool) -> Iterator[Progress | None]:
    """Show a progress bar on the first process only."""
    if not first:
        yield None
        return
    with progress_bar(notes, "features", remaining=True) as progress:
        yield progress
