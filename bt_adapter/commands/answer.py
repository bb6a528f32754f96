"""``bt-adapter answer``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from bt_adapter.commands.chat import BatchOptions, ChatModel
from bt_adapter.errors import CommandError
from bt_adapter.training.settings import COUNT, check_numbers


@dataclass(frozen=True, kw_only=True)
class AnswerData:
    """Questions, files and answers."""

    help_group: ClassVar[str] = "data"

    questions: Positional[Annotated[Path, arg(metavar="FILE")]]
    """File of the questions."""
    videos: Annotated[Path, arg(metavar="PATH")]
    """Folder of the videos and stills, or the one file that all questions are about."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("answers.jsonl")
    """File of the answers, one JSON object per line, appended after each batch."""


@dataclass(frozen=True, kw_only=True)
class Answer(BatchOptions, ChatModel, AnswerData):
    """Answer a list of questions about videos and stills, in batches; a killed run resumes when it is started again.

    Under torchrun each process answers its share, and all answers are in one file at the end.

    Questions: one JSON object per line, {"video": …, "question": …}, optionally "id" and "answer" (copied);
    {"image": …} instead of the video asks about a still, as the image chat model takes it. Files that cannot be read,
    and prompts that do not fit into the model's context, are skipped, counted and named at the end.
    """

    renamed = ChatModel.renamed | {"batch": "batch_size"}


def run(command: Answer) -> int:
    """Check the options, then answer. Returns the exit code."""
    command.check()
    check_numbers(command, {"batch_size": COUNT, "workers": COUNT})
    if not command.questions.is_file():
        raise CommandError(f"FILE of questions {command.questions}: there is no such file")
    if not command.videos.exists():
        raise CommandError(f"--videos {command.videos}: there is no such file or folder")
    from bt_adapter.chat.answer import run_answer

    return run_answer(command)
