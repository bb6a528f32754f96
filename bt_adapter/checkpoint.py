"""Weights in and out: published checkpoints, Hugging Face CLIP towers, and our own folders."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bt_adapter.config import BTAdapterConfig, TowerConfig
from bt_adapter.model import BTAdapterVisionModel

_FORMAT = 1
_HEAD_WIDTH = 64  # of CLIP's towers; EVA-CLIP-g has 88
_EVA_HEADS = {1408: 16}

# Published name (regex) → own name, for CLIP and for EVA. A third value is the own tensor's shape change.
_LAYER_CLIP = [
    (r"layer_norm([12])\.", r"norm\1."),
    (r"self_attn\.", "attention."),
    (r"mlp\.", ""),
]
_LAYER_EVA = [
    (r"attn\.qkv\.weight", "attention.qkv_weight"),
    (r"attn\.proj\.", "attention.out_proj."),
    (r"attn\.", "attention."),
    (r"mlp\.", ""),
]
_TOP_CLIP = {
    "class_embedding": "tower.class_embedding",
    "patch_embedding.weight": "tower.patch_embedding.weight",
    "position_embedding.weight": "tower.position",
    "pre_layrnorm.weight": "tower.pre_norm.weight",
    "pre_layrnorm.bias": "tower.pre_norm.bias",
    "post_layernorm.weight": "tower.final_norm.weight",
    "post_layernorm.bias": "tower.final_norm.bias",
    "visual_projection.weight": "tower.projection.weight",
    "btadapter_cls_token": "branch.cls_token",
    "btadapter_time_embed.weight": "branch.time",
    "balance1": "branch.output_gate",
    "balance2": "branch.merge_gate",
}
_TOP_EVA = {
    "cls_token": "tower.class_embedding",
    "pos_embed": "tower.position",
    "patch_embed.proj.weight": "tower.patch_embedding.weight",
    "patch_embed.proj.bias": "tower.patch_embedding.bias",
    "norm.weight": "tower.final_norm.weight",
    "norm.bias": "tower.final_norm.bias",
    "head.weight": "tower.projection.weight",
    "head.bias": "tower.projection.bias",
    "btadapter_cls": "branch.cls_token",
    "btadapter_position.weight": "branch.time",
}
_HEAD = {
    "extra_proj.0.weight": "branch.alignment_head.0.weight",
    "extra_proj.0.bias": "branch.alignment_head.0.bias",
    "extra_proj.1.weight": "branch.alignment_head.1.weight",
    "extra_proj.1.bias": "branch.alignment_head.1.bias",
}
# Published names of the stacks: (tower layers, spatial layers, temporal layers)
_STACKS_CLIP = ("layers", "btadapter_S_layers", "btadapter_T_layers")
_STACKS_EVA = ("blocks", "btadapter_S", "btadapter_T")
_OWN_STACKS = ("tower.layers", "branch.spatial", "branch.temporal")
_RESHAPED = {"cls_token": (1, 1, -1), "btadapter_cls_token": (1, 1, -1), "btadapter_cls": (1, 1, -1)}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what does not fit."""


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
    stacks = _STACKS_EVA if eva else _STACKS_CLIP
    if not any(name.startswith(f"{stacks[1]}.") for name in state):
        raise CheckpointError(f"no branch layers ({stacks[1]}.*) among {len(state)} tensors: not a BT-Adapter checkpoint")
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
        if name in _RESHAPED:
            tensor = tensor.flatten()
        elif name == "pos_embed":
            tensor = tensor[0]
        own[_to_own(name, eva) or name] = tensor
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
    top = _TOP_EVA if eva else _TOP_CLIP
    back = {own: name for name, own in {**top, **_HEAD}.items()}
    stacks = _STACKS_EVA if eva else _STACKS_CLIP
    result = {}
    for own, tensor in model.state_dict().items():
        name = back.get(own)
        if name is None:
            for own_stack, stack in zip(_OWN_STACKS, stacks, strict=True):
                if own.startswith(f"{own_stack}."):
                    name = f"{stack}.{_layer_to_reference(own.removeprefix(own_stack + '.'), eva)}"
        elif eva and name == "pos_embed":
            tensor = tensor[None]
        elif name in _RESHAPED:
            tensor = tensor.reshape(_RESHAPED[name])
        result[name] = tensor
    return result


def model_from_clip(
    clip: nn.Module | str | os.PathLike, adapter_config: BTAdapterConfig | None = None, share: bool = False
) -> BTAdapterVisionModel:
    """A fresh branch beside a trained Hugging Face CLIP tower; spatial layers start as copies of the tower's last.

    Args:
        clip: a ``CLIPModel``, ``CLIPVisionModelWithProjection`` or ``CLIPVisionModel`` (without a projection only
            ``video_tokens`` works), or the name or folder of a CLIP.
        adapter_config: of the branch.
        share: use the CLIP's own parameters instead of copies (they stop asking for gradients).

    Raises:
        TypeError: ``clip`` is no CLIP vision tower.
    """
    name, state, config = _clip_tensors(clip)
    model = BTAdapterVisionModel(config, adapter_config)
    _load_tower(model, state, share)
    model.tower_name = name
    model.reset_spatial_layers()
    return model


def save_model(
    model: BTAdapterVisionModel,
    folder: str | os.PathLike,
    include_tower: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``, each to a temporary name and then renamed.

    The frozen tower is named, not copied, unless ``include_tower``; ``dtype`` casts what is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to(dtype=dtype, device="cpu").contiguous()
        for name, tensor in model.state_dict().items()
        if include_tower or name.startswith("branch.")
    }
    config = {
        "format": _FORMAT,
        "tower_name": model.tower_name,
        "includes_tower": include_tower,
        "stored_features": model.stored_features,
        "tower": model.vision_config.to_dict(),
        "branch": model.config.to_dict(),
    }
    weights, settings = folder / "model.safetensors", folder / "config.json"
    save_file(state, f"{weights}.writing", metadata={"format": "pt"})
    Path(f"{settings}.writing").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(f"{weights}.writing", weights)
    os.replace(f"{settings}.writing", settings)


def load_model(
    folder: str | os.PathLike, clip: nn.Module | str | os.PathLike | None = None, share: bool = False
) -> BTAdapterVisionModel:
    """Read a folder written by :func:`save_model`; in evaluation mode, float32 unless the tower is shared.

    Args:
        folder: with ``config.json`` and ``model.safetensors``.
        clip: the CLIP the branch belongs to, where the folder holds the branch alone; None: the one it names.
        share: use the CLIP's own parameters.

    Raises:
        FileNotFoundError: a file is missing. CheckpointError: names or shapes do not fit, or no tower is known.
    """
    folder = Path(folder)
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: not a saved BT-Adapter branch")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != _FORMAT:
        raise CheckpointError(f"{folder}/config.json has format {config.get('format')!r}, expected {_FORMAT}")
    model = BTAdapterVisionModel(TowerConfig(**config["tower"]), BTAdapterConfig(**config["branch"]), config["stored_features"])
    state = load_file(folder / "model.safetensors")
    model.tower_name = config["tower_name"]
    if not config["includes_tower"]:
        clip = clip if clip is not None else model.tower_name
        if clip is None:
            raise CheckpointError(f"{folder} holds a branch alone and names no tower: give clip=")
        model.tower_name, tensors, found = _clip_tensors(clip)
        _check_same_tower(model.vision_config, found)
        _load_tower(model, tensors, share)
        state.update({n: t for n, t in model.state_dict().items() if n.startswith("tower.")})
        load_exactly(model.branch, _under(state, "branch."), str(folder))
    else:
        load_exactly(model, state, str(folder))
    return model.eval()


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``: no name missing, none unexpected, no shape other.

    Raises:
        CheckpointError: listing every name that does not fit.
    """
    own = module.state_dict()
    missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(set(own) & set(state))
        if state[name].shape != own[name].shape
    ]
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(parts)}")
    module.load_state_dict(state)


def _read(source: str | os.PathLike | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if isinstance(source, Mapping):
        state = source
    else:
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


def _tower_config(
    state: Mapping[str, Tensor], given: Any, eva: bool, tower_layers: int, stored: bool
) -> TowerConfig:
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
        raise CheckpointError(f"vision_config has hidden_size {config['hidden_size']}, but the checkpoint's width is {width}")
    return TowerConfig(**config)


def _to_own(name: str, eva: bool) -> str | None:
    """Own name of a published one; None where it has none. Tower layers keep their place in the file."""
    top = _TOP_EVA if eva else _TOP_CLIP
    if name in top:
        return top[name]
    if name in _HEAD:
        return _HEAD[name]
    for stack, own in zip(_STACKS_EVA if eva else _STACKS_CLIP, _OWN_STACKS, strict=True):
        match = re.fullmatch(rf"{stack}\.(\d+)\.(.+)", name)
        if match:
            return f"{own}.{match[1]}.{_layer_to_own(match[2], eva, own == 'branch.temporal')}"
    return None


def _layer_to_own(name: str, eva: bool, temporal: bool) -> str:
    if temporal:
        name = re.sub(r"^(layer_norm1|norm1)\.", "norm.", name)
        name = name.replace("temporal_fc.", "fc.")
    for pattern, replacement in _LAYER_EVA if eva else _LAYER_CLIP:
        name, changed = re.subn(rf"^{pattern}", replacement, name)
        if changed:
            break
    return name


def _layer_to_reference(own: str, eva: bool) -> str:
    layer, name = own.split(".", 1)
    part, _, rest = name.partition(".")
    if part == "attention":
        if eva:
            rest = rest.replace("qkv_weight", "qkv.weight").replace("out_proj.", "proj.")
        part = "attn" if eva else "self_attn"
    elif part in ("fc1", "fc2"):
        part = f"mlp.{part}"
    elif part == "fc":
        part = "temporal_fc"
    elif part == "norm":
        part = "norm1" if eva else "layer_norm1"
    elif part.startswith("norm") and not eva:
        part = f"layer_{part}"
    return f"{layer}.{part}.{rest}"


def _clip_tensors(clip: nn.Module | str | os.PathLike) -> tuple[str | None, dict[str, Tensor], TowerConfig]:
    """Name, tensors under their published names, and configuration of a Hugging Face CLIP's vision tower."""
    if not isinstance(clip, nn.Module):
        from transformers import CLIPVisionModelWithProjection

        clip = CLIPVisionModelWithProjection.from_pretrained(os.fspath(clip))
    config = getattr(clip.config, "vision_config", clip.config)
    if getattr(config, "model_type", None) != "clip_vision_model":
        raise TypeError(
            f"clip must be a CLIP with a vision tower (model_type 'clip_vision_model'), but is "
            f"{type(clip).__name__} of {getattr(config, 'model_type', None)!r}"
        )
    state = {}
    for name, tensor in (*clip.named_parameters(), *clip.named_buffers()):
        if name.startswith(("text_model.", "text_projection", "logit_scale")) or name.endswith("position_ids"):
            continue
        for part in ("vision_model.", "embeddings.", "encoder."):
            name = name.removeprefix(part)
        state[name] = tensor
    values = {**vars(config)}
    projection = state.get("visual_projection.weight")
    values["projection_dim"] = None if projection is None else projection.shape[0]
    values["model_type"] = "clip_vision_model"
    name = getattr(clip, "name_or_path", "") or None
    return name, state, TowerConfig.of(values)


def _load_tower(model: BTAdapterVisionModel, state: Mapping[str, Tensor], share: bool) -> None:
    """Put the tower tensors (published names) into ``model.tower``; ``share``: the very same parameters."""
    own = {}
    for name, tensor in state.items():
        translated = _to_own(name, False)
        if translated is not None and translated.startswith("tower."):
            own[translated.removeprefix("tower.")] = tensor
        elif not name.startswith("logit"):
            raise CheckpointError(f"unexpected tensor in the CLIP tower: {name}")
    if not share:
        load_exactly(model.tower, own, "the CLIP tower")
        return
    missing = sorted(set(model.tower.state_dict()) - set(own))
    if missing:
        raise CheckpointError(f"the CLIP tower lacks {', '.join(missing)}")
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        setattr(model.tower.get_submodule(path), leaf, parameter.requires_grad_(False))


def _check_same_tower(saved: TowerConfig, found: TowerConfig) -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        if getattr(saved, name) != getattr(found, name):
            raise CheckpointError(
                f"the branch belongs to a tower with {name} {getattr(saved, name)}, but clip has {getattr(found, name)}"
            )


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
