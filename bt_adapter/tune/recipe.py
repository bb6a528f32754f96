"""What a tuning run is asked for. Defaults: the published recipe (arXiv 2309.15785, public configuration)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bt_adapter.errors import CommandError
from bt_adapter.limits import COUNT, POSITIVE, SHARE_BELOW_1
from bt_adapter.model_folders import check_model, needs_branch
from bt_adapter.pretrain.recipe import LIMITS, Settings

Part = Literal["projector", "branch", "lora"]
PARTS: tuple[Part, ...] = ("projector", "branch", "lora")


@dataclass(frozen=True)
class TuneRecipe(Settings):
    """Tune a chat model with a branch on questions and answers about videos.

    --config FILE takes fields from a YAML file; what the command line says goes before it. The same command again goes
    on where a run stopped. What was learned is then in OUT/tuned (bt-adapter chat --model OUT/tuned), and the whole
    model in OUT/model, which transformers loads by itself.
    """

    free = frozenset(
        {
            "epochs", "steps", "videos", "out", "features", "workers", "prefetch", "save_steps", "save_minutes",
            "keep_last", "tensorboard", "device", "accumulate", "packing", "gradient_checkpointing", "recompute",
            "tower_chunk", "head_chunk", "max_skipped", "other_tower", "save_model",
        }
    )  # fmt: skip
    limits = LIMITS | {
        "frames": POSITIVE, "rank": COUNT, "alpha": POSITIVE, "lora_dropout": SHARE_BELOW_1, "context": COUNT,
        "lr_projector": POSITIVE, "lr_branch": POSITIVE, "lr_lora": POSITIVE, "head_chunk": COUNT,
    }  # fmt: skip

    data: str = ""
    """VideoInstruct-like .json ("q", "a", "video_id"), LLaVA's conversations, or .jsonl of either."""
    out: Path = Path("tuning")
    """Folder of the run: checkpoints, log, and in the end tuned/ and model/."""
    videos: Path | None = None
    """Folder of videos and stills; default: that of --data."""

    model: str = "mini:image"
    """Chat model: hub name, local folder, tuned folder, or "mini" ("mini:image": before it saw a video)."""
    branch: str | None = None
    """Branch: a folder of save_pretrained or a published checkpoint; default: the one that comes with mini or with a
    tuned folder. A run that reads no video, or has --no-use-branch, needs none."""
    use_branch: bool = True
    """Encode videos by the branch. Without it they are the mean of their frames: the control of every claim that the
    branch helps, for which no branch need be named. The tuned model is then asked about videos in the same way."""
    other_tower: bool = False
    """Take a branch trained beside another CLIP than the model's, of the same shape but for the resolution."""
    learn: tuple[Part, ...] = ("projector", "branch")
    """What learns: any of projector, branch and lora (adapters of the language model's layers)."""
    rank: int = 16
    """Of the adapters."""
    alpha: float = 32.0
    """Of the adapters: what they add is scaled by alpha / rank."""
    lora_dropout: float = 0.05
    """Of the adapters."""
    lora_layers: str = "all-linear"
    """Layers that get adapters: "all-linear", or names with commas (q_proj,v_proj)."""

    frames: int = 100
    """T: frames of a video; a shorter one repeats some."""
    long: Literal["average", "interpolate", "published"] = "average"
    """Where T exceeds the time steps the branch was trained with: average neighbouring frames down to them, interpolate
    the trained rows of its time table, or train as many rows as the published procedure reads (100 frames: 50)."""
    batch: int = 32
    """Conversations of a step over all processes."""
    accumulate: int = 1
    """Parts a process cuts them into, one after the other; the loss is the same."""
    packing: bool = False
    """Put the conversations of a part into one row instead of padding them to one length; the loss is the same.
    On a CPU it is slower: attention there takes the row as one sequence and masks the other conversations."""
    epochs: float = 3.0
    """Passes over the conversations. A run can be made longer later: the same command with more of them goes on."""
    steps: int | None = None
    """Steps in all, instead of --epochs."""
    context: int | None = None
    """Longest conversation, in tokens; default: what the language model was made for."""
    skip_long: bool = False
    """Leave longer ones out instead of ending with an error."""
    seed: int = 0
    """Of order, fresh adapters and what drops out."""

    lr: float = 2e-5
    """Learning rate of the parts that have none of their own."""
    lr_projector: float | None = None
    """Of the projector."""
    lr_branch: float | None = None
    """Of the branch."""
    lr_lora: float | None = None
    """Of the adapters."""
    beta1: float = 0.9
    """AdamW's."""
    beta2: float = 0.999
    """AdamW's."""
    eps: float = 1e-8
    """AdamW's."""
    weight_decay: float = 0.0
    """AdamW's."""
    grad_norm: float = 1.0
    """Longest gradient; 0: any."""
    warmup: float = 0.03
    """Share of the steps with linear warm-up, cosine to 0 after it; 0: none."""

    features: Path | None = None
    """Folder of tower features: written once per video, then read instead of decoding. The size is told before."""
    feature_dtype: Literal["float16", "float8"] = "float16"
    """Of the stored features; float8 takes half the space."""

    device: str = "auto"
    """"cpu", "cuda"; "auto" takes GPUs where there are any."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of frozen weights and products; what learns and the losses are float32. auto: bfloat16 on a GPU, or
    float16 where it lacks that; on a CPU float32, unless a measurement shows bfloat16 to be faster."""
    quantize: Literal["nf4", "int8"] | None = None
    """The frozen language model in 4 or 8 bits, by bitsandbytes (QLoRA with --learn lora); not for mini."""
    gradient_checkpointing: bool = False
    """The language model's layers run again in backward instead of being kept."""
    recompute: Literal["none", "mlp", "layer"] = "mlp"
    """What the branch computes again in backward instead of keeping."""
    tower_chunk: int = 32
    """Frames that run through the tower at once."""
    head_chunk: int = 512
    """Answer tokens whose logits exist at once."""
    workers: int = 4
    """Decoding processes of each process; 0: decode in it."""
    prefetch: int = 2
    """Batches each of them is ahead."""
    max_skipped: float = 0.1
    """Share of unusable conversations that ends the run."""

    save_steps: int | None = None
    """Write a checkpoint every so many steps."""
    save_minutes: float = 10.0
    """And every so many minutes."""
    keep_last: int = 2
    """Checkpoints kept."""
    save_model: bool = True
    """Write the whole tuned model to OUT/model in the end, adapters merged, in the dtype of the model it was tuned
    from. It takes the model's size on the disk, and in memory while it is written."""
    tensorboard: bool = False
    """Write TensorBoard events to OUT/tensorboard."""

    def rate_of(self, part: str) -> float:
        """Learning rate of a part."""
        own = getattr(self, f"lr_{part}")
        return self.lr if own is None else own

    def check(self, world: int) -> None:
        """Raise CommandError for the first value that cannot be, with ``world`` processes."""
        self.check_values()
        check_model(self.model, self.quantize)
        if not self.data:
            raise CommandError("--data is missing: a .json or .jsonl of questions and answers about videos")
        if not self.learn or set(self.learn) - set(PARTS) or len(set(self.learn)) < len(self.learn):
            raise CommandError(f"--learn must name some of {', '.join(PARTS)}, each once, got {list(self.learn)}")
        if self.batch < world:
            raise CommandError(f"--batch must be at least one conversation a process, got {self.batch} for {world}")
        if not self.use_branch and "branch" in self.learn:
            raise CommandError("--no-use-branch: a branch that does not run cannot learn; leave it out of --learn")
        if not self.use_branch and self.features is not None:
            raise CommandError("--features holds what the branch reads: leave it out with --no-use-branch")
        if self.branch is None and "branch" in self.learn and needs_branch(self.model):
            raise CommandError(f"--model {self.model} needs --branch: a branch pretrained on its CLIP")
