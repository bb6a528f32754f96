"""``bt-adapter export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, arg

from bt_adapter.chat.model_folders import check_model, needs_branch
from bt_adapter.errors import CommandError
from bt_adapter.training.settings import COUNT, check_numbers


@dataclass(frozen=True)
class Export:
    """Write an image chat model with its branch as one folder that transformers loads by itself.

    After ``import bt_adapter.native``, AutoModelForImageTextToText and AutoProcessor load it; a tuned model is written
    with its adapters merged.
    """

    renamed: ClassVar[dict[str, str]] = {"other_tower": "require_same_tower"}

    model: Positional[Annotated[str, arg(metavar="MODEL")]]
    """Image chat model: a folder, a hub name, a folder of a tuning run (OUT/tuned), or "mini"."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write. It must not exist."""
    branch: str | None = None
    """Branch to attach: a folder of save_pretrained, its hub name, or a published checkpoint. It replaces the branch
    that mini, a tuned model or a video chat model has."""
    require_same_tower: bool = True
    """Refuse a branch trained beside another CLIP than the model's. Without it, one of the same shape but for the
    resolution is accepted with a warning."""
    frames: int | None = None
    """Frames that the processor takes of a video; default: as the model was tuned or its branch pretrained, else 8."""
    long: Literal["average", "interpolate", "published"] | None = None
    """In videos of more frames than the branch was trained with: average neighbouring frames down to its time steps,
    interpolate the trained rows of its time table, or read all its rows as stored. Default: as the model was tuned,
    else average."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights that are written; auto: the one in which the model is stored."""


def run(command: Export) -> int:
    """Check the options, then load and write. Returns the exit code."""
    check_numbers(command, {"frames": COUNT})
    if command.out.exists():
        raise CommandError(f"OUT {command.out} is already there; name another folder")
    check_model(command.model, None)
    if command.branch is None and needs_branch(command.model):
        raise CommandError(f"MODEL {command.model} needs --branch: a branch pretrained on its CLIP")
    import torch

    from bt_adapter.chat.engine import VideoChat
    from bt_adapter.chat.export import save_chat
    from bt_adapter.chat.loading import LoadOptions
    from bt_adapter.chat.sampled import DEFAULTS, read_sampling
    from bt_adapter.chat.tuned import load_by_name
    from bt_adapter.progress import make_console, say

    notes = make_console(stderr=True)
    dtype = None if command.dtype == "auto" else getattr(torch, command.dtype)
    sampling = DEFAULTS | read_sampling(command.model, command.branch)[0]
    frames, long = command.frames or sampling["frames"], command.long or sampling["long"]
    with notes.status("loading the model"):
        try:
            options = LoadOptions(dtype=dtype, require_same_tower=command.require_same_tower)
            chat = VideoChat(*load_by_name(command.model, command.branch, options))
        except (ValueError, TypeError) as error:
            branch = "" if command.branch is None else f" with --branch {command.branch}"
            raise CommandError(f"MODEL {command.model}{branch}: {error}") from error
    with notes.status("writing"):
        save_chat(chat, command.out, frames, long)
    say(notes, f"{command.out}: {type(chat.model).__name__}; its processor takes {frames} frames of a video")
    return 0
