"""Options of ``eval retrieval`` and ``eval recognition``. Commands import it, so it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from tyro.conf import arg

from bt_adapter.errors import CommandError
from bt_adapter.training.settings import COUNT, NATURAL, POSITIVE, check_numbers


@dataclass(frozen=True, kw_only=True)
class EvaluationData:
    """Annotations, videos and results."""

    data: Path
    """The data set's annotations: a file or folder, see --layout."""
    videos: Path | None = None
    """Folder of the video files; default: the folder of --data."""
    split: str | None = None
    """Split of the data set, where its layout has splits."""
    cache: Path = Path("features")
    """Folder of stored features: nothing is computed twice, and a killed run resumes."""
    no_cache: Annotated[bool, arg(name="no-cache")] = False
    """Neither read nor store features."""
    overwrite: bool = False
    """Overwrite a result of other settings, which is refused otherwise."""


@dataclass(frozen=True, kw_only=True)
class EvaluationModel:
    """Image model and branch."""

    help_group: ClassVar[str] = "model"

    clip: str | None = None
    """The image model: a hub name or local folder of a CLIP or SigLIP, open_clip:MODEL/WEIGHTS (extra [open-clip]), or
    "mini" (the small one, extra [mini]); default: the one --branch names."""
    branch: str | None = None
    """A folder of save_pretrained, or a published checkpoint; mini has its own."""
    no_branch: Annotated[bool, arg(name="no-branch")] = False
    """Evaluate the baseline: the frozen CLIP's embeddings, averaged over the frames."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFrames:
    """Frames of a video."""

    help_group: ClassVar[str] = "frames"

    frames: int | None = None
    """Frames of a view; default: 12 for MSR-VTT, 64 for DiDeMo, LSMDC, ActivityNet, 16 for recognition, else 8."""
    long: Literal["average", "interpolate", "published"] = "average"
    """With more frames than the branch was trained with: average neighbouring frames down to its time steps,
    interpolate the trained rows of its time table, or read all its rows as stored, trained or not (as published)."""
    sampling: Literal["middle", "reference"] = "middle"
    """Which frames: the middle of equal parts, or those of the published scores (within two frames of it)."""
    views: int = 1
    """Views of a clip: sets of --frames frames, each spread over the clip, whose scores are averaged."""


@dataclass(frozen=True, kw_only=True)
class EvaluationRun:
    """Device and batches."""

    help_group: ClassVar[str] = "run"

    batch_size: int = 16
    """Clips that run through the model at once, per process."""
    workers: int = 4
    """Decoding processes of each process; 0: decode in the evaluating process."""
    device: str = "auto"
    """Device: "cpu", "cuda" or "cuda:1"; auto: a GPU for each process where there are any."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the products of tower and branch; auto: bfloat16 on a GPU, or float16 where the GPU lacks it; on a
    CPU float32, unless a measurement shows bfloat16 to be faster."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(EvaluationRun, EvaluationFrames, EvaluationModel, EvaluationData):
    """Base of the zero-shot evaluations."""

    renamed: ClassVar[dict[str, str]] = {"batch": "batch_size", "precision": "dtype"}

    def check(self) -> None:
        """Raise CommandError for invalid options and missing files."""
        check_numbers(self, {"frames": COUNT, "views": COUNT, "batch_size": COUNT, "workers": NATURAL})
        if not self.data.exists() and not any(mark in str(self.data) for mark in "*?["):
            raise CommandError(f"--data {self.data}: there is no such file or folder")
        if self.videos is not None and not self.videos.is_dir():
            raise CommandError(f"--videos {self.videos}: there is no such folder")


@dataclass(frozen=True, kw_only=True)
class RetrievalData(EvaluationData):
    """Annotations, videos and results."""

    help_group: ClassVar[str] = "data"

    layout: Literal["clips", "msrvtt", "didemo", "lsmdc", "activitynet"] = "clips"
    """Format of --data; clips: .csv, .jsonl or .tar shards of clips and captions."""
    out: Path = Path("retrieval.json")
    """File of the result."""
    scores: Annotated[Path | None, arg(metavar="FILE")] = None
    """Also write the similarity of each caption to each clip, with the captions, the clips' keys and which clip is
    right: FILE.safetensors or FILE.npz. With it two systems can be compared query by query."""
    dual_softmax: bool = False
    """Also report figures with scores that all queries of the set compete for (not comparable with others)."""
    temperature: float = 0.01
    """Temperature of the dual softmax."""


@dataclass(frozen=True, kw_only=True)
class RecognitionData(EvaluationData):
    """Annotations, videos and results."""

    help_group: ClassVar[str] = "data"

    layout: Literal["hmdb51", "ucf101", "kinetics400"]
    """Format of --data."""
    out: Path = Path("recognition.json")
    """File of the result."""
    templates: Path | None = None
    """Text file of prompts, one per line, {} where the name goes: their embeddings are averaged; default: the name."""


@dataclass(frozen=True, kw_only=True)
class Retrieval(EvaluationOptions, RetrievalData):
    """Find the video of a caption, and the caption of a video: R@1, R@5, R@10, median and mean rank.

    Under torchrun each process computes a part of the features.
    """

    def check(self) -> None:
        """Raise CommandError for invalid options and missing files."""
        check_numbers(self, {"temperature": POSITIVE})
        if self.scores is not None and self.scores.suffix not in (".safetensors", ".npz"):
            raise CommandError(f"--scores {self.scores}: must be named FILE.safetensors or FILE.npz")
        super().check()


@dataclass(frozen=True, kw_only=True)
class Recognition(EvaluationOptions, RecognitionData):
    """Find the class of a video by the classes' names: top-1, top-5, mean accuracy of classes.

    Under torchrun each process computes a part of the features.
    """


Evaluation = Retrieval | Recognition
