"""The command ``bt-adapter``: chat about a video file, show the demo, train the small stack.

Nothing heavy is imported before the arguments are read, so ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from bt_adapter.errors import CommandError

MINI_PARTS = {
    "items": ("bt_adapter.mini.items", "write the shipped test items"),
    "clip": ("bt_adapter.mini.clip", "train the small CLIP"),
    "branch": ("bt_adapter.mini.pretrain", "pretrain the branch beside it"),
    "projector": ("bt_adapter.mini.tune", "train projector and adapters on questions about stills"),
    "tuned": ("bt_adapter.mini.tune", "tune projector, adapters and branch on questions about clips"),
    "control": ("bt_adapter.mini.tune", "the same with the branch off"),
    "retrieval": ("bt_adapter.mini.retrieval", "evaluate retrieval of motion captions"),
}


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


@dataclass(frozen=True)
class Demo:
    """Ask about clips written as mp4 and about a real one, with the branch on and off, and show measured results."""

    evaluate: bool = False
    """Measure the small stack on held-out clips (minutes) and store the result, instead of the demo."""
    clips: int = 9
    """Moving clips to ask about; the nine motions take turns."""
    seed: int = 7
    """Of the clips' scenes."""
    keep: Path | None = None
    """Folder to leave the written mp4 files in."""
    out: Path | None = None
    """With --evaluate: where the result goes; default: bench/results/mini of a checkout, else the current folder."""
    each: int = 30
    """With --evaluate: clips of each of the nine motions."""


@dataclass(frozen=True)
class Mini:
    """Make a part of the small stack; further arguments go to the part's own command (bt-adapter mini clip --help)."""

    part: Positional[Literal["items", "clip", "branch", "projector", "tuned", "control", "retrieval"]]
    """Which part."""
    rest: Annotated[tuple[str, ...], tyro.conf.Suppress] = field(default=())


Command = (
    Annotated[Chat, subcommand("chat")] | Annotated[Demo, subcommand("demo")] | Annotated[Mini, subcommand("mini")]
)


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing one line on what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["mini"] and len(argv) > 1 and argv[1] in MINI_PARTS:
            return _run_mini(argv[1], argv[2:])
        command = tyro.cli(
            Command,
            args=argv,
            prog="bt-adapter",
            description="Chat about a video file, show the demo, train the small stack.",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        if isinstance(command, Chat):
            return _run_chat(command)
        if isinstance(command, Mini):
            return _run_mini(command.part, list(command.rest))
        for name, value in (("clips", command.clips), ("each", command.each)):
            if value < 1:
                raise CommandError(f"--{name} must be 1 or more, got {value}")
        from bt_adapter.demo import run_demo, run_evaluation

        return run_evaluation(command.out, command.each) if command.evaluate else run_demo(command)
    except KeyboardInterrupt:
        print("bt-adapter: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"bt-adapter: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Bad input or a missing part, as against a fault of this program."""
    if isinstance(error, (CommandError, OSError)):
        return True
    from bt_adapter.checkpoint import CheckpointError
    from bt_adapter.data import VideoError
    from bt_adapter.mini.language import LanguageModelError

    return isinstance(error, (CheckpointError, VideoError, LanguageModelError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _run_mini(part: str, rest: list[str]) -> int:
    module = importlib.import_module(MINI_PARTS[part][0])
    before = sys.argv
    stage = [part] if MINI_PARTS[part][0].endswith(".tune") else []
    sys.argv = [module.__file__ or part, *stage, *rest]
    try:
        module.main()
    finally:
        sys.argv = before
    return 0


def _run_chat(command: Chat) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
