"""Write a pretrained branch with a record of how it was trained, and read its moving average."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.errors import CheckpointError
from bt_adapter.files import write_json
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import read_safetensors
from bt_adapter.pretrain.frames import FrameRange
from bt_adapter.training.checkpoint import like

PRETRAINED = "pretrained.json"


def save_trained(
    model: BTAdapterVisionModel, folder: Path, branch: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    """Write a branch, and in pretrained.json how it was trained. state: state of the run."""
    model.save_pretrained(folder, branch=branch)
    recipe = state["recipe"]
    sampling = {"frames": FrameRange.of(recipe["frames"]).most, "repeat": True}
    about = {
        "step": state["step"], "sampling": sampling, "dtype": recipe["dtype"],
        "dtype_chosen": state.get("dtype_chosen"), "recipe": recipe,
    }  # fmt: skip
    write_json(folder / PRETRAINED, about)


def load_average(folder: Path, branch: nn.Module) -> None:
    """Load the moving average into the parameters of ``branch``, which may be sharded over processes.

    Raises:
        CheckpointError: the file is damaged, or lacks a parameter.
    """
    stored, wanted = read_safetensors(folder / "model.safetensors"), dict(branch.named_parameters())
    if missing := [name for name in wanted if f"branch.{name}" not in stored]:
        raise CheckpointError(f"{folder}/model.safetensors lacks {', '.join(missing)}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(like(stored[f"branch.{name}"], parameter))
