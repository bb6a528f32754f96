"""The weights of tower and branch: initialised, grouped for an optimizer, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.errors import CheckpointError
from bt_adapter.model.branch import Branch, SpatialLayer
from bt_adapter.model.checkpoint import (
    check_fingerprint,
    float32_by_default,
    image_settings_of,
    load_exactly,
    load_tower,
    read_safetensors,
    read_settings,
    stored_image_settings,
    write_folder,
)
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.time_steps import read_branch_config
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.hugging_face import branch_path
from bt_adapter.towers.image_models import load_image_model, read_tower
from bt_adapter.towers.layers import PLAIN_PARTS, PackedAttention
from bt_adapter.towers.names import pack_qkv
from bt_adapter.towers.tower import Tower
from bt_kernels.plain import why_not_all_plain


class TowerWithBranch(nn.Module):
    """A frozen tower and the trainable branch that reads it, with what concerns their weights alone.

    The constructor's arguments are those of :class:`bt_adapter.BTAdapterVisionModel`, which computes with them.
    """

    # huggingface_hub's PyTorchModelHubMixin is not used: it writes the constructor's arguments as config.json beside a
    # model card, and its save_pretrained cannot pass include_tower and dtype on.

    def __init__(
        self,
        vision_config: TowerConfig | Mapping[str, Any] | Any,
        adapter_config: BTAdapterConfig | None = None,
        stored_features: bool = False,
        chat_only: bool = False,
    ):
        super().__init__()
        config = TowerConfig.of(vision_config)
        adapter_config = adapter_config or BTAdapterConfig()
        self.stored_features = stored_features
        self.chat_only = chat_only or stored_features
        self.first_branch_layer = config.num_hidden_layers - adapter_config.depth
        only = (self.first_branch_layer, config.num_hidden_layers - 1) if stored_features else None
        self.tower = Tower(config, only)
        self.branch = Branch(config, adapter_config, adapter_config.depth - 1 if self.chat_only else None)
        self.tower_name: str | None = None
        # A wrapper of the branch (such as PEFT's), if any; in a list, so that it is not a submodule.
        self.branch_wrapper: list[nn.Module] | None = None
        self.images = ImageSettings(config.image_size)  # preprocessing of frames for the tower

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set ``requires_grad`` of the branch; the tower stays frozen."""
        super().requires_grad_(requires_grad)
        self.tower.requires_grad_(False)
        return self

    @property
    def config(self) -> BTAdapterConfig:
        """Configuration of the branch."""
        return self.branch.config

    @property
    def recompute(self) -> str:
        """Activations that backward recomputes: see :class:`BTAdapterConfig`. It can be set at any time."""
        return self.branch.config.recompute

    @recompute.setter
    def recompute(self, policy: str) -> None:
        self.branch.config = replace(self.branch.config, recompute=policy)

    @property
    def products(self) -> str:
        """Library of the branch's products: see :class:`BTAdapterConfig`. It can be set at any time."""
        return self.branch.config.products

    @products.setter
    def products(self, library: str) -> None:
        self.branch.config = replace(self.branch.config, products=library)

    @property
    def trained_steps(self) -> int | None:
        """Number of time steps of the branch's training: see :class:`BTAdapterConfig`. It can be set at any time."""
        return self.branch.config.trained_steps

    @trained_steps.setter
    def trained_steps(self, steps: int | None) -> None:
        self.branch.config = replace(self.branch.config, trained_steps=steps)

    @property
    def vision_config(self) -> TowerConfig:
        """Configuration of the tower."""
        return self.tower.config

    def parameter_groups(
        self,
        lr: float = 2e-6,
        weight_decay: float = 0.05,
        lr_temporal: float | None = None,
        lr_gates: float | None = None,
    ) -> list[dict[str, Any]]:
        """Make the AdamW groups of the published recipe: lr ×10 for branch and head, ×100 for temporal layers, gates.

        Each group has a "name": "branch", "temporal" or "gates" (if there are any).

        Args:
            lr: base rate. lr_temporal, lr_gates: rates of temporal layers and gates; None: 100 times ``lr``.
        """
        rates = {
            "branch": 10 * lr,
            "temporal": 100 * lr if lr_temporal is None else lr_temporal,
            "gates": 100 * lr if lr_gates is None else lr_gates,
        }
        chosen: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
        for name, parameter in self.branch.named_parameters():
            kind = "temporal" if name.startswith("temporal.") else "gates" if name.endswith("_gate") else "branch"
            chosen[kind].append(parameter)
        return [
            {"params": parameters, "lr": rates[name], "weight_decay": weight_decay, "name": name}
            for name, parameters in chosen.items()
            if parameters
        ]

    @torch.no_grad()
    def reset_spatial_layers(self) -> None:
        """Initialise the spatial layers as copies of the tower's layers that the branch reads.

        Raises:
            ValueError: one of these layers was replaced or wrapped.
        """
        for i, layer in enumerate(self.branch.spatial):
            tower_layer = self.tower.layers[self.first_branch_layer + i - self.tower.first_layer]
            for name, module in (("tower", tower_layer), ("branch", layer)):
                if (reason := why_not_all_plain(module, (*PLAIN_PARTS, SpatialLayer, PackedAttention))) is not None:
                    raise ValueError(f"spatial layer {i} can only be copied from a plain layer, but {name}: {reason}")
            state = layer.state_dict()
            source = pack_qkv(tower_layer.state_dict(), "")
            layer.load_state_dict({name: source[name].to(state[name]) for name in state})

    @classmethod
    def from_clip(
        cls,
        clip: nn.Module | str | os.PathLike,
        adapter_config: BTAdapterConfig | None = None,
        share: bool = False,
    ) -> Self:
        """Build a new branch for a trained image model; its spatial layers are copies of the tower's last layers.

        Args:
            clip: a Hugging Face CLIP, SigLIP or DINOv2 (``CLIPModel``, ``SiglipVisionModel``, ``Dinov2Model``, …), a
                model of open_clip, or the name or folder of one (``bt_adapter.towers.load_image_model``). Without a
                projection, as in every DINOv2, only ``video_tokens`` works.
            adapter_config: configuration of the branch.
            share: use the image model's own parameters instead of copies (their ``requires_grad`` becomes False). A
                SigLIP's position table, which gets a row for CLS, is always copied.

        Raises:
            TypeError: ``clip`` is none of these.
            ValueError: ``share`` is True for a DINOv2, whose layers' scales are multiplied into copies.
            CheckpointError: its structure is not supported.
        """
        clip = _loaded(clip)
        found = read_tower(clip)
        with float32_by_default():
            model = cls(found.config, adapter_config)
        load_tower(model.tower, found, share)
        model.tower_name, model.images = found.name, image_settings_of(clip, found.config)
        model.reset_spatial_layers()
        return model

    def save_pretrained(
        self,
        folder: str | os.PathLike,
        include_tower: bool = False,
        dtype: torch.dtype | None = None,
        branch: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, each under a temporary name that is then renamed.

        Args:
            folder: created if missing.
            include_tower: write the frozen tower's weights too, not only its name.
            dtype: dtype of the written tensors; None: as in the model.
            branch: tensors to write instead of the branch's (which may be sharded over processes), such as averages.

        Raises:
            ValueError: ``include_tower`` is True for a tower in 8 bits, or for a chat model's tower without its last
                layer: neither has all weights.
        """
        if include_tower and self.tower.is_fp8:
            raise ValueError("include_tower must be False for a tower in 8 bits (optimize(fp8=True)), but is True")
        layers = self.vision_config.num_hidden_layers
        if include_tower and not self.stored_features and len(self.tower.layers) < layers:
            raise ValueError("include_tower must be False where a chat model's tower lacks its last layer, but is True")
        tensors = {n: t for n, t in self.state_dict().items() if include_tower or n.startswith("branch.")}
        tensors.update({f"branch.{name}": tensor for name, tensor in (branch or {}).items()})
        settings = {
            "tower_name": self.tower_name,
            "includes_tower": include_tower,
            "stored_features": self.stored_features,
            "chat_only": len(self.branch.temporal) < self.config.depth,
            "tower_fingerprint": self.tower.fingerprint(),
            "tower": self.vision_config.to_dict(),
            "images": self.images.at(self.vision_config.image_size).to_dict(),
            "branch": self.config.to_dict(),
        }
        write_folder(Path(folder), tensors, settings, dtype)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        clip: nn.Module | str | os.PathLike | None = None,
        share: bool = False,
    ) -> Self:
        """Load a folder of :meth:`save_pretrained`, in evaluation mode; in float32, unless the tower is shared.

        Args:
            folder: with ``config.json`` and ``model.safetensors``, or the hub name of one (owner/name).
            clip: the branch's image model, if the folder holds only the branch: see :meth:`from_clip`; None: the one
                named in the folder. With a tower without a projection (of a chat model, a DINOv2) only
                ``video_tokens`` works.
            share: use the image model's own parameters, as in :meth:`from_clip`.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: a file is damaged, names or shapes do not fit, the CLIP is a different one, or none is
                known.
        """
        folder = branch_path(folder)
        settings = read_settings(folder)
        state = pack_qkv(read_safetensors(folder / "model.safetensors"))  # version 0.1 kept q, k and v apart
        config, name = TowerConfig(**settings["tower"]), settings["tower_name"]
        found = None
        if not settings["includes_tower"]:
            clip = clip if clip is not None else name
            if clip is None:
                raise CheckpointError(f"{folder} holds only a branch and names no tower: give clip=")
            clip = _loaded(clip)
            found = read_tower(clip)
            name = found.name or name
            if wrong := config.differences(found.config):
                raise CheckpointError(f"the branch in {folder} does not fit the tower of clip: {', '.join(wrong)}")
            if found.config.projection_dim is None:
                config = replace(config, projection_dim=None)
                state = {n: t for n, t in state.items() if not n.startswith("branch.alignment_head.")}
        adapter_config = read_branch_config(settings["branch"], folder)
        with float32_by_default():
            model = cls(config, adapter_config, settings["stored_features"], settings.get("chat_only", False))
        model.tower_name = name
        model.images = stored_image_settings(folder, settings, clip, config)
        if found is not None:
            load_tower(model.tower, found, share)
            check_fingerprint(model.tower, settings.get("tower_fingerprint"), folder)
            state.update({f"tower.{n}": t for n, t in model.tower.state_dict().items()})
        load_exactly(model, state, str(folder))
        return model.eval()


def _loaded(clip: nn.Module | str | os.PathLike) -> nn.Module:
    """Return a module unchanged; load the image model of a name or folder."""
    return load_image_model(clip) if isinstance(clip, (str, os.PathLike)) else clip
