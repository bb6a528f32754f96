"""The pretraining loop, in one process or under torchrun on many machines."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bt_adapter.data import TrainTransform
from bt_adapter.data.clips import Clip, Member, digest
from bt_adapter.data.devices import tensor_on
from bt_adapter.data.loading import Damaged, SyntheticClips, TrainingClips, batches
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.shards import clips_lost
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import check_fingerprint, image_settings_of, name_of_tower
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.published import load_reference_checkpoint
from bt_adapter.model.published_files import read_tensors
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.pretrain.saving import load_average, save_trained
from bt_adapter.pretrain.step import Pretraining, backward, draw_depth, draw_visible
from bt_adapter.towers.hugging_face import branch_path
from bt_adapter.towers.image_models import read_tower
from bt_adapter.towers.text import load_clip
from bt_adapter.training.checkpoint import moments_of, save_moments, whole
from bt_adapter.training.loop import Clock, rate
from bt_adapter.training.processes import Processes
from bt_adapter.training.run import TrainingRun
from bt_adapter.training.settings import option

NO_GATES: Any = {"merge_gate_slope": None, "output_gate_slope": None}
LOSSES = ("vtc", "mbca", "mbta")


def pretrain(recipe: Recipe) -> Path:
    """Pretrain a branch, or resume a run that was stopped. Returns the folder of the branch, ``OUT/branch``.

    Raises:
        CommandError: a value of the recipe is invalid, or the run in ``OUT`` has another recipe.
        TooManySkipped: more than ``max_skipped`` of the clips cannot be used.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written.
    """
    processes = Processes(recipe.device)
    try:
        recipe.check(processes.world)
        run = Run(with_clip(recipe), processes)
        return run.finish()
    finally:
        processes.leave()


def with_clip(recipe: Recipe) -> Recipe:
    """The recipe with its CLIP, by default the one of ``init``. Raises CommandError where neither names one."""
    if recipe.clip is not None:
        return recipe
    try:
        name = None if recipe.init is None else name_of_tower(recipe.init)
    except (OSError, ValueError) as error:
        raise CommandError(f"--init {recipe.init}: {error}") from error
    if name is None:
        beside = f", and --init {recipe.init} names none" if recipe.init else ""
        raise CommandError(
            f"--clip is missing{beside}: the CLIP that the branch is pretrained beside, a hub name or a folder "
            '(openai/clip-vit-large-patch14-336 is that of LLaVA-1.5; "mini" the small one)'
        )
    return replace(recipe, clip=name)


def choose_temperature(recipe: Recipe, clip: Any) -> float:
    """Return the temperature of the contrastive losses as a number. ``clip``: the image model with both towers.

    Raises:
        CommandError: the recipe asks for the temperature that the CLIP learned, and it has none.
    """
    if not isinstance(recipe.temperature, str):
        return recipe.temperature
    scale = getattr(clip, "logit_scale", None)
    learned = math.exp(-scale.item()) if scale is not None and scale.numel() == 1 else math.nan
    if not 0 < learned < math.inf:
        raise CommandError(
            f"--temperature clip needs a CLIP with a learned temperature (logit_scale), but --clip {recipe.clip} has "
            "none: give a number"
        )
    return learned


class Run(TrainingRun):
    """One pretraining run."""

    recipe: Recipe

    def __init__(self, recipe: Recipe, processes: Processes) -> None:
        super().__init__(recipe, processes)
        self._data()
        self._model()

    def _data(self) -> None:
        recipe = self.recipe
        self.clip: Any
        try:
            assert recipe.clip is not None
            self.clip, self.text = load_clip(recipe.clip)
        except (OSError, ValueError) as error:
            raise CommandError(f"--clip {recipe.clip}: {error}") from error
        self.temperature = choose_temperature(recipe, self.clip)
        vision = read_tower(self.clip).config
        size = vision.image_size
        if recipe.data == "synthetic":
            self.total = None
            self.clips: Any = SyntheticClips(recipe.frame_range.most, size, recipe.seed, recipe.frames_of)
            self.steps_per_epoch = recipe.steps or 1
            self._plan(self.steps_per_epoch)
        else:
            clips, unusable = read_clips(recipe.data, recipe.videos)
            self.skipped.merge(unusable)
            self.check_data("clips", len(clips), digest(clips))
            if len(clips) < recipe.batch_size:
                raise CommandError(
                    f"--data {recipe.data} holds {len(clips)} usable clips, fewer than --batch-size {recipe.batch_size}"
                    + (f"; {unusable.report()}" if len(unusable) else "")
                )
            unusable.check(len(clips) + len(unusable), recipe.max_skipped)
            self.total = len(clips)
            transform = TrainTransform(size, scale=recipe.crop, resample=image_settings_of(self.clip, vision).resample)
            if recipe.group > 1:  # a missing clip would shift later clips into other groups
                unusable.merge(clips_lost(clip.path for clip in clips if isinstance(clip.source, Member)))
                if len(unusable):
                    raise CommandError(
                        f"--group {recipe.group} needs every listed clip, but some cannot be used: mend them, or take "
                        f"their whole groups out of --data {recipe.data}; {unusable.report(10)}"
                    )
            self.clips = TrainingClips(clips, recipe.frames_of, transform, recipe.seed, recipe.group)
            self.steps_per_epoch = len(self.clips) // recipe.batch_size
            self._plan(recipe.steps or max(1, round(recipe.epochs * self.steps_per_epoch)))
        self.validation: list[Clip] = []
        self.damaged = Damaged()
        if self.state.get("damaged"):
            self.damaged.load_state_dict(self.state["damaged"])
        self.left_out = Skipped()  # of the validation clips, which --max-skipped does not count
        if recipe.validation is not None:
            self.validation, unusable = read_clips(recipe.validation, recipe.validation_videos)
            self.skipped.merge(unusable)
            if len(self.validation) < 2:
                raise CommandError(f"--validation {recipe.validation} holds {len(self.validation)} usable clips, not 2")
        self.listed = len(self.skipped)  # unusable before any clip was decoded
        if self.state.get("skipped"):
            self.skipped.load_state_dict(self.state["skipped"])

    def _model(self) -> None:
        recipe, device, folder = self.recipe, self.processes.device, self.folder
        torch.manual_seed(recipe.seed)
        self.model = start_model(recipe, self.clip, folder)
        self.model.trained_steps = recipe.frame_range.most
        head, config = self.model.branch.alignment_head, self.model.config
        if (
            head is not None and not recipe.needs_head
        ):  # from --init: DDP waits for the gradient of every trainable parameter
            head.requires_grad_(False)
        if recipe.lr_gates is not None and config.merge_gate_slope is None and config.output_gate_slope is None:
            raise CommandError(f"--lr-gates is {recipe.lr_gates}, but the branch has no gates: leave it out")
        self.text.to(device)
        self.model.to(device).train()
        self.model.recompute, self.model.products = recipe.recompute, recipe.products
        tower_dtype = None if recipe.dtype == "float32" else getattr(torch, recipe.dtype)
        try:
            self.model.tower.optimize(
                tower_dtype, recipe.tower_chunk, recipe.tower_compile, recipe.tower_graphs, recipe.tower_fp8,
                recipe.tower_attention, recipe.products,
            )  # fmt: skip
        except ValueError as error:
            given = "--tower-chunk, --tower-compile, --tower-graphs, --tower-fp8, --tower-attention or --products"
            raise CommandError(f"the tower cannot run with the given {given}: {error}") from error
        self.module: nn.Module = wrap(Pretraining(self.model, recipe), recipe, device, self.processes.group is not None)
        groups = self.model.parameter_groups(recipe.lr, recipe.weight_decay, recipe.lr_temporal, recipe.lr_gates)
        self._make_optimizer(self.model.branch, groups)
        self.average: AveragedModel | None = None
        if recipe.ema:
            self.average = AveragedModel(self.model.branch, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
            self.average.update_parameters(self.model.branch)  # the first update copies: the average begins here
            if folder is not None:
                load_average(folder / "ema", self.average.module)

    def _run(self, done: int) -> Path:
        recipe, processes, out = self.recipe, self.processes, self.recipe.out / "branch"
        if recipe.temperature == "clip":
            self._say(f"the temperature is the one that the CLIP learned, {self.temperature:.4g}")
        if self.total is not None and (rest := self.total % recipe.group):
            self._say(f"the last {rest} clips of --data are too few for a group of {recipe.group} and are left out")
        if done:
            self._say(f"resuming after step {done} of {self.steps}")
        self._loop(done)
        if processes.first or recipe.sharding == "fsdp2":
            trained = self._trained()
            if processes.first:
                for name, tensors in trained.items():
                    save_trained(self.model, recipe.out / name, tensors, self.state)
        if len(self.skipped):
            self._say(self.skipped.report())
        if len(self.damaged):
            self._say(self.damaged.report())
        if len(self.left_out):
            self._say(f"of the validation clips {self.left_out.report()}")
        self._say(f"{self.steps} steps done; the branch is in {out}")
        return out

    def _trained(self) -> dict[str, dict[str, Tensor]]:
        """Gather the tensors of the branch and, with --ema, of its average, by the names of their folders."""
        parts = {"branch": self.model.branch} | ({} if self.average is None else {"ema": self.average.module})
        return {
            part: {name: whole(tensor) for name, tensor in module.state_dict().items()}
            for part, module in parts.items()
        }

    def _loop(self, done: int) -> None:
        recipe, processes = self.recipe, self.processes
        data = iter(
            batches(
                self.clips, recipe.batch_size // processes.world, processes.rank, processes.world, done, self.steps,
                recipe.workers, pin_memory=processes.device.type == "cuda", prefetch=recipe.prefetch,
            )
        ) if done < self.steps else iter(())  # fmt: skip
        clock, saved, losses = Clock(), time.monotonic(), []
        pending: list[Callable[[], dict[str, Any]]] = []
        for step in range(done + 1, self.steps + 1):
            clock.begin()
            batch = next(data)
            self.damaged.note(batch.damaged)
            clock.got_data()
            pending.append(self._step(step, batch))
            clock.end()
            due = self._due(step, saved) or step == self.steps
            # Reading a step's figures waits for the device, so they are read after the next step was started.
            while len(pending) > (0 if due or processes.device.type == "cpu" else 1):
                losses.append(self._record(pending.pop(0)(), clock))
            if due or self.stop:
                losses.extend(self._record(read(), clock) for read in pending)
                pending = []
                self._save(step, sum(losses) / len(losses) if losses else math.inf)
                saved, losses = time.monotonic(), []
            self._check_stop(step)

    def _step(self, step: int, batch: Any) -> Callable[[], dict[str, Any]]:
        """Run one step. Returns a function that reads its figures, which waits for the device."""
        recipe, processes, device = self.recipe, self.processes, self.processes.device
        visible = draw_visible(recipe, self.model.vision_config.patches, step, processes.rank, processes.world, device)
        draws = draw_depth(self.model.config, recipe, visible, step, processes.rank, device)
        frames = batch.frames.to(device, non_blocking=True)
        text = self.text(batch.captions)
        # The scaler makes its scale when it is first called. Without a scaler nothing waits for the device here.
        scale = float(self.scaler.scale(torch.ones((), device=device))) if self.scaler.is_enabled() else 1.0
        numbers = replace(recipe, temperature=self.temperature)
        parts = backward(self.module, frames, visible, draws, text, numbers, processes.group, scale)
        norm = self._update(self.model.branch.parameters(), step)
        if self.average is not None:
            self.average.update_parameters(self.model.branch)
        flags = tensor_on([len(batch.failed), float(self.asked)], device)
        sums = torch.cat([parts, flags])
        if processes.group is not None:
            dist.all_reduce(sums)
        lr = recipe.lr * rate(step, self.steps, self.warm_steps)

        def read() -> dict[str, Any]:
            *values, failed, stop = sums.tolist()
            values = [value / processes.world for value in values]
            self.stop = stop > 0
            self.state["failed"] = self.state.get("failed", 0) + int(failed)
            if failed:
                for key, reason in itertools.chain(*processes.gather(batch.failed)):
                    self.skipped.add(key, reason)
            return {
                "step": step,
                "epoch": round(step / self.steps_per_epoch, 4),
                "loss": sum(values),
                **dict(zip(LOSSES, values, strict=True)),
                "grad_norm": float(whole(norm)),
                "lr": lr,
                "skipped": self.state["failed"],
            }

        return read

    def _record(self, values: dict[str, Any], clock: Clock) -> float:
        """Log a step and return its loss. Raises TooManySkipped."""
        seen = values["step"] * self.recipe.batch_size + values["skipped"]
        self.skipped.check(seen, self.recipe.max_skipped, self.listed, self.total)
        self._log(values, clock)
        return values["loss"]

    def _due(self, step: int, saved: float) -> bool:
        """Whether a checkpoint is due; the answer is the same in every process."""
        recipe = self.recipe
        if recipe.save_steps and step % recipe.save_steps == 0:
            return True
        late = time.monotonic() - saved > 60 * recipe.save_minutes
        if self.processes.group is None:
            return late
        if step % 10:
            return False
        return any(self.processes.gather(late))

    def _save(self, step: int, loss: float) -> None:
        best = self.state.get("best")
        if not self.stop:  # a stopped run ends without the delay of a validation
            score = self._score(step, loss)
            if math.isfinite(score) and (best is None or score > best["score"]):
                best = {"step": step, "score": score}
        for keys in self.processes.gather(list(self.damaged.reasons)):
            self.damaged.note(keys)
        self.state |= {"best": best, "damaged": self.damaged.state_dict()}
        trained = self._trained()
        moments = {name: whole(tensor) for name, tensor in moments_of(self.model.branch, self.optimizer).items()}

        def fill(folder: Path) -> None:
            for name, tensors in trained.items():
                save_trained(self.model, folder / name, tensors, self.state)
            save_moments(moments, folder / "optimizer.safetensors")

        self._write_checkpoint(step, fill)

    def _score(self, step: int, loss: float) -> float:
        """Score by which the best checkpoint is kept: R@1 on the validation clips, else minus the mean loss."""
        if not self.validation:
            return -loss
        from bt_adapter.eval.retrieval import quick

        recipe = self.recipe
        self.model.eval()
        with gathered(self.module):
            frames = recipe.frame_range.most
            clips_at_once = max(1, recipe.tower_chunk // frames)
            found = quick(self.model, self.text, self.validation, frames, clips_at_once, recipe.workers)
        self.model.train()
        for key, reason in found.failed.items():
            self.left_out.add(key, reason)
        score = (found.to_video.r1 + found.to_text.r1) / 2
        if self.log is not None:
            self.log.validation(
                {"step": step, "text_to_video": found.to_video.to_dict(), "video_to_text": found.to_text.to_dict()}
            )
        return score


def start_model(recipe: Recipe, clip: Any, folder: Path | None) -> BTAdapterVisionModel:
    """Load the model of a checkpoint or of ``init``, or make one with a fresh branch."""
    if folder is not None:
        return BTAdapterVisionModel.from_pretrained(folder / "branch", clip=clip)
    if recipe.init is not None:
        return _load_init(recipe, recipe.init, clip)
    slopes: dict[str, Any] = {} if recipe.gates else dict(NO_GATES)
    config = BTAdapterConfig(
        depth=recipe.depth, drop_path=recipe.drop_path, max_frames=recipe.max_frames,
        alignment_head=recipe.needs_head, **slopes,
    )  # fmt: skip
    model = BTAdapterVisionModel.from_clip(clip, config)
    with torch.no_grad():
        model.branch.time.mul_(recipe.time_std / Recipe.time_std)  # the same random numbers, scaled
    return model


def _load_init(recipe: Recipe, init: str, clip: Any) -> BTAdapterVisionModel:
    """Load the model of ``init``. Raises CommandError where it does not fit the CLIP or contradicts an option."""
    try:
        place = branch_path(init)
        if place.is_file():
            tensors = read_tensors(place)
            if any(name.removeprefix("backbone.").startswith(("blocks.", "btadapter_S.")) for name in tensors):
                raise CheckpointError("a published EVA-CLIP branch; --init takes published CLIP branches and folders")
            gated = recipe.gates or any(name.endswith(("balance1", "balance2")) for name in tensors)
            model = load_reference_checkpoint(
                tensors, read_tower(clip).config, clip, drop_path=recipe.drop_path, **({} if gated else NO_GATES)
            )
            tower = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=1), share=True).tower
            check_fingerprint(model.tower, tower.fingerprint(), Path(init))
        else:
            model = BTAdapterVisionModel.from_pretrained(place, clip=clip)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"--init {init} with --clip {recipe.clip}: {error}") from error
    if model.chat_only or model.vision_config.projection_dim is None:
        raise CommandError(f"--init {init} lacks the last branch layer or the projection, as files for chat do")
    config = model.config
    given = {
        "depth": config.depth, "max_frames": config.max_frames, "drop_path": config.drop_path,
        "gates": config.merge_gate_slope is not None, "time_std": Recipe.time_std,
    }  # fmt: skip
    for name, theirs in given.items():
        if (mine := getattr(recipe, name)) not in (theirs, getattr(Recipe, name)):
            raise CommandError(f"{option(name)} is {mine}, but --init {init} has {theirs}: leave it out")
    if recipe.frame_range.most > config.max_frames:
        raise CommandError(
            f"--frames must be at most {config.max_frames}, as --init {init} has it, got {recipe.frames}"
        )
    if recipe.needs_head and model.branch.alignment_head is None:
        raise CommandError(f"--init {init} has no alignment head, which --mbta {recipe.mbta} needs: give --mbta 0")
    return model


def wrap(module: Pretraining, recipe: Recipe, device: torch.device, many: bool) -> nn.Module:
    """Wrap the module for several processes."""
    if not many:
        return module
    if recipe.sharding == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
    # Each branch layer is one autograd function that needs all weights, so the branch is one FSDP unit.
    fully_shard(module, ignored_params=set(module.model.tower.parameters()))
    return module


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Within the context every process has all weights, for code outside of the module's own ``forward``."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()
