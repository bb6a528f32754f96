"""The options of a tuning run. Defaults: the published recipe (arXiv 2309.15785, public configuration)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from bt_adapter.chat.model_folders import check_model, needs_branch
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import LIMITS, RENAMED, RunOptions, Settings
from bt_adapter.training.settings import COUNT, POSITIVE, SHARE_BELOW_1

Part = Literal["projector", "branch", "lora"]
PARTS: tuple[Part, ...] = ("projector", "branch", "lora")


@dataclass(frozen=True)
class TuneData:
    """Conversations, videos and stills."""

    help_group: ClassVar[str] = "data"

    data: str = ""
    """VideoInstruct-like .json ("q", "a", "video_id"), LLaVA's conversations, or .jsonl of either."""
    videos: Path | None = None
    """Folder of videos and stills; default: the folder of --data."""
    frames: int = 100
    """T: frames taken of a video; of a shorter one some are repeated."""
    max_length: int | None = None
    """Longest conversation, in tokens; default: the context length of the language model."""
    skip_long: bool = False
    """Skip longer conversations instead of ending with an error."""
    packing: bool = False
    """Put the conversations of a part into one row instead of padding them to one length; the loss is the same.
    On a CPU it is slower: attention there takes the row as one sequence and masks the other conversations."""
    features: Path | None = None
    """Folder of tower features: written once per video, then read instead of decoding. The size is announced before
    anything is written."""
    feature_dtype: Literal["float16", "float8"] = "float16"
    """Data type of the stored features; float8 takes half the space."""
    max_skipped: float = 0.1
    """Largest share of unusable conversations; where there are more, the run ends with an error."""


@dataclass(frozen=True)
class TuneModel:
    """Chat model, branch and trainable parts."""

    help_group: ClassVar[str] = "model"

    model: str = "mini:image"
    """Chat model: hub name, local folder, tuned folder, or "mini" ("mini:image": before it saw a video)."""
    branch: str | None = None
    """Branch: a folder of save_pretrained or a published checkpoint; default: the one that comes with mini or with a
    tuned folder. A run that reads no video, or has --no-use-branch, needs none."""
    use_branch: bool = True
    """Encode videos by the branch. Without it they are the mean of their frames: the control of every claim that the
    branch helps, for which no branch need be named. The tuned model is then asked about videos in the same way."""
    require_same_tower: bool = True
    """Refuse a branch trained beside another CLIP than the model's. Without it, one of the same shape but for the
    resolution is accepted with a warning."""
    long: Literal["average", "interpolate", "published"] = "average"
    """Videos whose T exceeds the time steps the branch was trained with: average neighbouring frames down to them,
    interpolate the trained rows of its time table, or train as many rows as the published procedure reads (100 frames:
    50)."""
    learn: tuple[Part, ...] = ("projector", "branch")
    """Trainable parts: any of projector, branch and lora (adapters of the language model's layers)."""
    lora_r: int = 16
    """Rank of the LoRA adapters."""
    lora_alpha: float = 32.0
    """LoRA alpha: the output of the adapters is scaled by alpha / r."""
    lora_dropout: float = 0.05
    """Dropout rate of the LoRA adapters."""
    target_modules: str = "all-linear"
    """Layers that get LoRA adapters: "all-linear", or names separated by commas (q_proj,v_proj)."""
    quantize: Literal["nf4", "int8"] | None = None
    """Bits of the frozen language model: nf4 (4) or int8 (8), by bitsandbytes (QLoRA with --learn lora); not for mini.
    Default: not quantized."""


@dataclass(frozen=True)
class TuneOptimisation:
    """Batches, optimizer and schedule."""

    help_group: ClassVar[str] = "optimisation"

    batch_size: int = 32
    """Global batch size: conversations of a step over all processes together."""
    accumulate: int = 1
    """Parts into which a process cuts its conversations, computed one after the other; the loss is the same."""
    epochs: float = 3.0
    """Passes over the conversations. A run can be made longer later: the same command with a larger value resumes
    it."""
    steps: int | None = None
    """Steps in all, instead of --epochs."""
    seed: int = 0
    """Seed of order, fresh adapters and dropout."""

    lr: float = 2e-5
    """Learning rate of the parts that have no own one."""
    lr_projector: float | None = None
    """Learning rate of the projector; default: --lr."""
    lr_branch: float | None = None
    """Learning rate of the branch; default: --lr."""
    lr_lora: float | None = None
    """Learning rate of the LoRA adapters; default: --lr."""
    beta1: float = 0.9
    """AdamW: decay of the mean of the gradients."""
    beta2: float = 0.999
    """AdamW: decay of the mean of the squared gradients."""
    eps: float = 1e-8
    """AdamW: number added to the denominator."""
    weight_decay: float = 0.0
    """AdamW: weight decay."""
    max_grad_norm: float = 1.0
    """Gradient norm above which gradients are scaled down to it; 0: no clipping."""
    warmup: float = 0.03
    """Share of all steps, 0 to 1, with linear warm-up, followed by a cosine to 0; 0: no warm-up."""


@dataclass(frozen=True)
class TuneRun(RunOptions):
    """Output, device and checkpoints."""

    help_group: ClassVar[str] = "run"

    out: Path = Path("tuning")
    """Folder of the run: checkpoints, log, and at the end tuned/ and model/."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of frozen weights and matrix products; trainable parameters and losses are float32. auto: bfloat16 on a
    GPU, or float16 where the GPU lacks it; on a CPU float32, unless a measurement shows bfloat16 to be faster."""
    gradient_checkpointing: bool = False
    """Compute the language model's activations again in backward instead of keeping them."""
    head_chunk: int = 512
    """Answer tokens whose logits are in memory at once."""
    save_model: bool = True
    """Write the whole tuned model to OUT/model at the end, adapters merged, in the dtype of the model it was tuned
    from. It takes the model's size on the disk, and in memory while it is written."""


@dataclass(frozen=True)
class TuneRecipe(TuneRun, TuneOptimisation, TuneModel, TuneData, Settings):
    """Tune a chat model with a branch on questions and answers about videos.

    --config FILE reads options from a YAML file; options on the command line override them. The same command again
    resumes a run that stopped. The trained parts are written to OUT/tuned (bt-adapter chat --model OUT/tuned), and the
    whole model to OUT/model, which transformers loads by itself.
    """

    free = frozenset(
        {
            "epochs", "steps", "videos", "out", "features", "workers", "prefetch", "save_steps", "save_minutes",
            "keep_last", "tensorboard", "device", "accumulate", "packing", "gradient_checkpointing", "recompute",
            "tower_chunk", "head_chunk", "max_skipped", "require_same_tower", "save_model",
        }
    )  # fmt: skip
    limits = LIMITS | {
        "frames": POSITIVE, "lora_r": COUNT, "lora_alpha": POSITIVE, "lora_dropout": SHARE_BELOW_1, "max_length": COUNT,
        "lr_projector": POSITIVE, "lr_branch": POSITIVE, "lr_lora": POSITIVE, "head_chunk": COUNT,
    }  # fmt: skip
    renamed = RENAMED | {
        "rank": "lora_r", "alpha": "lora_alpha", "lora_layers": "target_modules", "context": "max_length",
        "other_tower": "require_same_tower",
    }  # fmt: skip

    def rate_of(self, part: str) -> float:
        """Learning rate of a part."""
        rate = getattr(self, f"lr_{part}")
        return self.lr if rate is None else rate

    def check(self, world: int) -> None:
        """Raise CommandError for the first invalid value, given ``world`` processes."""
        self.check_values()
        check_model(self.model, self.quantize)
        if not self.data:
            raise CommandError("--data is missing: a .json or .jsonl of questions and answers about videos")
        if not self.learn or set(self.learn) - set(PARTS) or len(set(self.learn)) < len(self.learn):
            raise CommandError(f"--learn must name some of {', '.join(PARTS)}, each once, got {list(self.learn)}")
        if self.batch_size < world:
            raise CommandError(
                f"--batch-size must be at least one conversation per process, got {self.batch_size} for {world}"
            )
        if not self.use_branch and "branch" in self.learn:
            raise CommandError("--no-use-branch: a branch that does not run cannot learn; leave it out of --learn")
        if not self.use_branch and self.features is not None:
            raise CommandError("--features holds what the branch reads: leave it out with --no-use-branch")
        if self.branch is None and "branch" in self.learn and needs_branch(self.model):
            raise CommandError(f"--model {self.model} needs --branch: a branch pretrained on its CLIP")
