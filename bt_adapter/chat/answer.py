"""Answer a list of questions about videos and stills in batches; a killed run resumes from its output file."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from bt_adapter.chat.ahead import DecodedAhead
from bt_adapter.chat.conversation import ContextError, Visual, answer_batch, check_context, context, video_room
from bt_adapter.chat.prompts import PromptError, Turn, conversation_ids
from bt_adapter.chat.questions import Question, read_questions, share_of
from bt_adapter.chat.session import chosen_dtype, load, sampling_of, say_choices
from bt_adapter.chat.settings import Answer, BatchChatModel
from bt_adapter.chat.shares import SharedRows
from bt_adapter.chat.watch import EncodedVisual, Sampling, encode_image, watch
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.files import Rows, digest
from bt_adapter.model.dtypes import ChosenDtype
from bt_adapter.progress import Progress, make_console, progress_bar, say
from bt_adapter.training.processes import Processes

if TYPE_CHECKING:
    from bt_adapter.chat.engine import VideoChat

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Processes with short videos wait for those with long ones. A dead process is detected without this timeout.
_TIMEOUT = timedelta(days=7)


def begin_processes(device: str) -> Processes:
    """Join the distributed processes of a run that answers questions. Raises CommandError, see ``Processes``."""
    return Processes(device, _TIMEOUT)


def run_answer(command: Answer) -> int:
    """Answer the questions that have no answer yet, divided among the processes of torchrun. Returns the exit code."""
    questions = read_questions(command.questions, command.videos)
    processes = begin_processes(command.device)
    try:
        notes = make_console(stderr=True)
        notes.quiet = not processes.first
        command, chosen = settle(command, processes)
        say(notes, str(chosen), "dim")
        with SharedRows(command.out, about(command), processes) as rows:
            skipped = answer_with(command, questions, rows, command.batch_size, notes)
    finally:
        processes.leave()
    return report(notes, command.out, len(questions), skipped) if processes.first else 0


CommandT = TypeVar("CommandT", bound=BatchChatModel)


def settle(command: CommandT, processes: Processes) -> tuple[CommandT, ChosenDtype]:
    """Return the command with this process's device and the dtype that all processes use, and the reason for it."""
    command = replace(command, device=str(processes.device))
    chosen = processes.gather(chosen_dtype(command))[0]
    return replace(command, dtype=chosen.name), chosen


def answer_with(
    command: BatchChatModel, questions: Sequence[Question], rows: SharedRows, batch: int, notes: Console
) -> Skipped:
    """Load the model and answer the questions that ``rows`` lacks; the model is not loaded if none is missing.

    Each process answers its share; at the end the first process writes all rows to the file. Returns the skipped
    questions of all processes.

    Raises CommandError if a stored answer belongs to a different question, or if one of the processes fails.
    """
    for question in questions:
        row = rows.done.get(question.id)
        if row is not None and (row["question"], row.get(question.kind)) != (question.text, question.name):
            raise CommandError(
                f"{rows.path}: the answer of id {question.id!r} is to {row['question']!r} about "
                f"{row.get('video', row.get('image'))}, but the question now is {question.text!r} about {question.name}"
            )
    pending = [question for question in questions if question.id not in rows.done]
    if len(pending) < len(questions):
        say(notes, f"{rows.path}: resuming after {len(questions) - len(pending)} of {len(questions)} answers")
    skipped, problem = Skipped(), None
    try:
        share = share_of(pending, rows.processes)
        if share:
            if rows.processes.first:
                say_choices(notes, command)
            with notes.status("loading the model"):
                chat = load(command)
            with progress_bar(notes, "answering") as progress:
                answer_all(
                    chat, share, rows, sampling_of(command), batch, command.max_new_tokens, progress,
                    command.workers, skipped,
                )  # fmt: skip
    except CommandError as error:  # raised after the other processes have finished, so that their answers are kept
        problem = str(error)
    for reasons in rows.processes.gather(skipped.reasons):
        for key, reason in reasons.items():
            skipped.add(key, reason)
    rows.merge()
    rows.processes.agree(problem)
    return skipped


def report(notes: Console, out: Path, asked: int, skipped: Skipped) -> int:
    """Print how many questions were answered and which were skipped. Raises CommandError if none was answered."""
    if skipped:
        say(notes, skipped.report(), "yellow")
    if len(skipped) == asked:
        raise CommandError(f"none of the {asked} questions could be answered")
    say(notes, f"{asked - len(skipped)} of {asked} questions answered: {out}")
    return 0


def about(command: BatchChatModel) -> dict[str, Any]:
    """Return the settings and weight stamps on which the answers of a command line depend."""
    sampling = asdict(sampling_of(command))
    sampling["no_branch"] = not sampling.pop("branch")
    return {"model": command.model, "branch": command.branch, "other_tower": not command.require_same_tower,
            "model_files": _weights(command.model), "branch_files": _weights(command.branch),
            "videos": os.path.abspath(command.videos), "dtype": chosen_dtype(command).name,
            "quantize": command.quantize, "max_new_tokens": command.max_new_tokens, **sampling}  # fmt: skip


def _weights(name: str | None) -> str | None:
    """Return a stamp of a local file or folder that changes with its weights; None for a hub name and mini."""
    path = Path(name or "")
    if name is None or not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stamps = [(f, f.stat()) for f in files if f.is_file() and (f == path or f.suffix in _WEIGHTS)]
    lines = [f"{f.relative_to(path)} {stat.st_size} {stat.st_mtime_ns}" for f, stat in stamps]
    found = digest(["\n".join(lines).encode()], 12, "sha256")
    newest = max((stat.st_mtime for _, stat in stamps), default=0.0)
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(newest))
    return f"{len(lines)} of {written} UTC, {found}"


def answer_all(
    chat: VideoChat,
    questions: Sequence[Question],
    rows: Rows,
    sampling: Sampling,
    batch: int = 8,
    max_new_tokens: int = 64,
    progress: Progress | None = None,
    workers: int = 2,
    skipped: Skipped | None = None,
) -> Skipped:
    """Write greedy answers, ``batch`` prompts at a time; each batch is on disk before the next begins.

    Consecutive questions about one file share its encoded tokens. ``workers`` threads decode videos while the model
    runs. A row holds id, video or image, question, prediction, and the extra fields. Returns ``skipped`` (None: a new
    one) with the questions that were skipped: broken or missing file, more frames than the model takes, prompt too
    long.

    Raises StorageError if the storage of a video cannot be reached.
    """
    skipped = Skipped() if skipped is None else skipped
    room = video_room(context(chat.model), 0, max_new_tokens)
    sampling = replace(sampling, side=chat.images.largest_side)
    with DecodedAhead(sampling.open, lambda chunk: chat.prepare(chunk)[0], workers) as ahead:
        files = _Files(chat, sampling, batch, room, ahead, questions)
        for start in range(0, len(questions), batch):
            asked, prompts = [], []
            for question in questions[start : start + batch]:
                name = f"{question.id} ({question.name})"
                try:
                    visual = files.get(question)
                except ValueError as error:
                    skipped.add(name, str(error))
                    continue
                try:
                    prompts.append(_prompt(chat, visual, question.text, max_new_tokens))
                    asked.append(question)
                except (PromptError, ContextError) as error:
                    skipped.add(name, str(error))
            if asked:
                texts = answer_batch(chat.model, chat.tokenizer, prompts, max_new_tokens)
                rows.append([
                    {"id": q.id, q.kind: q.name, "question": q.text, **q.extra, "prediction": text}
                    for q, text in zip(asked, texts, strict=True)
                ])  # fmt: skip
            if progress is not None:
                progress(min(start + batch, len(questions)), len(questions))
    return skipped


def _prompt(chat: VideoChat, visual: Visual, question: str, max_new_tokens: int) -> tuple[list[int], list[Visual]]:
    visual = visual.for_question(question)
    length = len(visual.tokens)
    ids = conversation_ids(chat.processor, [Turn(question, (visual.kind,))], [length])
    check_context(context(chat.model), len(ids), length, max_new_tokens)
    return ids, [visual]


class _Files:
    """A cache of the tokens of the latest files, and of the errors of unreadable files.

    chat, sampling, room: see `watch`. capacity: maximum number of cached files. ahead: decodes the videos.
    questions: in the order in which their files will be requested.
    """

    def __init__(
        self,
        chat: VideoChat,
        sampling: Sampling,
        capacity: int,
        room: int,
        ahead: DecodedAhead,
        questions: Sequence[Question],
    ) -> None:
        self.chat, self.sampling, self.capacity, self.room, self.ahead = chat, sampling, capacity, room, ahead
        self.order = [file for file, _ in groupby((question.kind, question.video) for question in questions)]
        self.place = 0  # index into the order
        self.encoded: dict[tuple[str, Path], Visual] = {}
        self.broken: dict[tuple[str, Path], str] = {}

    def get(self, question: Question) -> Visual:
        """Return the tokens of the question's file, and start decoding the next videos.

        Raises ValueError (VideoError) for every request of a file that cannot be read or has too many frames.
        """
        file = (question.kind, question.video)
        if self.order[self.place] != file:
            self.place += 1
        if file in self.broken:
            raise ValueError(self.broken[file])
        if file not in self.encoded:
            if len(self.encoded) >= self.capacity:
                del self.encoded[next(iter(self.encoded))]
            encode = self._encode_video if question.kind == "video" else self._encode_image
            try:
                self.encoded[file] = encode(question.video)
            except ValueError as error:  # VideoError, or more frames than the model takes
                self.broken[file] = str(error)
                raise
        return self.encoded[file]

    def _encode_video(self, path: Path) -> EncodedVisual:
        video = self.ahead.take(path)
        self._decode_next()
        try:
            return watch(self.chat, video, self.sampling, room=self.room)
        finally:
            video.close()

    def _encode_image(self, path: Path) -> EncodedVisual:
        self._decode_next()
        return encode_image(self.chat, path)

    def _decode_next(self) -> None:
        following = self.order[self.place + 1 : self.place + 1 + self.capacity + self.ahead.workers]
        known = self.encoded.keys() | self.broken.keys()
        self.ahead.start(path for kind, path in following if kind == "video" and (kind, path) not in known)
