"""Checkpoints of a run, from which it resumes after it was killed at any moment.

``OUT/checkpoints/00000200/`` appears whole or not at all: the trained parts, ``optimizer.safetensors`` and
``state.json``. Tensors are stored unsharded, so the number of processes may change.

The state of the optimizer is gathered and sharded here: ``set_optimizer_state_dict`` of torch.distributed.checkpoint
either refuses parameters that never had a gradient or accepts a file that lacks states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from bt_adapter.errors import CheckpointError
from bt_adapter.files import remove_folder, remove_unfinished, writing
from bt_adapter.model.checkpoint import read_safetensors

KEPT = ("exp_avg", "exp_avg_sq", "step")


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
        damaged: checkpoints that :meth:`newest` skipped because they are damaged, with the reason.
    """

    def __init__(self, out: Path, keep_last: int) -> None:
        self.folder, self.keep_last = out / "checkpoints", max(1, keep_last)
        self.damaged: list[str] = []

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"{step:08d}"

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Folder and state of the newest undamaged checkpoint; None where there is no checkpoint at all.

        Raises:
            CheckpointError: all checkpoints are damaged.
        """
        for step in reversed(self.steps()):
            folder = self.path(step)
            try:
                return folder, _read_state(folder)
            except CheckpointError as error:
                self.damaged.append(str(error))
        if self.damaged:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read: {'; '.join(self.damaged)}")
        return None

    def write(self, state: dict[str, Any], fill: Callable[[Path], None]) -> None:
        """Write a checkpoint by ``fill``, which is given its folder, and delete old ones. The first process calls it.

        state: state of the run, JSON; its "step" names the checkpoint. The checkpoint of its "best", if any, is kept.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with writing(self.path(state["step"]), flush=True) as folder:
            folder.mkdir()
            fill(folder)
            (folder / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        self._drop(state["step"], best=state.get("best"))

    def _drop(self, newest: int, best: dict[str, Any] | None) -> None:
        # later ones are damaged: the run resumed from an earlier one
        kept = {*[step for step in self.steps() if step <= newest][-self.keep_last :], (best or {}).get("step")}
        for step in self.steps():
            if step not in kept:
                remove_folder(self.path(step))
        remove_unfinished(self.folder)


def _read_state(folder: Path) -> dict[str, Any]:
    """Read the state of a checkpoint. Raises CheckpointError for a missing or damaged file; tensors are not read."""
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


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be sharded over processes; every process calls it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor, and move it, as its parameter is."""
    tensor = tensor.to(parameter.device)
    if not hasattr(parameter, "placements"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def moments_of(branch: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of AdamW, by "<moment>.<parameter>"."""
    return {
        f"{what}.{name}": optimizer.state[parameter][what]
        for name, parameter in branch.named_parameters()
        for what in KEPT
        if parameter in optimizer.state
    }


def save_moments(moments: Mapping[str, Tensor], file: Path) -> None:
    """Write the state of AdamW."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in moments.items()}, file)


def load_moments(branch: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    """Load the state of AdamW.

    Raises:
        CheckpointError: the file is damaged, or lacks a parameter.
    """
    stored = read_safetensors(file)
    for name, parameter in branch.named_parameters():
        found = {what: stored.get(f"{what}.{name}") for what in KEPT}
        if missing := [what for what, tensor in found.items() if tensor is None]:
            if len(missing) == len(KEPT):
                continue  # the parameter never had a gradient
            raise CheckpointError(f"{file} lacks {', '.join(missing)} of {name}")
        moments: dict[str, Any] = found
        step = moments.pop("step")
        optimizer.state[parameter] = {what: like(t, parameter) for what, t in moments.items()} | {
            "step": step.to(parameter.device) if _fused(optimizer) else step
        }


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
