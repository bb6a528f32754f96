"""What a run that was killed at any moment goes on from.

``OUT/checkpoints/00000200/`` appears whole or not at all: ``branch/`` (of save_pretrained), ``optimizer.safetensors``,
``state.json``, and ``ema/`` where there is one. Tensors are stored whole whatever the number of processes was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bt_adapter.checkpoint import CheckpointError, read_safetensors, save_model, to_disk
from bt_adapter.files import write_whole
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.pretrain.frames import FrameRange

PRETRAINED = "pretrained.json"
KEPT = ("exp_avg", "exp_avg_sq", "step")


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        damaged: what :meth:`newest` found damaged and passed over, each with the reason.
    """

    def __init__(self, out: Path, keep_last: int) -> None:
        self.folder, self.keep_last = out / "checkpoints", max(1, keep_last)
        self.damaged: list[str] = []

    def steps(self) -> list[int]:
        """Of which steps there are whole ones, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def path(self, step: int) -> Path:
        """Folder of a step's checkpoint."""
        return self.folder / f"{step:08d}"

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest one that is not damaged; None where there is none at all.

        Raises:
            CheckpointError: there are some, but all are damaged.
        """
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                return folder, _sound(folder)
            except CheckpointError as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: {'; '.join(self.damaged)}")
        return None

    def save(
        self,
        model: BTAdapterVisionModel,
        optimizer: torch.optim.Optimizer,
        ema: Mapping[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        """Write a checkpoint and drop what need not be kept. Every process calls it, the first one writes."""
        branch = {name: whole(tensor) for name, tensor in model.branch.state_dict().items()}
        moments = {name: whole(tensor) for name, tensor in moments_of(model.branch, optimizer).items()}
        averages = {name: whole(tensor) for name, tensor in ema.items()}

        def fill(folder: Path) -> None:
            for name, tensors in {"branch": branch, "ema": averages}.items():
                if tensors:
                    save_trained(model, folder / name, tensors, state)
            save_moments(moments, folder / "optimizer.safetensors")

        self.write(state, fill)

    def write(self, state: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """A checkpoint of what ``fill`` writes into a folder. Every process calls it, the first one writes.

        state: of the run, JSON; its "step" names the checkpoint, and that of its "best", where it has one, is kept.
        """
        if first():
            folder = self.path(state["step"])
            writing = folder.with_name(folder.name + ".writing")
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
            fill(writing)
            (writing / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
            to_disk(*writing.rglob("*"), writing)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(writing, folder)
            to_disk(self.folder)
            self._drop(state["step"], best=state.get("best"))
        if dist.is_initialized():
            dist.barrier()

    def _drop(self, newest: int, best: dict[str, Any] | None) -> None:
        # later ones are damaged: the run went on from before them
        kept = {*[step for step in self.steps() if step <= newest][-self.keep_last :], (best or {}).get("step")}
        for step in self.steps():
            if step not in kept:
                # renamed first: a folder half gone must not look like a checkpoint
                doomed = self.path(step).with_name(f"{step:08d}.dropped")
                os.replace(self.path(step), doomed)
        for doomed in (*self.folder.glob("*.dropped"), *self.folder.glob("*.writing")):
            shutil.rmtree(doomed, ignore_errors=True)


def save_trained(
    model: BTAdapterVisionModel, folder: Path, branch: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    """Write a branch, and beside it how it was trained. state: of the run."""
    save_model(model, folder, branch=branch)
    recipe = state["recipe"]
    sampling = {"frames": FrameRange.of(recipe["frames"]).most, "repeat": True}
    about = {
        "step": state["step"], "sampling": sampling, "dtype": recipe["dtype"],
        "dtype_chosen": state.get("dtype_chosen"), "recipe": recipe,
    }  # fmt: skip
    write_whole(folder / PRETRAINED, json.dumps(about, indent=2) + "\n")


def _sound(folder: Path) -> dict[str, Any]:
    """A checkpoint's state; CheckpointError where a file of it is missing or damaged. Tensors are not read."""
    try:
        states = {file: json.loads(file.read_text(encoding="utf-8")) for file in folder.rglob("*.json")}
        for file in {folder / "optimizer.safetensors", *folder.rglob("*.safetensors")}:
            with safe_open(file, "pt"):  # compares the file's length with what it should hold
                pass
        return states[folder / "state.json"]
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{folder} is damaged: it has no state.json") from error


def first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may lie in parts on many processes; they all call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, laid out as the parameter it belongs to."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def moments_of(branch: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What AdamW remembers, by "<what>.<parameter>"."""
    return {
        f"{what}.{name}": optimizer.state[parameter][what]
        for name, parameter in branch.named_parameters()
        for what in KEPT
        if parameter in optimizer.state
    }


def save_moments(moments: Mapping[str, Tensor], file: Path) -> None:
    """Write what AdamW remembers."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in moments.items()}, file)


def load_moments(branch: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Give AdamW back what it remembered.

    Raises:
        CheckpointError: the file is damaged, or lacks a parameter.
    """
    stored = read_safetensors(file)
    for name, parameter in branch.named_parameters():
        found = {what: stored.get(f"{what}.{name}") for what in KEPT}
        if missing := [what for what, tensor in found.items() if tensor is None]:
            if len(missing) == len(KEPT):
                continue  # it never had a gradient
            raise CheckpointError(f"{file} lacks {', '.join(missing)} of {name}")
        moments: dict[str, Any] = found
        step = moments.pop("step")
        optimizer.state[parameter] = {what: like(t, parameter) for what, t in moments.items()} | {
            "step": step.to(parameter.device) if _fused(optimizer) else step
        }


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def load_averages(folder: Path, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The averaged branch stored beside. CheckpointError where its file is damaged, or lacks a parameter."""
    stored, wanted = read_safetensors(folder / "model.safetensors"), dict(parameters)
    if missing := [name for name in wanted if f"branch.{name}" not in stored]:
        raise CheckpointError(f"{folder}/model.safetensors lacks {', '.join(missing)}")
    return {name: like(stored[f"branch.{name}"], parameter) for name, parameter in wanted.items()}
