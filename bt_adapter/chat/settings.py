"""Options of the commands ``chat`` and ``answer``, and of every command that asks a chat model.

Each command's class inherits its groups of options, which ``--help`` shows in the reverse order of the bases. The
commands import this file before the arguments are read, so it needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import Positional, UseAppendAction, arg

from bt_adapter.chat.model_folders import check_model, needs_branch
from bt_adapter.errors import CommandError
from bt_adapter.training.settings import COUNT, POSITIVE, check_numbers


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The chat model and its branch."""

    help_group: ClassVar[str] = "model"

    model: str = "mini"
    """Chat model: "mini" (the small one, extra [mini]; "mini:image": before it saw a video), a folder, a hub name,
    or a folder of a tuning run. An image chat model needs --branch; a video chat model, as save_pretrained writes it,
    has its own."""
    branch: str | None = None
    """Branch to attach: a folder of save_pretrained, its hub name, or a published checkpoint. It replaces the branch
    that mini, a tuned model or a video chat model has."""
    require_same_tower: bool = True
    """Refuse a branch trained beside another CLIP than the model's. Without it, one of the same shape but for the
    resolution is accepted with a warning."""
    no_branch: Annotated[bool, arg(name="no-branch")] = False
    """Switch the branch off: the language model gets the mean of the frames. An image chat model then needs no
    --branch. Default: as the model was tuned."""
    quantize: Literal["nf4", "int8"] | None = None
    """Bits of the language model: nf4 (4) or int8 (8), by bitsandbytes or torchao; not for mini. Default: not
    quantized."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Frames of a video."""

    help_group: ClassVar[str] = "frames"

    frames: int | None = None
    """Frames to take, evenly spread; default: as the model was tuned or its branch pretrained, else 8."""
    fps: float | None = None
    """Frames to take per second of the video, instead of --frames; videos of any length."""
    repeat: bool = False
    """Repeat frames where the video has fewer than --frames; default: as the model was tuned."""
    no_repeat: Annotated[bool, arg(name="no-repeat")] = False
    """Repeat no frames, though the model was tuned with repeated ones."""
    windows: int | None = None
    """Windows into which the video is cut, each of which becomes one set of tokens; default: one for each 128 frames
    (twice the rows of the branch's time table, however many of them are trained), and no more sets than fit into the
    model's context beside the answer, shared by the videos given together: the sets of neighbouring windows are
    averaged beyond that."""
    long: Literal["average", "interpolate", "published"] | None = None
    """In windows of more frames than the branch was trained with: average neighbouring frames down to its time steps,
    interpolate the trained rows of its time table, or read all its rows as stored, trained or not (as published).
    Default: average."""


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Length of an answer, and the device it is computed on."""

    help_group: ClassVar[str] = "run"

    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    device: str = "auto"
    """Device: "cpu", "cuda" or "cuda:1"; auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the model; auto: bfloat16 on a GPU, or float16 where the GPU lacks it; on a CPU float32, unless a
    measurement shows bfloat16 to be faster."""


@dataclass(frozen=True, kw_only=True)
class ChatModel(AnswerOptions, VideoOptions, ModelOptions):
    """Base of the commands that ask a chat model."""

    renamed: ClassVar[dict[str, str]] = {"other_tower": "require_same_tower"}

    def check(self) -> None:
        """Raise CommandError for what is wrong with the options alone, before anything is loaded."""
        check_numbers(self, {"frames": COUNT, "windows": COUNT, "max_new_tokens": COUNT, "fps": POSITIVE})
        check_model(self.model, self.quantize)
        if self.branch is None and not self.no_branch and needs_branch(self.model):
            raise CommandError(
                f"--model {self.model} needs --branch: a branch pretrained on its CLIP (or --no-branch: the mean of "
                "the frames)"
            )


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches of questions."""

    help_group: ClassVar[str] = "batches"

    batch_size: int = 8
    """Questions answered at once, per process."""
    workers: int = 2
    """Videos decoded at a time, each by a thread, while the model answers questions about earlier ones."""


@dataclass(frozen=True, kw_only=True)
class BatchChatModel(BatchOptions, ChatModel):
    """Base of the commands that answer a list of questions about the files of a folder."""

    renamed = ChatModel.renamed | {"batch": "batch_size"}

    videos: Path
    """Folder of the videos and stills; the help stands in each command's own group."""

    def check(self) -> None:
        """Raise CommandError for what is wrong with the options alone."""
        super().check()
        check_numbers(self, {"batch_size": COUNT, "workers": COUNT})


@dataclass(frozen=True, kw_only=True)
class ChatQuestion:
    """Question and files."""

    help_group: ClassVar[str] = "data"

    question: Positional[str | None] = None
    """The question. <video> and <image> in it stand for the files in order; without them all files come first."""
    video: UseAppendAction[Annotated[tuple[Path, ...], arg(metavar="FILE")]] = ()
    """Video file, in any format that FFmpeg decodes; may be given several times."""
    image: UseAppendAction[Annotated[tuple[Path, ...], arg(metavar="FILE")]] = ()
    """Still image (JPEG, PNG, WebP, GIF, BMP, TIFF, JPEG 2000, AVIF, PPM); may be given several times. Stills come
    after the videos."""


@dataclass(frozen=True, kw_only=True)
class ChatDecoding:
    """Speed of decoding."""

    help_group: ClassVar[str] = "decoding"

    compile: bool = False
    """Use a KV cache of a fixed size and, on a GPU, compiled decoding: faster after a first answer of minutes."""


@dataclass(frozen=True, kw_only=True)
class Chat(ChatDecoding, ChatModel, ChatQuestion):
    """Ask questions about video files and stills; answers are streamed, followed by their time and memory.

    With a question: one answer. Without: a conversation, one question per line, until the input ends; /help tells more.
    """

    def check(self) -> None:
        """Raise CommandError for invalid options, no question or no file, and files that are missing."""
        super().check()
        if self.question is not None and not self.question.strip():
            raise CommandError("the question is empty")
        if self.question is not None and not (self.video or self.image):
            raise CommandError("there is nothing to ask about: give --video FILE or --image FILE")
        for name in ("video", "image"):
            for path in getattr(self, name):
                if not path.is_file():
                    found = "is a folder" if path.is_dir() else "there is no such file"
                    raise CommandError(f"--{name} {path}: {found}")


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
class Answer(BatchChatModel, AnswerData):
    """Answer a list of questions about videos and stills, in batches; a killed run resumes when it is started again.

    Under torchrun each process answers its share, and all answers are in one file at the end.

    Questions: one JSON object per line, {"video": …, "question": …}, optionally "id" and "answer" (copied);
    {"image": …} instead of the video asks about a still, as the image chat model takes it. Files that cannot be read,
    and prompts that do not fit into the model's context, are skipped, counted and named at the end.
    """

    def check(self) -> None:
        """Raise CommandError for invalid options and missing files."""
        super().check()
        if not self.questions.is_file():
            raise CommandError(f"FILE of questions {self.questions}: there is no such file")
        if not self.videos.exists():
            raise CommandError(f"--videos {self.videos}: there is no such file or folder")
