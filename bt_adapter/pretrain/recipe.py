"""What a pretraining run is asked for. Defaults: the published recipe (arXiv 2309.15785, public configuration)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from bt_adapter.config import AlignLayer
from bt_adapter.errors import CommandError
from bt_adapter.limits import (
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
from bt_adapter.pretrain.frames import FrameRange

# of the numbers that both recipes have
LIMITS = {
    "batch": COUNT, "accumulate": COUNT, "epochs": POSITIVE, "steps": COUNT, "seed": SEED,
    "lr": POSITIVE, "beta1": SHARE_BELOW_1, "beta2": SHARE_BELOW_1, "eps": POSITIVE, "weight_decay": NATURAL,
    "grad_norm": NATURAL, "warmup": SHARE, "tower_chunk": COUNT, "workers": NATURAL, "prefetch": COUNT,
    "max_skipped": SHARE, "save_steps": COUNT, "save_minutes": "[0, inf]", "keep_last": COUNT,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What the options of a run can do, whichever run it is; subclasses are dataclasses."""

    free: ClassVar[frozenset[str]]
    """What may change between the two halves of a run that was stopped: its length, and what no loss depends on."""
    limits: ClassVar[dict[str, str]]
    """The interval in which each number must lie, as "(0, 1]"."""

    def differences(self, other: dict[str, Any]) -> list[str]:
        """In what a stored recipe is another run: "name here against there"."""
        mine, names = self.to_dict(), [name for name in self.to_dict() if name not in self.free]
        theirs = type(self)().to_dict() | other  # a recipe of before there was a field had its default
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
class Recipe(Settings):
    """Pretrain the branch beside a frozen CLIP on clips and captions.

    --config FILE takes fields from a YAML file; what the command line says goes before it. The same command again goes
    on where a run stopped.
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
        "drop_path": SHARE_BELOW_1, "ratio": SHARE_BELOW_1, "ema": SHARE_BELOW_1, "crop": "(0, 1]",
        "group": COUNT, "time_std": NATURAL, "lr_temporal": POSITIVE, "lr_gates": POSITIVE,
    }  # fmt: skip

    data: str = ""
    """WebVid-like .csv, .jsonl, a folder or pattern of .tar shards, or "synthetic" (no decoding; needs --steps)."""
    out: Path = Path("pretrained")
    """Folder of the run: checkpoints, log, and in the end branch/."""
    videos: Path | None = None
    """Folder of the video files, where --data names them relative to another one."""
    validation: str | None = None
    """Clips and captions as --data; the checkpoint with the best retrieval on them (mean R@1 both ways) is kept."""
    validation_videos: Path | None = None
    """As --videos, for --validation."""

    clip: str | None = None
    """The image model: a hub name or local folder of a CLIP or SigLIP, open_clip:MODEL/WEIGHTS (extra [open-clip]), or
    "mini" (the small one, extra [mini]); default: the one --init names."""
    init: str | None = None
    """Branch to start from: a folder of save_pretrained or a published checkpoint; default: a fresh one."""
    depth: int = 4
    """d: branch layers."""
    drop_path: float = 0.1
    """Stochastic depth of the last branch layer."""
    gates: bool = True
    """Gates between tower and branch; without them plain sums."""
    max_frames: int = 64
    """Rows of the branch's time table."""
    time_std: float = 0.02
    """Standard deviation of a fresh branch's time table. A small tower, whose tokens are of size 1, wants about 0.7.
    With --init the time table is that of the branch to start from, and another value is refused."""

    frames: int | str = 8
    """T: frames of a clip. A range as 8..16: each step draws T from it, so that 16 rows of the time table learn."""
    batch: int = 416
    """Clips of a step over all processes (published: 8 times 52)."""
    group: int = 1
    """Keep so many clips that are listed in a row in --data together in one batch, such as a clip and its hard
    negatives. --batch must be a multiple of it, times the processes, times --accumulate, and --data may list no
    unusable clip. The order shuffles groups; last clips that are too few for a group are left out."""
    accumulate: int = 1
    """Parts a process cuts its clips into, one after the other; the contrastive losses still see all of them."""
    epochs: float = 1.0
    """Passes over the clips. A run can be made longer later: the same command with more of them goes on."""
    steps: int | None = None
    """Steps in all, instead of --epochs."""
    mask: Literal["tube", "random"] = "tube"
    """What is hidden from the branch: whole patches over all frames, or any tokens."""
    ratio: float = 0.7
    """Share hidden."""
    seed: int = 0
    """Of order, frames, crops, masks and the fresh branch."""

    lr: float = 2e-6
    """Base learning rate: ten times it for the branch, a hundred times for temporal layers and gates."""
    lr_temporal: float | None = None
    """Learning rate of the temporal layers; default: a hundred times --lr."""
    lr_gates: float | None = None
    """Learning rate of the two gates; default: a hundred times --lr. Refused for a branch without gates."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.98
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.05
    """AdamW's."""
    grad_norm: float = 5.0
    """Longest gradient; 0: any."""
    warmup: float = 0.5
    """Share of the steps with linear warm-up, cosine to 0 after it (published: half of its one epoch); 0: none."""
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
    """Decay of an averaged branch kept beside (0.999); 0: none."""

    crop: tuple[float, float] = (0.08, 1.0)
    """Least and greatest share of a frame's area that the training crop takes."""
    workers: int = 4
    """Decoding processes of each process; 0: decode in it."""
    prefetch: int = 2
    """Batches each of them is ahead."""
    max_skipped: float = 0.1
    """Share of unusable clips that stops the run."""

    device: str = "auto"
    """"cpu", "cuda"; "auto" takes GPUs where there are any."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the products; weights of the branch and losses are float32. auto: bfloat16 on a GPU, or float16
    where it lacks that; on a CPU float32, unless a measurement shows bfloat16 to be faster."""
    sharding: Literal["ddp", "fsdp2"] = "ddp"
    """What many processes share: ddp gradients, fsdp2 also the branch's weights and optimizer."""
    recompute: Literal["none", "mlp", "layer"] = "mlp"
    """What backward computes again instead of keeping."""
    tower_chunk: int = 32
    """Images that run through the tower at once."""
    tower_compile: bool = False
    """Compile the tower's layers."""
    tower_graphs: bool = False
    """Run the tower as CUDA graphs."""
    tower_fp8: bool = False
    """Products of the tower in 8 bits."""

    save_steps: int | None = None
    """Write a checkpoint every so many steps."""
    save_minutes: float = 10.0
    """And every so many minutes."""
    keep_last: int = 2
    """Checkpoints kept, beside the best one."""
    tensorboard: bool = False
    """Write TensorBoard events to OUT/tensorboard."""

    @property
    def needs_head(self) -> bool:
        """Whether the branch needs an alignment head."""
        return self.mbta > 0 and self.align_layer == "last"

    @property
    def frame_range(self) -> FrameRange:
        """Of ``frames``. Raises CommandError where it is no number or range of numbers."""
        return FrameRange.of(self.frames)

    def frames_of(self, step: int) -> int:
        """T of a step, counted from 0."""
        return self.frame_range.draw(self.seed, step)

    def check(self, world: int) -> None:
        """Raise CommandError for the first value that cannot be, with ``world`` processes."""
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
        if self.batch % (world * self.accumulate * self.group):
            raise CommandError(
                f"--batch must be a multiple of processes times --accumulate times --group, got {self.batch} for "
                f"{world} times {self.accumulate} times {self.group}"
            )
        if self.batch == 1:
            raise CommandError("--batch must be at least 2: the other clips of a step are what a clip is told from")
        if self.align_layer == "chat" and self.depth < 2:
            raise CommandError("--align-layer chat needs --depth 2 or more: chat reads the branch's last layer but one")
        if most > self.max_frames:
            raise CommandError(f"--frames must be at most --max-frames {self.max_frames}, got {self.frames}")


SettingsT = TypeVar("SettingsT", bound=Settings)


def from_yaml(path: str | Path, default: SettingsT) -> SettingsT:
    """``default``, with what a YAML file of its fields says.

    Raises:
        CommandError: the file is missing, no YAML mapping, or holds a field that a recipe lacks, that is there twice or
            whose value is of another type.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CommandError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise CommandError(f"--config {path} must hold fields and values, but holds a {type(values).__name__}")
    kinds, given = types_of(default), {}
    for written, value in values.items():
        name = str(written).replace("-", "_")
        if name not in kinds:
            raise CommandError(f"--config {path}: unknown {written}; known: {', '.join(kinds)}")
        if name in given:
            raise CommandError(f"--config {path}: {name} is there twice")
        given[name] = converted(value, kinds[name])
        if not fits(given[name], kinds[name]):
            raise CommandError(f"--config {path}: {name} is {value!r}, expected {type_in_words(kinds[name])}")
    return replace(default, **given)
