"""``bt-adapter chat``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from bt_adapter.errors import CommandError


@dataclass(frozen=True)
class Chat:
    """Ask a question about a video file; the answer is streamed, then what it cost."""

    question: Positional[str]
    """What to ask."""
    video: Annotated[Path, arg(metavar="FILE")]
    """Video file, anything FFmpeg decodes."""
    model: str = "mini"
    """Image chat model: "mini" (comes with this package), a local folder, or a hub name of a LLaVA-like model."""
    branch: str | None = None
    """Branch to attach: a folder of save_pretrained, its hub name, or a published checkpoint; mini has its own."""
    frames: int = 8
    """Frames to take, evenly spread over the video."""
    repeat: bool = False
    """Repeat frames where the video has fewer than --frames."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    no_branch: Annotated[bool, arg(name="no-branch")] = False
    """Switch the branch off: the language model gets the mean of the frames."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; "auto" takes a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the model; "auto": float32 for mini, else as stored."""


def run(command: Chat) -> int:
    """Check what can be checked at once, then chat. Returns the exit code."""
    for name, value in (("frames", command.frames), ("max-new-tokens", command.max_new_tokens)):
        if value < 1:
            raise CommandError(f"--{name} must be 1 or more, got {value}")
    if not command.question.strip():
        raise CommandError("the question is empty")
    if not command.video.is_file():  # before seconds go by loading a model
        what = "is a folder" if command.video.is_dir() else "there is no such file"
        raise CommandError(f"{command.video}: {what}")
    if command.model != "mini" and command.branch is None:
        raise CommandError(f"--model {command.model} needs --branch: a branch pretrained on its CLIP")
    from bt_adapter.chat.session import run_chat

    return run_chat(command)
