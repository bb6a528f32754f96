"""The base of training runs, which start or resume, can be stopped at any moment, and write a log."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.files import remove_unfinished, write_whole
from bt_adapter.model.dtypes import ChosenDtype, choose_dtype
from bt_adapter.training.checkpoint import Checkpoints, load_moments
from bt_adapter.training.log import Log
from bt_adapter.training.loop import Clock, Stopped, rate, signals, warm_steps
from bt_adapter.training.processes import Processes


class TrainingRun:
    """One run with its state, stop signals and log. Subclasses add model, data and steps.

    Args:
        recipe: options. processes: the processes that share the work.

    Raises:
        CommandError: the folder ``out`` holds a run of another recipe, is in use by another run, or is not the same for
            all processes.
    """

    steps: int

    def __init__(self, recipe: Any, processes: Processes) -> None:
        self.recipe, self.processes = recipe, processes
        self.checkpoints = Checkpoints(recipe.out, recipe.keep_last)
        processes.hold(recipe.out)
        if processes.first:
            remove_unfinished(recipe.out)
        found = self.checkpoints.newest()
        steps = processes.gather(found[1]["step"] if found else 0)
        if len(set(steps)) > 1:
            raise CommandError(
                f"--out {recipe.out} must be one folder for all processes, but they find checkpoints of steps {steps}"
            )
        self.folder = found[0] if found else None  # of the checkpoint to resume from
        if found:
            found[1]["recipe"] = recipe.rename_stored(found[1]["recipe"])
        self.dtype = self._choose_dtype(found[1]["recipe"]["dtype"] if found else None)
        self.recipe = recipe = replace(recipe, dtype=self.dtype.name)
        self.state: dict[str, Any] = found[1] if found else {"step": 0, "recipe": recipe.to_dict()}
        if wrong := recipe.differences(self.state["recipe"]):
            raise CommandError(f"--out {recipe.out} holds a run of another recipe: {'; '.join(wrong)}")
        if self.folder is None:
            self.state["dtype_chosen"] = self.dtype.why
        self.skipped = Skipped()
        self.asked = self.stop = False  # asked: a signal came; stop: one came in any process

    def _choose_dtype(self, before: str | None) -> ChosenDtype:
        """Choose the dtype of matrix products, one for all processes. before: the dtype of the resumed run."""
        asked = self.recipe.dtype
        if asked == "auto" and before is not None:
            return ChosenDtype(before, "as the run in --out began")
        return self.processes.gather(choose_dtype(asked, self.processes.device))[0]

    def _plan(self, steps: int) -> None:
        """Set the length of the run. A resumed run may be longer than it was, not shorter.

        The warm-up stays as long as it was; from here on the rate follows the cosine of the new length.

        Raises:
            CommandError: the run would be shorter.
        """
        before = self.state.get("steps", steps)
        if steps < before:
            raise CommandError(
                f"--out {self.recipe.out} holds a run of {before} steps, but --epochs or --steps ask for {steps}: ask "
                "for as many, or for more to make it longer"
            )
        self.steps, self.before = steps, before
        self.warm_steps = self.state.setdefault("warm_steps", warm_steps(self.recipe.warmup, steps))
        self.state["steps"] = steps

    def check_data(self, what: str, count: int, digest: str) -> None:
        """Store number and digest of the items of --data, called ``what``. Every process calls it.

        Raises:
            CommandError: the processes, or the resumed run, found other items.
        """
        recipe, found = self.recipe, {what: count, "digest": digest}
        everyone = self.processes.gather(found)
        if any(other != found for other in everyone):
            raise CommandError(
                f"--data {recipe.data} must be the same for all processes, but they find "
                f"{[other[what] for other in everyone]} usable {what}, or other ones"
            )
        if (before := self.state.setdefault("data", found)) != found:
            raise CommandError(
                f"--data {recipe.data} is not what the run in --out {recipe.out} began with: {count} usable "
                f"{what} now, {before[what]} then, or other ones"
            )

    def finish(self) -> Path:
        """Run the remaining steps and write the trained parameters; return their folder."""
        done = self.state["step"]
        first = self.processes.first
        self.log = Log(self.recipe.out, done, self.steps, self.recipe.tensorboard) if first else None
        self._say(str(self.dtype))
        if self.steps > self.before:
            lengths = (self.before, self.steps)
            rates = [rate(done + 1, steps, self.warm_steps) if done < steps else 0.0 for steps in lengths]
            self._say(
                f"the run is made longer, from {self.before} to {self.steps} steps: after step {done} the rate follows "
                f"the cosine of {self.steps} steps, so that the next step has {rates[1]:.3g} of the peak, not "
                f"{rates[0]:.3g}"
            )
        if first:
            self._write_recipe()
        for damaged in self.checkpoints.damaged:
            self._say(f"{damaged}; the run resumes from the one before")
        try:
            with signals(self._ask):
                return self._run(done)
        finally:
            if self.log is not None:
                self.log.close()

    def _make_optimizer(self, module: nn.Module, groups: list[dict[str, Any]], first_scale: float = 65536.0) -> None:
        """Make AdamW and the gradient scaler of float16, with the states of the resumed checkpoint.

        Args:
            module: holds the trained parameters. groups: parameter groups with their peak learning rates.
            first_scale: of a new run's scaler.
        """
        recipe = self.recipe
        self.optimizer = torch.optim.AdamW(
            groups, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
        )
        for group in self.optimizer.param_groups:
            group["base"] = group["lr"]
        self.scaler = torch.amp.GradScaler(
            self.processes.device.type, init_scale=first_scale, enabled=recipe.dtype == "float16"
        )
        if self.state.get("scaler"):
            self.scaler.load_state_dict(self.state["scaler"])
        if self.folder is not None:
            load_moments(module, self.optimizer, self.folder / "optimizer.safetensors")

    def _update(self, parameters: Iterable[Tensor], step: int) -> Tensor:
        """Clip the gradients, update the parameters at the step's rate and clear the gradients; return their norm."""
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, self.recipe.max_grad_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(step, self.steps, self.warm_steps)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _write_checkpoint(self, step: int, fill: Callable[[Path], None]) -> None:
        """Bring the state up to date and write a checkpoint; ``fill`` writes the tensors into its folder.

        Every process calls it; the first one writes, and the others wait for it.
        """
        self.state |= {
            "step": step, "skipped": self.skipped.state_dict(), "recipe": self.recipe.to_dict(),
            "scaler": self.scaler.state_dict(), "torch": torch.__version__,
        }  # fmt: skip
        if self.processes.first:
            self.checkpoints.write(self.state, fill)
        self.processes.gather(None)

    def _check_stop(self, step: int) -> None:
        """Raise Stopped after a step if a process was asked to stop and steps remain."""
        if self.stop and step < self.steps:
            raise Stopped(f"stopped after step {step} of {self.steps}; the same command goes on from there")

    def _write_recipe(self) -> None:
        """Write all options as a file for --config, before the first step."""
        import yaml

        text = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_whole(self.recipe.out / "recipe.yaml", text)

    def _run(self, done: int) -> Path:
        """Run the steps after the first ``done`` and write the result; return its folder."""
        raise NotImplementedError

    def _ask(self) -> None:
        self.asked = True

    def _say(self, text: str) -> None:
        if self.log is not None:
            self.log.say(text)

    def _log(self, values: dict[str, Any], clock: Clock) -> None:
        """Log a step. A loss that is not finite ends the run, except in float16, whose scaler skips such steps."""
        if not math.isfinite(values["loss"]) and self.recipe.dtype != "float16":
            raise CommandError(f"the loss of step {values['step']} is {values['loss']}: --lr may be too large")
        if self.log is not None:
            per_second, waiting = clock.figures(self.recipe.batch_size)
            self.log.step({**values, "clips_per_s": round(per_second, 3), "data_wait": round(waiting, 4)})
