"""The options of a pretraining run. Defaults: the published recipe (arXiv 2309.15785, public configuration)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from bt_adapter.errors import CommandError
from bt_adapter.model.config import AlignLayer
from bt_adapter.pretrain.frames import FrameRange
from bt_adapter.training.settings import (
    COUNT,
    NATURAL,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    check_numbers,
    check_types,
    converted,
    fits,
    option,
    type_in_words,
    types_of,
)

# intervals of the numbers that both recipes have
LIMITS = {
    "batch_size": COUNT, "accumulate": COUNT, "epochs": POSITIVE, "steps": COUNT, "seed": SEED,
    "lr": POSITIVE, "beta1": SHARE_BELOW_1, "beta2": SHARE_BELOW_1, "eps": POSITIVE, "weight_decay": NATURAL,
    "max_grad_norm": NATURAL, "warmup": SHARE, "tower_chunk": COUNT, "workers": NATURAL, "prefetch": COUNT,
    "max_skipped": SHARE, "save_steps": COUNT, "save_minutes": "[0, inf]", "keep_last": COUNT,
}  # fmt: skip
# names that options of both recipes had before, and those they have now
RENAMED = {"batch": "batch_size", "grad_norm": "max_grad_norm", "precision": "dtype"}


@dataclass(frozen=True)
class Settings:
    """Checks, comparison and storage of a run's options; subclasses are dataclasses."""

    free: ClassVar[frozenset[str]]
    """Fields that may differ when a stopped run is resumed: its length, and options that do not change the loss."""
    limits: ClassVar[dict[str, str]]
    """The interval in which each number must lie, as "(0, 1]"."""
    renamed: ClassVar[dict[str, str]]
    """Former name of a field -> its present name."""

    @classmethod
    def rename_stored(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """A stored recipe under the present names of its fields."""
        return {
            cls.renamed.get(name, name): not value if name == "other_tower" else value  # its meaning was the opposite
            for name, value in stored.items()
        }

    def differences(self, other: dict[str, Any]) -> list[str]:
        """The options by which a stored recipe is another run: "--name value here against value there"."""
        mine, names = self.to_dict(), [name for name in self.to_dict() if name not in self.free]
        theirs = type(self)().to_dict() | self.rename_stored(other)  # a field that was added later had its default
        return [f"{option(name)} {mine[name]} against {theirs[name]}" for name in names if mine[name] != theirs[name]]

    def check_values(self) -> None:
        """Raise CommandError for the first value of a wrong type, or number outside its interval."""
        check_types(self)
        if (warmup := getattr(self, "warmup", 0.0)) > 1:
            raise CommandError(f"--warmup must lie in {SHARE}, a share of all steps, got {warmup}")
        check_numbers(self, self.limits)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON and YAML."""
        return {
            name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class RunOptions:
    """Options of both trainings that say where and how a run is computed and stored."""

    device: str = "auto"
    """Device: "cpu" or "cuda"; default: auto, a GPU for each process where there are any."""
    tower_chunk: int = 32
    """Images that run through the tower at once."""
    recompute: Literal["none", "mlp", "layer"] = "mlp"
    """Activations of the branch that backward computes again instead of keeping."""
    workers: int = 4
    """Decoding processes of each process; 0: decode in the training process."""
    prefetch: int = 2
    """Batches that each decoding process prepares in advance."""
    save_steps: int | None = None
    """Steps between checkpoints; default: none, --save-minutes alone decides."""
    save_minutes: float = 10.0
    """Minutes between checkpoints, in addition to --save-steps."""
    keep_last: int = 2
    """Newest checkpoints that are kept; pretrain keeps the best one too."""
    tensorboard: bool = False
    """Write TensorBoard events to OUT/tensorboard."""


@dataclass(frozen=True)
class PretrainData:
    """Clips and captions."""

    help_group: ClassVar[str] = "data"

    data: str = ""
    """WebVid-like .csv, .jsonl, a folder or pattern of .tar shards, or "synthetic" (no decoding; needs --steps)."""
    videos: Path | None = None
    """Folder of the video files, where --data names them relative to another one."""
    validation: str | None = None
    """Clips and captions as --data; the checkpoint with the best retrieval on them (mean R@1 both ways) is kept."""
    validation_videos: Path | None = None
    """Folder of the video files of --validation, as --videos."""
    frames: int | str = 8
    """T: frames of a clip. A range as 8..16: each step draws T from it, so that 16 rows of the time table are
    trained."""
    crop: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of a frame's area that the training crop takes."""
    max_skipped: float = 0.1
    """Largest share of unusable clips; where there are more, the run ends with an error."""


@dataclass(frozen=True)
class PretrainModel:
    """Image model and branch."""

    help_group: ClassVar[str] = "model"

    clip: str | None = None
    """The image model: a hub name or local folder of a CLIP or SigLIP, open_clip:MODEL/WEIGHTS (extra [open-clip]), or
    "mini" (the small one, extra [mini]); default: the one --init names."""
    init: str | None = None
    """Branch to start from: a folder of save_pretrained or a published checkpoint; default: a fresh one."""
    depth: int = 4
    """Number of branch layers, d."""
    drop_path: float = 0.1
    """Stochastic depth: drop rate of the last branch layer."""
    gates: bool = True
    """Gates between tower and branch; without them plain sums."""
    max_frames: int = 64
    """Rows of the branch's time table."""
    time_std: float = 0.02
    """Standard deviation of a fresh branch's time table. A small tower, whose tokens are of size 1, wants about 0.7.
    With --init the time table is that of the branch to start from, and another value is refused."""


@dataclass(frozen=True)
class PretrainOptimisation:
    """Batches, losses, optimizer and schedule."""

    help_group: ClassVar[str] = "optimisation"

    batch_size: int = 416
    """Global batch size: clips of a step over all processes together (published: 8 times 52)."""
    group: int = 1
    """Clips listed in a row in --data that stay together in one batch, such as a clip and its hard negatives.
    --batch-size must be a multiple of it, times the processes, times --accumulate, and --data may list no unusable
    clip. The order shuffles groups; clips at the end that are too few for a group are left out."""
    accumulate: int = 1
    """Parts into which a process cuts its clips, computed one after the other; the contrastive losses still compare
    all of them."""
    epochs: float = 1.0
    """Passes over the clips. A run can be made longer later: the same command with a larger value resumes it."""
    steps: int | None = None
    """Steps in all, instead of --epochs."""
    mask: Literal["tube", "random"] = "tube"
    """Which tokens are hidden from the branch: whole patches over all frames, or any tokens."""
    mask_ratio: float = 0.7
    """Share of the patch tokens that is hidden from the branch."""
    seed: int = 0
    """Seed of order, frames, crops, masks and the fresh branch."""

    lr: float = 2e-6
    """Base learning rate: ten times it for the branch, a hundred times for temporal layers and gates."""
    lr_temporal: float | None = None
    """Learning rate of the temporal layers; default: a hundred times --lr."""
    lr_gates: float | None = None
    """Learning rate of the two gates; default: a hundred times --lr. Refused for a branch without gates."""
    beta1: float = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: float = 0.98
    """AdamW: decay of the mean of the squared gradients."""
    eps: float = 1e-8
    """AdamW: number added to the denominator."""
    weight_decay: float = 0.05
    """AdamW: weight decay."""
    max_grad_norm: float = 5.0
    """Gradient norm above which gradients are scaled down to it; 0: no clipping."""
    warmup: float = 0.5
    """Share of all steps, 0 to 1, with linear warm-up, followed by a cosine to 0 (published: half of its one epoch);
    0: no warm-up."""
    temperature: float | Literal["clip"] = 0.01
    """Temperature of the contrastive losses, by which cosine similarities are divided. "clip": the one that --clip
    learned in its own training, 1/exp(logit_scale). Large CLIPs have about 0.01, small ones more."""
    mbca: float = 0.1
    """Weight of masked branch cross-modal alignment."""
    mbta: float = 0.1
    """Weight of masked branch token alignment; 0: no alignment head."""
    align_layer: AlignLayer = "last"
    """Layer at which the branch is aligned with the text (--mbca) and the tower (--mbta). "last": behind the last
    layers, as published. "chat": on the tokens that a chat model reads, of the last layer but one, without an alignment
    head. Weights of 1 are then a good start, and a chat model reads the branch better without any tuning."""
    ema: float = 0.0
    """Decay of the exponential moving average of the branch, for instance 0.999, written to OUT/ema; 0: none."""


@dataclass(frozen=True)
class PretrainRun(RunOptions):
    """Output, device and checkpoints."""

    help_group: ClassVar[str] = "run"

    out: Path = Path("pretrained")
    """Folder of the run: checkpoints, log, and at the end branch/."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of matrix products; weights of the branch and losses are float32. auto: bfloat16 on a GPU, or float16
    where the GPU lacks it; on a CPU float32, unless a measurement shows bfloat16 to be faster."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """Work shared by many processes: ddp shares gradients, fsdp2 also the branch's weights and optimizer state."""
    tower_compile: bool = False
    """Compile the tower's layers."""
    tower_graphs: bool = False
    """Run the tower as CUDA graphs."""
    tower_fp8: bool = False
    """Compute the tower's products in 8 bits."""
    tower_attention: Literal["sdpa", "flash-attn", "xformers"] = "sdpa"
    """Library of the tower's attention; sdpa is torch's, the others need a GPU."""
    products: Literal["torch", "bt_kernels"] = "torch"
    """Library of the products in tower and branch that can activate, or add onto the residual stream, before they
    write: bt_kernels moves less memory on a GPU. Whether it is faster has not been measured."""


@dataclass(frozen=True)
class Recipe(PretrainRun, PretrainOptimisation, PretrainModel, PretrainData, Settings):
    """Pretrain the branch beside a frozen CLIP on clips and captions.

    --config FILE reads options from a YAML file; options on the command line override them. The same command again
    resumes a run that stopped.
    """

    free = frozenset(
        {
            "epochs", "steps", "workers", "prefetch", "save_steps", "save_minutes", "keep_last", "tensorboard",
            "device", "sharding", "recompute", "tower_chunk", "tower_compile", "tower_graphs", "max_skipped", "out",
            "videos",
        }
    )  # fmt: skip
    limits = LIMITS | {
        "depth": COUNT, "max_frames": COUNT, "temperature": POSITIVE, "mbca": NATURAL, "mbta": NATURAL,
        "drop_path": SHARE_BELOW_1, "mask_ratio": SHARE_BELOW_1, "ema": SHARE_BELOW_1, "crop": "(0, 1]",
        "group": COUNT, "time_std": NATURAL, "lr_temporal": POSITIVE, "lr_gates": POSITIVE,
    }  # fmt: skip
    renamed = RENAMED | {"ratio": "mask_ratio"}

    @property
    def needs_head(self) -> bool:
        """Whether the branch needs an alignment head."""
        return self.mbta > 0 and self.align_layer == "last"

    @property
    def frame_range(self) -> FrameRange:
        """``frames`` as a range. Raises CommandError where it is no number or range of numbers."""
        return FrameRange.of(self.frames)

    def frames_of(self, step: int) -> int:
        """T of a step, counted from 0."""
        return self.frame_range.draw(self.seed, step)

    def check(self, world: int) -> None:
        """Raise CommandError for the first invalid value, given ``world`` processes."""
        self.check_values()
        most = self.frame_range.most
        if self.crop[0] > self.crop[1]:
            raise CommandError(f"--crop must be least and greatest share, got {self.crop[0]} and {self.crop[1]}")
        if not self.data:
            raise CommandError("--data is missing: a .csv, .jsonl, .tar shards, or synthetic")
        if self.data == "synthetic" and self.steps is None:
            raise CommandError("--data synthetic needs --steps: it has no end of its own")
        if self.data == "synthetic" and self.group > 1:
            raise CommandError(f"--group {self.group} needs listed clips: those of --data synthetic belong to no group")
        if self.batch_size % (world * self.accumulate * self.group):
            raise CommandError(
                f"--batch-size must be a multiple of processes times --accumulate times --group, got {self.batch_size} "
                f"for {world} times {self.accumulate} times {self.group}"
            )
        if self.batch_size == 1:
            raise CommandError("--batch-size must be at least 2: the losses compare a clip with the others of its step")
        if self.align_layer == "chat" and self.depth < 2:
            raise CommandError("--align-layer chat needs --depth 2 or more: chat reads the branch's last layer but one")
        if most > self.max_frames:
            raise CommandError(f"--frames must be at most --max-frames {self.max_frames}, got {self.frames}")


SettingsT = TypeVar("SettingsT", bound=Settings)


def from_yaml(path: str | Path, default: SettingsT) -> SettingsT:
    """``default``, with the fields that a YAML file gives.

    Former names are accepted in a recipe.yaml that a run wrote, which holds all fields.

    Raises:
        CommandError: the file is missing, no YAML mapping, or holds a field that a recipe lacks, that is there twice,
            that has another name now, or whose value is of another type.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise CommandError(f"--config {path} must hold fields and values, but holds a {type(values).__name__}")
    renamed = default.renamed
    if renamed.keys() - values.keys() <= {"other_tower"}:  # the youngest of them, which early runs did not write
        values = default.rename_stored(values)
    kinds, given = types_of(default), {}
    for written, value in values.items():
        name = str(written).replace("-", "_")
        if name in renamed:
            opposite = ", with the opposite value" if name == "other_tower" else ""
            raise CommandError(f"--config {path}: {written} is called {renamed[name]} now{opposite}")
        if name not in kinds:
            raise CommandError(f"--config {path}: unknown {written}; known: {', '.join(kinds)}")
        if name in given:
            raise CommandError(f"--config {path}: {name} is there twice")
        given[name] = converted(value, kinds[name])
        if not fits(given[name], kinds[name]):
            raise CommandError(f"--config {path}: {name} is {value!r}, expected {type_in_words(kinds[name])}")
    return replace(default, **given)
