"""One question on the terminal: progress bars, the streamed answer, and what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bt_adapter.chat.engine import Reply, VideoChat, peak_memory, read
from bt_adapter.chat.prompts import image_token
from bt_adapter.errors import CommandError

if TYPE_CHECKING:
    from bt_adapter.commands.chat import Chat


def run_chat(command: Chat) -> int:
    """Load, decode, encode, answer. The answer goes to stdout, all else to stderr. Returns the exit code."""
    notes = Console(stderr=True, highlight=False)
    seconds: dict[str, float] = {}
    with _stage(seconds, "decode"), progress_bar(notes, "decoding") as progress:
        video = read(
            command.video, command.frames, command.repeat, progress
        )  # first: a bad file is told before a model is loaded
    if video.truncated:
        notes.print(
            f"[yellow]{command.video}: damaged or cut short; going on with the {video.total} frames that are there"
        )
    with _stage(seconds, "load"), notes.status("loading the model"):
        chat = load(command)
    with _stage(seconds, "encode"), progress_bar(notes, "encoding") as progress:
        tokens = chat.encode(video, not command.no_branch, progress)

    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if image_token(chat.model, chat.tokenizer) in command.question:
        raise CommandError("the question holds the model's image token; ask in plain text")
    reply = chat.ask(tokens, command.question, command.max_new_tokens, show)
    sys.stdout.write("\n")
    seconds |= reply.seconds
    notes.print(summary(len(video.frames), video.total, seconds, reply, peak_memory(chat.device)), style="dim")
    return 0


def load(command: Chat) -> VideoChat:
    """The model a command line asks for. CommandError for what is not there or does not fit."""
    device = command.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise CommandError(f"--device {device}: no GPU that this torch can use")
    except RuntimeError as error:
        raise CommandError(f"--device {device}: not a device") from error
    dtype = None if command.dtype == "auto" else getattr(torch, command.dtype)
    if command.model == "mini":
        chat = VideoChat.mini(device=device, dtype=dtype or torch.float32)
        if command.branch is not None:
            from bt_adapter.chat.attach import attach

            try:
                attach(chat.model, command.branch)
            except (ValueError, TypeError) as error:
                raise CommandError(f"--branch {command.branch}: {error}") from error
        return chat
    try:
        return VideoChat.load(command.model, command.branch or "", device, dtype)
    except (ValueError, TypeError) as error:
        raise CommandError(f"--model {command.model} with --branch {command.branch}: {error}") from error


def summary(frames: int, total: int, seconds: dict[str, float], reply: Reply, memory: int) -> str:
    """ "8 of 132 frames · decode 0.21 s · … · 12 tokens, 25.1 tokens/s · peak memory 1.31 GB"."""
    stages = " · ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    speed = f", {reply.tokens_per_second:.1f} tokens/s" if reply.tokens > 1 else ""
    return f"{frames} of {total} frames · {stages} · {reply.tokens} tokens{speed} · peak memory {memory / 1e9:.2f} GB"


@contextmanager
def progress_bar(console: Console, what: str) -> Iterator:
    """A callback (done, in all) that moves a bar; the bar goes when it is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
