"""Chat in the terminal: progress bars, streamed answers with their timings, and an interactive conversation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from bt_adapter.chat.conversation import ContextError, Conversation, Reply
from bt_adapter.chat.engine import VideoChat, peak_memory
from bt_adapter.chat.loading import LoadOptions
from bt_adapter.chat.prompts import PromptError
from bt_adapter.chat.quantize import QuantizeError
from bt_adapter.chat.sampled import settle_sampling
from bt_adapter.chat.settings import Chat, ChatModel
from bt_adapter.chat.tuned import load_by_name
from bt_adapter.chat.watch import EncodedVisual, Sampling, encode_image, watch
from bt_adapter.data import VideoError
from bt_adapter.data.patience import read_patiently
from bt_adapter.data.stream import FrameStream
from bt_adapter.errors import CommandError
from bt_adapter.model.dtypes import ChosenDtype, choose_dtype
from bt_adapter.progress import make_console, progress_bar, say

HELP = """\
Type a question and press Enter; <video> and <image> in it mark the positions of its files, in order.
/video FILE   add a video to the next question    /reset   discard questions and files
/image FILE   add a still to the next question    /quit    (or end of input) leave"""


def run_chat(command: Chat) -> int:
    """Run the chat command. Answers go to stdout, everything else to stderr. Returns the exit code."""
    notes = make_console(stderr=True)
    sampling = sampling_of(command)
    streams = [_open(sampling, path) for path in command.video]  # before the model is loaded, so that errors come early
    begin = time.perf_counter()
    say_choices(notes, command)
    with notes.status("loading the model"):
        chat = load(command)
    loaded = time.perf_counter() - begin
    session = Session(chat, chat.converse(command.compile), sampling, command.max_new_tokens, notes, loaded)
    session.show(streams, command.image)
    try:
        if command.question is not None:
            session.ask(command.question)
        else:
            session.converse()
    except (PromptError, ContextError) as error:
        raise CommandError(str(error)) from error
    return 0


class Session:
    """A conversation in the terminal.

    Args:
        chat, conversation: the model and its conversation. sampling: settings for videos.
        notes: console for everything but the answers. load: loading time in seconds, shown with the first answer.
    """

    def __init__(
        self,
        chat: VideoChat,
        conversation: Conversation,
        sampling: Sampling,
        max_new_tokens: int,
        notes: Console,
        load: float = 0.0,
    ) -> None:
        self.chat, self.conversation, self.sampling, self.notes = chat, conversation, sampling, notes
        self.max_new_tokens = max_new_tokens
        self._seconds = {"load": load} if load else {}
        self._encoded: list[EncodedVisual] = []  # since the last answer

    def show(self, videos: Sequence[FrameStream], images: Sequence[Path]) -> None:
        """Add videos, then stills, to the next question; the videos share the tokens that are left in the context.

        Raises VideoError; CommandError if the options do not fit a video, or the model does not accept a still.
        """
        stills = [self._encode_image(path) for path in images]
        reserved = sum(len(still.tokens) for still in stills)
        for i, stream in enumerate(videos):
            room = self.conversation.room(self.max_new_tokens) - reserved
            self._add(self._encode_video(stream, room // (len(videos) - i)))
        for still in stills:
            self._add(still)

    def _encode_video(self, stream: FrameStream, room: int) -> EncodedVisual:
        with progress_bar(self.notes, f"watching {Path(stream.path).name}") as progress:
            try:
                encoded = watch(self.chat, stream, self.sampling, progress, room)
            except VideoError:
                raise
            except MemoryError as error:
                raise VideoError(
                    f"{stream.path}: takes more memory than there is ({error}); use fewer frames"
                ) from error
            except ValueError as error:
                raise CommandError(str(error)) from error
        if encoded.truncated:
            note = f"damaged or cut short; continuing with the {encoded.total} frames that can be read"
            say(self.notes, f"{stream.path}: {note}", "yellow")
        return encoded

    def _encode_image(self, path: Path) -> EncodedVisual:
        try:
            return encode_image(self.chat, path)
        except VideoError:
            raise
        except ValueError as error:
            raise CommandError(str(error)) from error

    def ask(self, question: str) -> None:
        """Stream the answer to stdout, then print its timings. Raises PromptError, ContextError."""
        reply = self.conversation.ask(question, self.max_new_tokens, _show)
        _show("\n")
        self._seconds |= reply.seconds
        say(self.notes, summary(self._encoded, self._seconds, reply, peak_memory(self.chat.device)), "dim")
        self._seconds, self._encoded = {}, []

    def converse(self) -> None:
        """Read lines until end of input. An invalid line is reported, and the conversation continues."""
        commands: dict[str, Callable[[str], object]] = {
            "/video": lambda name: self.show([_open(self.sampling, Path(name))], ()),
            "/image": lambda name: self.show((), [Path(name)]),
            "/reset": lambda _: self._reset(),
            "/help": lambda _: say(self.notes, HELP),
        }
        interactive = sys.stdin.isatty()
        if interactive:
            say(self.notes, HELP, "dim")
        number = 0
        while True:
            if interactive:
                self.notes.print("> ", end="")
            raw = getattr(sys.stdin, "buffer", sys.stdin).readline()  # bytes: a bad line must not stop earlier ones
            number += 1
            if not raw:
                return
            try:
                line = raw if isinstance(raw, str) else _decoded(raw, number)
                word, _, rest = line.strip().partition(" ")
                if word == "/quit":
                    return
                if not word:
                    continue
                if not word.startswith("/"):
                    self.ask(line.strip())
                elif word in commands:
                    commands[word](rest.strip())
                else:
                    say(self.notes, f"unknown command {word}; /help lists all commands")
            except (VideoError, CommandError, PromptError, ContextError) as error:
                say(self.notes, str(error), "yellow")
            except KeyboardInterrupt:
                if not interactive:
                    raise
                say(self.notes, "interrupted", "yellow")

    def _add(self, encoded: EncodedVisual) -> None:
        self.conversation.add(encoded)
        self._encoded.append(encoded)
        for name, seconds in (("decode", encoded.decode), ("encode", encoded.encode)):
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _reset(self) -> None:
        self.conversation.reset()
        self._encoded = []


def _open(sampling: Sampling, path: Path) -> FrameStream:
    """Open a video. Raises VideoError for any error of the file, StorageError if it cannot be reached."""
    return read_patiently(path, sampling.open, path)


def _decoded(raw: bytes, number: int) -> str:
    """Decode a line of the input. Raises CommandError with its number if it is not in the input's encoding."""
    encoding = sys.stdin.encoding or "utf-8"
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise CommandError(
            f"line {number} of the input: not {encoding} ({error.reason} at byte {error.start})"
        ) from error


def sampling_of(command: ChatModel) -> Sampling:
    """Return the sampling settings of a command line."""
    values, _ = settle_sampling(command)
    return Sampling(fps=command.fps, **values)


def say_choices(notes: Console, command: ChatModel) -> None:
    """Print the dtype and the sampling of videos, with the reasons for values that were not given."""
    for line in (str(chosen_dtype(command)), *settle_sampling(command)[1]):
        say(notes, line, "dim")


def device_of(command: ChatModel) -> str:
    """Return the device of a command line. Raises CommandError if there is no such device."""
    device = command.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise CommandError(f"--device {device}: torch finds no usable GPU; use --device cpu")
    except RuntimeError as error:
        raise CommandError(f"--device {device}: not a device; use auto, cpu or cuda") from error
    return device


def chosen_dtype(command: ChatModel) -> ChosenDtype:
    """Return the dtype of a command line, or the default of its device. Raises CommandError, see `device_of`."""
    return choose_dtype(command.dtype, device_of(command))


def load(command: ChatModel) -> VideoChat:
    """Load the model of a command line. Raises CommandError if a part is missing or does not fit."""
    options = LoadOptions(
        device_of(command), chosen_dtype(command).dtype, command.quantize, command.require_same_tower,
        sampling_of(command).branch,
    )  # fmt: skip
    try:
        return VideoChat(*load_by_name(command.model, command.branch, options))
    except QuantizeError as error:
        raise CommandError(f"--{error}") from error
    except (ValueError, TypeError, ImportError) as error:
        branch = "" if command.branch is None else f" with --branch {command.branch}"
        raise CommandError(f"--model {command.model}{branch}: {error}") from error


def summary(visuals: list[EncodedVisual], seconds: dict[str, float], reply: Reply, memory: int) -> str:
    """Format timings: "8 of 132 frames · decode 0.21 s · … · 12 tokens, 25.1 tokens/s · peak memory 1.31 GB"."""
    parts = [
        f"{each.frames} of {each.total} frames" + (f" in {each.sets} sets" if each.sets > 1 else "")
        for each in visuals
        if each.kind == "video"
    ]
    parts += [f"{name} {value:.2f} s" for name, value in seconds.items()]
    parts.append(f"{reply.fed} of {reply.prompt} prompt tokens run")
    speed = f", {reply.tokens_per_second:.1f} tokens/s" if reply.tokens > 1 else ""
    return " · ".join([*parts, f"{reply.tokens} tokens{speed}", f"peak memory {memory / 1e9:.2f} GB"])


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
