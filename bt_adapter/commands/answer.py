"""``bt-adapter answer``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bt_adapter.commands.chat import ChatModel
from bt_adapter.errors import CommandError
from bt_adapter.limits import COUNT, check_numbers


@dataclass(frozen=True, kw_only=True)
class Answer(ChatModel):
    """Answer a list of questions about videos and stills, in batches; run again after a kill, it goes on.

    Under torchrun each process answers its share, and all answers come into one file in the end.

    Questions: one JSON object a line, {"video": …, "question": …}, optionally "id" and "answer" (copied); {"image": …}
    in the place of the video asks about a still, as the image chat model takes it. Files that cannot be read, and
    prompts that do not fit into the model's context, are skipped, counted and named at the end.
    """

    questions: Positional[Annotated[Path, arg(metavar="FILE")]]
    """The questions."""
    videos: Annotated[Path, arg(metavar="PATH")]
    """Folder of the videos and stills, or the one file that all questions are about."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("answers.jsonl")
    """Answers, one JSON object a line, appended as they come."""
    batch: int = 8
    """Questions answered at once."""
    workers: int = 2
    """Videos decoded at a time, each by a thread, while the model works on those before them."""


def run(command: Answer) -> int:
    """Check what can be checked at once, then answer. Returns the exit code."""
    command.check()
    check_numbers(command, {"batch": COUNT, "workers": COUNT})
    if not command.questions.is_file():
        raise CommandError(f"FILE of questions {command.questions}: there is no such file")
    if not command.videos.exists():
        raise CommandError(f"--videos {command.videos}: there is no such file or folder")
    from bt_adapter.chat.answer import run_answer

    return run_answer(command)
