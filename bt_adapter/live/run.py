"""The command ``live``: answers about a stream in the terminal."""

from __future__ import annotations

import sys
import time

from rich.console import Console

from bt_adapter.chat.conversation import ContextError
from bt_adapter.chat.prompts import PromptError
from bt_adapter.chat.session import chosen_dtype, load, sampling_of
from bt_adapter.errors import CommandError
from bt_adapter.live.session import LiveReply, LiveSession
from bt_adapter.live.settings import LiveChat
from bt_adapter.live.source import LiveSource
from bt_adapter.progress import make_console, say


def run_live(command: LiveChat) -> int:
    """Run the command. Returns the exit code; raises VideoError for a source that cannot be opened or stays lost."""
    notes = make_console(stderr=True)
    try:
        source = LiveSource(
            command.source, command.fps, command.format, command.options, command.open_timeout, command.read_timeout,
            command.give_up, command.pace or None,
        )  # fmt: skip
    except ValueError as error:
        raise CommandError(str(error)) from error
    model = command.chat_model
    say(notes, str(chosen_dtype(model)), "dim")
    with notes.status("loading the model"):
        chat = load(model)
    source.side = chat.images.largest_side
    sampling = sampling_of(model)
    try:
        session = LiveSession(chat, command.window, command.frames, command.fps, sampling.branch, sampling.long)
    except ValueError as error:
        raise CommandError(str(error)) from error
    watcher = Watcher(session, command, notes)
    try:
        with source, session:
            watcher.run(source)
    finally:
        counts = source.counts
        say(
            notes,
            f"{watcher.kept} frames watched of {counts.decoded} · {counts.dropped} dropped · source lost "
            f"{counts.lost} times · {counts.jumps} clock jumps · {watcher.answers} answers",
            "dim",
        )
    return 0


class Watcher:
    """Pushes the frames of a source into a session and asks its question when it is due.

    Attributes:
        kept: frames pushed. answers: number given.
    """

    def __init__(self, session: LiveSession, command: LiveChat, notes: Console) -> None:
        self.session, self.command, self.notes = session, command, notes
        self.kept = self.answers = 0

    def run(self, source: LiveSource) -> None:
        """Watch until the source ends or the wanted number of answers is reached; ask once more at the end."""
        period = due = self.command.period
        is_new, lost = False, 0
        for frame in source:
            self.kept += self.session.push(frame.pixels, frame.time)
            is_new = True
            if source.counts.lost > lost:
                lost = source.counts.lost
                say(self.notes, f"{frame.time:.1f} s: the source was lost and is back", "yellow")
            if frame.time < due:
                continue
            self._ask()
            is_new = False
            if self.answers == self.command.answers:
                return
            due = max(due + period, frame.time)
        if is_new:
            self._ask()

    def _ask(self) -> None:
        begin = time.perf_counter()
        try:
            reply = self.session.ask(self.command.question, self.command.max_new_tokens)
        except (PromptError, ContextError) as error:
            raise CommandError(str(error)) from error
        self.answers += 1
        sys.stdout.write(f"{reply.view.span[1]:.1f} s: {' '.join(reply.reply.text.split())}\n")
        sys.stdout.flush()
        say(self.notes, _summary(reply, time.perf_counter() - begin), "dim")


def _summary(reply: LiveReply, seconds: float) -> str:
    """Format the facts of an answer: "8 frames from 0.0 to 1.8 s · tokens 0.01 s · … · answered in 0.62 s"."""
    first, last = reply.view.span
    return (
        f"{reply.view.frames} frames from {first:.1f} to {last:.1f} s · tokens {reply.view.encode:.3f} s · "
        f"first token {reply.reply.seconds['first token']:.2f} s · answered in {seconds:.2f} s"
    )
