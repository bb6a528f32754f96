"""Published BT-Adapter checkpoints: into a model, and a model's tensors back under their published names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from bt_adapter.checkpoint import CheckpointError, load_exactly
from bt_adapter.config import BTAdapterConfig, TowerConfig
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.names import (
    HEAD,
    OWN_STACKS,
    RESHAPED,
    STACKS_CLIP,
    STACKS_EVA,
    TOP_CLIP,
    TOP_EVA,
    layer_to_reference,
    to_own,
)

_HEAD_WIDTH = 64  # of CLIP's towers; EVA-CLIP-g has 88
_EVA_HEADS = {1408: 16}


def load_reference_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    vision_config: TowerConfig | Mapping[str, Any] | Any | None = None,
    **overrides: Any,
) -> BTAdapterVisionModel:
    """A model from a published BT-Adapter checkpoint: pretraining, chat or stored-features file.

    CLIP or EVA, depth, gates and alignment head are read off the tensors. Pickles are read with
    ``weights_only=True``. The text encoder's tensors (``text_backbone.``) are left out.

    Args:
        path_or_state_dict: a ``.safetensors`` file, a torch pickle (``state_dict`` inside or plain), or a dict.
        vision_config: of the tower: a Hugging Face ``CLIPVisionConfig`` or a dict with its keys. None: read off the
            tensors, with heads 64 wide (EVA-CLIP-g: 88); a stored-features file does not say how many layers its
            tower has, so it is taken to be ViT-L/14's 24.
        **overrides: fields of :class:`BTAdapterConfig`, for example ``drop_path``, ``merge_gate_slope``.

    Returns:
        The model, in evaluation mode. A file without gates gets half-open ones, with a warning.

    Raises:
        CheckpointError: the file is no such checkpoint, is an unsafe pickle, or has names or shapes that do not
            fit; the message lists them.
        FileNotFoundError: there is no such file.
    """
    state = _strip_prefixes(_read(path_or_state_dict))
    eva = any(name.startswith("btadapter_S.") or name.startswith("blocks.") for name in state)
    stacks = STACKS_EVA if eva else STACKS_CLIP
    if not any(name.startswith(f"{stacks[1]}.") for name in state):
        raise CheckpointError(
            f"no branch layers ({stacks[1]}.*) among {len(state)} tensors: not a BT-Adapter checkpoint"
        )
    branch_layers, tower_layers = _count(state, stacks[1]), _count(state, stacks[0])
    stored = ("class_embedding" not in state) and ("cls_token" not in state)
    config = _tower_config(state, vision_config, eva, tower_layers, stored)
    has_gates = "balance2" in state
    fields: dict[str, Any] = {
        "depth": branch_layers + 1 if stored else branch_layers,
        "max_frames": state["btadapter_position.weight" if eva else "btadapter_time_embed.weight"].shape[0],
        "alignment_head": "extra_proj.0.weight" in state,
    }
    if eva:
        fields.update(merge_gate_slope=None, output_gate_slope=None)
    fields.update(overrides)
    model = BTAdapterVisionModel(config, BTAdapterConfig(**fields), stored_features=stored)
    own = {}
    for name, tensor in state.items():
        if name in RESHAPED:
            tensor = tensor.flatten()
        elif name == "pos_embed":
            tensor = tensor[0]
        own[to_own(name, eva) or name] = tensor
    gates = {"branch.merge_gate", "branch.output_gate"}
    expected = model.state_dict()
    if not has_gates and not eva and gates & set(expected):
        warnings.warn("the checkpoint has no gates (balance1, balance2): they start half open", stacklevel=2)
        own.update({name: expected[name] for name in gates & set(expected)})
    if has_gates:  # gates switched off by an override are no unexpected names
        own = {name: tensor for name, tensor in own.items() if name not in gates or name in expected}
    load_exactly(model, own, "the checkpoint")
    return model.eval()


def to_reference_state_dict(model: BTAdapterVisionModel) -> dict[str, Tensor]:
    """The model's tensors under their published names: a chat or stored-features file's; the way back.

    A pretraining file has ``backbone.`` before every name but ``extra_proj`` and ``text_backbone``.
    """
    eva = model.vision_config.is_eva
    top = TOP_EVA if eva else TOP_CLIP
    back = {own: name for name, own in {**top, **HEAD}.items()}
    stacks = STACKS_EVA if eva else STACKS_CLIP
    result = {}
    for own, tensor in model.state_dict().items():
        name = back.get(own, "")
        if not name:
            for own_stack, stack in zip(OWN_STACKS, stacks, strict=True):
                if own.startswith(f"{own_stack}."):
                    name = f"{stack}.{layer_to_reference(own.removeprefix(own_stack + '.'), eva)}"
        elif eva and name == "pos_embed":
            tensor = tensor[None]
        elif name in RESHAPED:
            tensor = tensor.reshape(RESHAPED[name])
        result[name] = tensor
    return result


def _read(source: str | os.PathLike | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    state: Any = source
    if not isinstance(source, Mapping):
        path = Path(source)
        if not path.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}")
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ... for bad files
                raise CheckpointError(
                    f"{path} cannot be read with weights_only=True (it would run code, or is damaged): {error}"
                ) from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError("the checkpoint must be a dict of tensors, or hold one under 'state_dict'")
    return state


def _strip_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in state.items():
        name = name.removeprefix("model.vision_tower.").removeprefix("backbone.").replace("timesFPN", "btadapter")
        if not name.startswith("text_backbone."):
            result[name] = tensor
    return result


def _count(state: Mapping[str, Tensor], stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})


def _tower_config(state: Mapping[str, Tensor], given: Any, eva: bool, tower_layers: int, stored: bool) -> TowerConfig:
    spatial = "btadapter_S.0." if eva else "btadapter_S_layers.0."
    fc1 = state[f"{spatial}mlp.fc1.weight"]
    position = state["pos_embed"][0] if eva else state["position_embedding.weight"]
    intermediate, width = fc1.shape
    projection = state.get("head.weight" if eva else "visual_projection.weight")
    if given is not None:
        config = TowerConfig.of(given).to_dict()
        if eva and not (isinstance(given, (Mapping, TowerConfig)) and config["layer_norm_eps"] != 1e-5):
            config["layer_norm_eps"] = 1e-6
    else:
        patch = state.get("patch_embed.proj.weight" if eva else "patch_embedding.weight")
        side = round((position.shape[0] - 1) ** 0.5)
        patch_size = 14 if patch is None else patch.shape[-1]
        config = {
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": 24 if stored else tower_layers,
            "num_attention_heads": _EVA_HEADS.get(width, max(1, width // _HEAD_WIDTH)),
            "image_size": side * patch_size,
            "patch_size": patch_size,
            "layer_norm_eps": 1e-6 if eva else 1e-5,
        }
    config["projection_dim"] = None if projection is None else projection.shape[0]
    config["model_type"] = "eva" if eva else "clip_vision_model"
    if eva:
        config["hidden_act"] = "gelu"
    if config["hidden_size"] != width:
        raise CheckpointError(
            f"vision_config has hidden_size {config['hidden_size']}, but the checkpoint's width is {width}"
        )
    return TowerConfig(**config)
