"""Loading the golden cases: see ``golden/README.md``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import bt_adapter
from bt_kernels import VisibleTokens

FOLDER = Path(__file__).parent / "golden"
PRETRAINING = sorted(p.stem for p in FOLDER.glob("*.safetensors") if "chat" not in p.stem)
CHAT = ("chat_full_tower", "chat_reserve")


class Case:
    """One golden case: its tensors, its configuration and the weights it was computed with."""

    def __init__(self, name: str):
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            metadata = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.name = name
        self.config = json.loads(metadata["config"])
        self.weights = _draw(int(metadata["seed"]), json.loads(metadata["weights"]))

    @property
    def vision_config(self) -> dict:
        config = self.config
        return {
            "hidden_size": config["hidden"],
            "intermediate_size": config["inter"],
            "num_hidden_layers": config["layers"],
            "num_attention_heads": config["heads"],
            "image_size": config["image"],
            "patch_size": config["patch"],
            "projection_dim": config["proj"],
            "hidden_act": config["hidden_act"],
        }

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def model(self, **overrides) -> bt_adapter.BTAdapterVisionModel:
        fields = {"merge_gate_slope": self.config.get("middle_norm"), "output_gate_slope": self.config.get("out_norm")}
        fields["drop_block"] = "drop_path_keep_prob" in self.config and self.name.startswith("eva")
        return bt_adapter.load_reference_checkpoint(self.weights, self.vision_config, **{**fields, **overrides})

    def pixels(self) -> Tensor:
        """``[B, T, 3, h, w]``."""
        images = self["inputs.imgs"]
        layout = self.config["layout"]
        return images[:, None] if layout == "NCHW" else images.transpose(1, 2) if layout == "NCTHW" else images

    def visible(self) -> VisibleTokens | None:
        if "inputs.mask" not in self:
            return None
        return VisibleTokens.from_reference_mask(self["inputs.mask"], self.config["frames"])

    def draws(self) -> list[Tensor] | None:
        count = sum(key.startswith("inputs.drop_path.") for key in self.tensors)
        return [self[f"inputs.drop_path.{i}.keep"] for i in range(count)] or None

    def gradients(self, prefix: str = "grads.") -> dict[str, Tensor]:
        """By published name without ``backbone.``."""
        return {
            key.removeprefix(prefix).removeprefix("backbone."): value
            for key, value in self.tensors.items()
            if key.startswith(prefix)
        }


@cache
def load(name: str) -> Case:
    return Case(name)


def _draw(seed: int, order: list) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: offset + scale * torch.randn(shape, generator=generator) for name, shape, scale, offset in order}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected magnitude."""
    assert actual.shape == expected.shape
    return float((actual.detach() - expected).abs().max() / expected.abs().max())


def reference_gradients(model: bt_adapter.BTAdapterVisionModel) -> dict[str, Tensor]:
    """Gradients of the model under their published names."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(gradients.get(name, torch.zeros_like(parameter)))
    return bt_adapter.to_reference_state_dict(model)
