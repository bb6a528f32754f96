"""The tuning loop, in one process or under torchrun. A run stopped or killed at any moment can be resumed."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.conversation import context
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.loading import LoadOptions
from bt_adapter.chat.model_folders import mini_stage
from bt_adapter.chat.quantize import QuantizeError, is_quantized
from bt_adapter.chat.tuned import branch_fingerprint, load_by_name
from bt_adapter.data.loading import in_order, numbers_seed
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.files import writing
from bt_adapter.model.time_steps import plan_steps
from bt_adapter.training.checkpoint import moments_of, save_moments
from bt_adapter.training.loop import Clock, rate
from bt_adapter.training.processes import Processes
from bt_adapter.training.run import TrainingRun
from bt_adapter.tune.batches import Order, Step, Steps, VisualReader
from bt_adapter.tune.conversations import read_conversations
from bt_adapter.tune.features import FeatureStore, store_features
from bt_adapter.tune.gradients import share_gradients
from bt_adapter.tune.parts import Learned
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.step import Tuning
from bt_adapter.tune.tokens import Tokens, digest, make_examples


def tune(recipe: TuneRecipe, chat: VideoChat | None = None) -> Path:
    """Tune a chat model, or resume a run that was stopped. Returns the folder of the trained parts, ``OUT/tuned``.

    Args:
        chat: the chat model with its branch, which is modified; None: the one the recipe names.

    Raises:
        CommandError: a value of the recipe is invalid, the data is unusable, or the run in ``OUT`` has another recipe.
        TooManySkipped: more than ``max_skipped`` of the conversations cannot be used.
        Stopped: SIGTERM or SIGINT came; a checkpoint was written, or the features computed so far are stored.
    """
    processes = Processes(recipe.device)
    try:
        recipe.check(processes.world)
        return Run(recipe, processes, chat).finish()
    finally:
        processes.leave()


class Run(TrainingRun):
    """One tuning run."""

    recipe: TuneRecipe

    def __init__(self, recipe: TuneRecipe, processes: Processes, chat: VideoChat | None) -> None:
        super().__init__(recipe, processes)
        conversations, unusable = read_conversations(recipe.data, recipe.videos)
        self.listed = len(conversations) + len(unusable)
        self._note(unusable)
        self.given = chat is not None
        videos = any(source.kind == "video" for conversation in conversations for source in conversation.sources)
        self.chat = chat or load_chat(self.recipe, processes.device, self.recipe.use_branch and videos)
        self.chat.family.home.config.use_branch &= self.recipe.use_branch
        self._data(conversations)
        self._model()

    def _note(self, skipped: Skipped) -> None:
        """Count conversations that cannot be used. Raises TooManySkipped."""
        self.skipped.merge(skipped)
        self.skipped.check(self.listed, self.recipe.max_skipped)

    def _data(self, conversations: Sequence[Any]) -> None:
        recipe, chat = self.recipe, self.chat
        most = recipe.max_length or context(chat.model)
        examples, unusable = make_examples(Tokens(chat.model, chat.processor), conversations, most, recipe.skip_long)
        self._note(unusable)
        if not examples:
            raise CommandError(f"--data {recipe.data} holds no usable conversation; {unusable.report(10)}")
        self.listed += len(examples) - (len(conversations) - len(unusable))  # a conversation may give several examples
        self.check_data("conversations", len(examples), digest(examples))
        self.examples = examples
        self.order = Order([example.length for example in examples], recipe.batch_size, recipe.seed)
        self._plan(recipe.steps or max(1, round(recipe.epochs * self.order.steps_per_epoch)))
        if self.state.get("skipped"):
            self.skipped.load_state_dict(self.state["skipped"])

    def _model(self) -> None:
        recipe = self.recipe
        if recipe.quantize is not None and not is_quantized(self.chat.model):
            raise CommandError(f"--quantize {recipe.quantize}: the chat model that was handed over is not quantized")
        torch.manual_seed(recipe.seed)  # for fresh adapters
        self.learned = Learned(self.chat.model, recipe)
        model = attached_branch(self.chat.model)
        model.recompute, model.tower.chunk = recipe.recompute, recipe.tower_chunk
        if "branch" in self.learned:
            plan = plan_steps(model.config, recipe.frames, recipe.long)
            model.trained_steps = min(plan.steps, plan.rows)
        self.tuning = Tuning(self.chat, recipe)
        if self.folder is not None:
            self.learned.load(self.folder)
        # The loss is a sum over answer tokens, thousands of times the mean for which the usual first scale is made.
        self._make_optimizer(self.learned, self.learned.groups(recipe), first_scale=16.0)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def _run(self, done: int) -> Path:
        out = self.recipe.out / "tuned"
        self._say(f"{len(self.examples)} conversations, {self.steps} steps; {self._trainable()}")
        if done:
            self._say(f"resuming after step {done} of {self.steps}")
        self._loop(done)
        if self.processes.first:
            with writing(out) as folder:
                self.learned.save(folder, self._about())
            self._write_model(out)
        if len(self.skipped):
            self._say(self.skipped.report())
        self._say(f"{self.steps} steps done; the trained parts are in {out}")
        return out

    def _trainable(self) -> str:
        """The number of trainable parameters of each part, for a line of the log."""
        counts = {part: sum(p.numel() for _, p in self.learned.learning(part)) for part in self.learned}
        return ", ".join(f"{count / 1e6:.3g} M trainable parameters in {part}" for part, count in counts.items())

    def _visuals(self) -> VisualReader:
        """Make the reader of videos; with --features, store missing features first."""
        recipe, chat = self.recipe, self.chat
        visuals = VisualReader(chat.images, recipe.frames)
        if recipe.features is None:
            return visuals
        if len(chat.family.feature_layers) != 1:
            raise CommandError(f"--features holds one tower layer, but {chat.family.name} reads several")
        model = attached_branch(chat.model)
        root = recipe.videos or Path(recipe.data).parent
        store = FeatureStore(recipe.features, root, model, recipe.frames, chat.mean, chat.std, recipe.feature_dtype)
        videos = [source.path for example in self.examples for source in example.sources if source.kind == "video"]
        store_features(
            store, videos, visuals.decode, model, self.processes, recipe.workers, self._say, lambda: self.asked
        )
        return VisualReader(chat.images, recipe.frames, store)

    def _loop(self, done: int) -> None:
        recipe, processes = self.recipe, self.processes
        if done == self.steps:
            return
        steps = Steps(self.examples, self.order, self._visuals(), processes.rank, processes.world, recipe.accumulate)
        data = in_order(steps, done, self.steps, recipe.workers, prefetch=recipe.prefetch)
        clock, self.saved = Clock(), time.monotonic()
        for step in range(done + 1, self.steps + 1):
            clock.begin()
            batch = next(data)
            clock.got_data()
            for key, reason in batch.failed:
                self.skipped.add(key, reason)
            values = self._step(step, batch)
            clock.end()
            self._record(values, clock)
            if self.due or self.stop or step == self.steps:
                self._save(step)
            self._check_stop(step)

    def _step(self, step: int, batch: Step) -> dict[str, Any]:
        """Run one step; returns its figures. The loss is the mean over the answer tokens of all processes and parts."""
        recipe, processes = self.recipe, self.processes
        torch.manual_seed(numbers_seed(recipe.seed, step, processes.rank))  # for the dropout of adapters
        loss = torch.zeros((), dtype=torch.float64)
        for part in batch.parts:
            summed = self.tuning.loss(part)
            if summed.requires_grad:  # text alone reaches no trainable parameter without adapters
                self.scaler.scale(summed).backward()
            loss += summed.detach().double().cpu()
        late = bool(recipe.save_steps and step % recipe.save_steps == 0)
        late |= time.monotonic() - self.saved > 60 * recipe.save_minutes
        tokens = sum(part.answer_tokens for part in batch.parts)
        sums = torch.tensor([loss, tokens, len(batch.failed), self.asked, late], dtype=torch.float64)
        if processes.group is not None:
            dist.all_reduce(sums)
        total, count, failed, stop, due = sums.tolist()
        self.stop, self.due = stop > 0, due > 0
        if failed:
            self._gather_skipped()
        factor, norm = rate(step, self.steps, self.warm_steps), 0.0
        if count:  # the loss is a mean over answer tokens
            share_gradients(self.parameters, 1 / count, processes.group)
            norm = float(self._update(self.parameters, step))
        return {
            "step": step,
            "epoch": round(step / self.order.steps_per_epoch, 4),
            "loss": total / count if count else 0.0,
            "answer_tokens": int(count),
            "grad_norm": norm,
            **{f"lr_{group['name']}": group["base"] * factor for group in self.optimizer.param_groups},
            "skipped": len(self.skipped),
        }

    def _record(self, values: dict[str, Any], clock: Clock) -> None:
        """Log a step. Raises TooManySkipped."""
        seen = min(values["step"] * self.recipe.batch_size, len(self.examples))
        self.skipped.check(self.listed - len(self.examples) + seen, self.recipe.max_skipped)
        self._log(values, clock)

    def _gather_skipped(self) -> None:
        for skipped in self.processes.gather(self.skipped.state_dict()):
            self.skipped.load_state_dict(skipped)

    def _save(self, step: int) -> None:
        def fill(folder: Path) -> None:
            self.learned.save(folder, self._about())
            save_moments(moments_of(self.learned, self.optimizer), folder / "optimizer.safetensors")

        self._write_checkpoint(step, fill)
        self.saved = time.monotonic()

    def _about(self) -> dict[str, Any]:
        """The contents of tuned.json: base model, branch, sampling, dtype and recipe."""
        return {
            "model": _absolute(self.recipe.model),
            "branch": {
                "source": self.recipe.branch and _absolute(self.recipe.branch),
                "fingerprint": branch_fingerprint(attached_branch(self.chat.model)),  # None: there is none
            },
            "step": self.state["step"],
            "sampling": self._sampling(),
            "precision": {"dtype": self.dtype.name, "chosen": self.dtype.why},
            "recipe": self.recipe.to_dict(),
        }

    def _sampling(self) -> dict[str, Any]:
        """Sampling of this run's videos, which the tuned model uses for other videos too."""
        long = self.recipe.long
        if long == "published" and "branch" in self.recipe.learn:
            long = "average"  # all rows that it read are trained now, and averaging to as many steps is the same
        sampling = {"frames": self.recipe.frames, "repeat": True, "windows": 1, "long": long}
        return sampling if self.recipe.use_branch else sampling | {"branch": False}

    def _write_model(self, tuned: Path) -> None:
        """Write the whole model as transformers loads it by itself, from the parts in ``tuned``."""
        from bt_adapter.chat.export import save_chat

        recipe, folder = self.recipe, self.recipe.out / "model"
        if recipe.quantize is not None:
            why = f"it was tuned beside weights in {recipe.quantize}, and answers a little differently with full ones"
        elif not recipe.save_model:
            why = "--no-save-model"
        elif attached_branch(self.chat.model).branch.is_absent:
            why = "the model has no branch yet"
        else:
            chat = self._tuned_chat(tuned)
            try:
                save_chat(chat, folder, recipe.frames, self._sampling()["long"], replace=True)
                self._say(f"the whole model, which transformers loads by itself, is in {folder}")
                return
            except CommandError as error:
                why = str(error)
        self._say(f"{folder} is not written ({why}); bt-adapter export {tuned} {folder} writes it")
        if folder.exists():
            self._say(f"{folder} is of an earlier part of this run")

    def _tuned_chat(self, tuned: Path) -> VideoChat:
        """The tuned chat model, adapters merged: loaded again in its stored dtype, or the one passed to `tune`."""
        if not self.given:
            # frees memory for the model that is loaded
            del self.chat, self.learned, self.tuning, self.optimizer, self.parameters
            return VideoChat.load(tuned)
        if "lora" in self.learned:
            adapters: Any = self.learned["lora"]
            adapters.merge_and_unload()
        return self.chat


def load_chat(recipe: TuneRecipe, device: torch.device, needs_branch: bool) -> VideoChat:
    """Load the chat model and branch that a recipe names.

    Args:
        needs_branch: whether the run sends videos through a branch. Where it does not, the model may have none.

    Raises:
        CommandError: they are missing or do not fit each other.
    """
    use_branch = needs_branch or "branch" in recipe.learn
    dtype = getattr(torch, recipe.dtype)
    options = LoadOptions(str(device), dtype, recipe.quantize, recipe.require_same_tower, use_branch)
    try:
        chat = VideoChat(*load_by_name(recipe.model, recipe.branch, options))
    except QuantizeError as error:
        raise CommandError(f"--{error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"--model {recipe.model} with --branch {recipe.branch}: {error}") from error
    if use_branch and not chat.family.home.config.use_branch:
        raise CommandError(
            f"--model {recipe.model} was tuned without a branch: give --branch FOLDER, or --no-use-branch again"
        )
    return chat


def _absolute(name: str) -> str:
    """The absolute path of a local folder; a hub name, or a stage of the small stack, unchanged."""
    if mini_stage(name) is not None:
        return name
    return os.path.abspath(name) if os.path.exists(name) else name
