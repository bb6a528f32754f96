"""Recognise the kind of a chat model from its name or folder, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

from bt_adapter.errors import CommandError
from bt_adapter.towers.hugging_face import is_hub_name, read_json

TUNED = "tuned.json"  # describes the parts in a folder that a tuning run wrote
NATIVE_PREFIX = "bt_adapter_"  # of the model types of video chat models (``bt_adapter.native``)
STAGES = ("fresh", "image", "tuned", "control")  # of the small stack's chat model


def mini_stage(model: str | os.PathLike[str]) -> str | None:
    """Read which stage of the small stack a model name means: "mini" is its last, "mini:image" an earlier one.

    Stages: "fresh" (an untrained projector), "image" (tuned only on stills), "tuned" (then on videos with
    the branch) and "control" (then on the same videos without it).

    Returns:
        The stage; None where the name is of another model.

    Raises:
        ValueError: there is no such stage.
    """
    kind, colon, stage = os.fspath(model).partition(":")
    if kind != "mini":
        return None
    if not colon:
        return "tuned"
    if stage not in STAGES:
        known = ", ".join(f"mini:{name}" for name in STAGES)
        hint = "; what was mini:projector is mini:image" if stage == "projector" else ""
        raise ValueError(f"there is no model {model}; expected one of {known}{hint}")
    return stage


def check_model(model: str, quantize: str | None) -> None:
    """Check a model name, and that the model can be quantized if requested.

    Raises:
        CommandError: there is no such stage of the small stack, or quantization of it is requested.
    """
    try:
        is_mini = mini_stage(model) is not None
    except ValueError as error:
        raise CommandError(f"--model: {error}") from error
    if is_mini and quantize is not None:
        raise CommandError("--quantize is for models of a folder or the hub; mini is small enough")


def needs_branch(model: str) -> bool:
    """Whether a local chat model has no branch of its own. Models on the hub are checked when they are loaded."""
    has_branch = mini_stage(model) is not None or is_tuned(model) or is_native(model)
    return not has_branch and not is_hub_name(model)


def is_tuned(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is the result of a tuning run."""
    return (Path(folder) / TUNED).is_file()


def is_native(model: str) -> bool:
    """Whether a folder holds a video chat model written by ``save_pretrained``."""
    return str(read_json(Path(model) / "config.json").get("model_type")).startswith(NATIVE_PREFIX)
