"""Load published BT-Adapter checkpoints, and convert a model's tensors back to their published names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from bt_adapter.errors import CheckpointError
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import (
    float32_by_default,
    image_settings_of,
    load_exactly,
)
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.gates import fill_gates, find_gates
from bt_adapter.model.published_files import read_tensors, strip_prefixes
from bt_adapter.model.time_steps import published_trained_steps
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.names import (
    HEAD,
    OWN_STACKS,
    RESHAPED,
    STACKS_CLIP,
    STACKS_EVA,
    TOP_CLIP,
    TOP_EVA,
    layer_to_reference,
    pack_qkv,
    to_own,
    unpack_qkv,
)
from bt_adapter.towers.tower import Tower

_HEAD_WIDTH = 64  # of CLIP's towers; EVA-CLIP-g has 88
_EVA_HEADS = {1408: 16}


def load_reference_checkpoint(
    path_or_state_dict: str | os.PathLike | Mapping[str, Tensor],
    vision_config: TowerConfig | Mapping[str, Any] | Any | None = None,
    clip: nn.Module | str | os.PathLike | None = None,
    trained_frames: int | None = None,
    gates_from: str | os.PathLike | Mapping[str, Tensor] | None = None,
    **overrides: Any,
) -> BTAdapterVisionModel:
    """Load a published BT-Adapter checkpoint: a pretraining, chat, stored-features or instruction-tuning file.

    CLIP or EVA, depth, gates and alignment head are inferred from the tensors. Pickles are read with
    ``weights_only=True``. The text encoder's tensors (``text_backbone.``) are ignored.

    Args:
        path_or_state_dict: a ``.safetensors`` file, a torch pickle (``state_dict`` inside or plain), or a dict.
        vision_config: the tower's Hugging Face ``CLIPVisionConfig`` or a dict with its keys. None: inferred from the
            tensors, with heads of width 64 (EVA-CLIP-g: 88); for a stored-features file, which does not determine the
            number of tower layers, ViT-L/14's 24 are assumed.
        clip: the CLIP (see ``BTAdapterVisionModel.from_clip``) for a file with only the branch, such as files of
            instruction tuning. Three branch layers in such a file are assumed to be a branch of depth 4 without its
            last layer, which chat does not run, unless ``depth`` is given.
        trained_frames: number of frames of the training videos. Videos of more frames are averaged down to that many
            time steps (more frames than rows of the time table: in pairs, 100 to 50). None: inferred from the kind of
            file, 8 for pretraining and 100 for instruction tuning. Files for chat and of stored features may come from
            either: all rows of the time table are then assumed to be trained, with a warning.
        gates_from: the pretraining file (or a folder of ``save_pretrained``) from which a file with only the branch was
            tuned. Its gates are used, because tuning neither trains nor stores gates.
        **overrides: fields of :class:`BTAdapterConfig`, for example ``drop_path``. ``merge_gate_slope`` and
            ``output_gate_slope`` set the slopes of the file's gates; None removes a gate.

    Returns:
        The model, in evaluation mode. Each of the two gates is inferred separately. A file with the tower and without a
        gate was trained with a plain sum instead, which the model uses too. A file with only the branch, without gates
        and ``gates_from``, gets half-open gates, with a warning.

    Raises:
        ValueError: ``gates_from`` is given for a file that itself determines its gates.
        CheckpointError: the file is not such a checkpoint, is damaged or an unsafe pickle, holds only the branch and no
            ``clip`` is given, or has names or shapes that do not fit; the message lists them.
        FileNotFoundError: there is no such file.
    """
    tensors = read_tensors(path_or_state_dict)
    state = strip_prefixes(tensors)
    eva, branch_layers, tower_layers, stored = _structure(state)
    chat_only = stored
    fields: dict[str, Any] = {"depth": branch_layers + stored}
    if tower_layers:
        config = _tower_config(state, vision_config, eva, tower_layers, stored)
    else:
        config, tower = _tower_of_clip(clip, eva)
        fields["depth"] = overrides.get("depth", branch_layers + (branch_layers == 3))
        chat_only = fields["depth"] == branch_layers + 1
    time = _tensor(state, "btadapter_position.weight" if eva else "btadapter_time_embed.weight")
    fields.update(max_frames=time.shape[0], alignment_head="extra_proj.0.weight" in state)
    if eva:
        fields.update(merge_gate_slope=None, output_gate_slope=None)
    fields.update(overrides)
    state, missing = find_gates(state, bool(tower_layers), eva, gates_from)
    fields.update(dict.fromkeys(missing))
    if "trained_steps" not in overrides:
        fields["trained_steps"] = published_trained_steps(tensors, not tower_layers, time.shape[0], trained_frames)
    elif trained_frames is not None:
        raise ValueError("trained_frames and trained_steps set the same value: give one of them")
    with float32_by_default():
        model = BTAdapterVisionModel(config, BTAdapterConfig(**fields), stored, chat_only)
    own = {} if tower_layers else {f"tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name, tensor in state.items():
        if name in RESHAPED:
            tensor = tensor.flatten()
        elif name == "pos_embed":
            tensor = tensor[0]
        own[to_own(name, eva) or name] = tensor
    fill_gates(own, model.state_dict())
    load_exactly(model, pack_qkv(own), "the checkpoint")
    if clip is not None and not eva:
        model.images = image_settings_of(clip, config)
    return model.eval()


def read_sizes(source: str | os.PathLike | Mapping[str, Tensor]) -> tuple[TowerConfig | dict[str, Any], int]:
    """Infer the required tower and the depth of the branch from the shapes of a published checkpoint's tensors.

    Returns:
        The tower's configuration if the file holds the tower, else those of its fields that the branch shares; and the
        depth. A file with only three branch layers has depth 4, see :func:`load_reference_checkpoint`.

    Raises:
        CheckpointError, FileNotFoundError: see there.
    """
    state = strip_prefixes(read_tensors(source))
    eva, layers, tower_layers, stored = _structure(state)
    if tower_layers:
        return _tower_config(state, None, eva, tower_layers, stored), layers + stored
    spatial = "btadapter_S.0." if eva else "btadapter_S_layers.0."
    inner, width = _tensor(state, f"{spatial}mlp.fc1.weight").shape
    kind = "eva" if eva else "clip_vision_model"
    return {"hidden_size": width, "intermediate_size": inner, "model_type": kind}, layers + (layers == 3)


def _structure(state: Mapping[str, Tensor]) -> tuple[bool, int, int, bool]:
    """Return whether a checkpoint is EVA's, its numbers of branch and tower layers, and if it has stored features."""
    eva = any(name.startswith(("btadapter_S.", "blocks.")) for name in state)
    stacks = STACKS_EVA if eva else STACKS_CLIP
    branch_layers, tower_layers = _count(state, stacks[1]), _count(state, stacks[0])
    if not branch_layers:
        raise CheckpointError(
            f"no branch layers ({stacks[1]}.*) among {len(state)} tensors: not a BT-Adapter checkpoint"
        )
    stored = tower_layers > 0 and ("cls_token" if eva else "class_embedding") not in state
    return eva, branch_layers, tower_layers, stored


def to_reference_state_dict(model: BTAdapterVisionModel) -> dict[str, Tensor]:
    """Convert a model's tensors to the published names of a chat or stored-features file.

    A pretraining file has the prefix ``backbone.`` on all names except ``extra_proj`` and ``text_backbone``.
    """
    eva = model.vision_config.is_eva
    top = TOP_EVA if eva else TOP_CLIP
    back = {own: name for name, own in {**top, **HEAD}.items()}
    stacks = STACKS_EVA if eva else STACKS_CLIP
    result = {}
    state = model.state_dict() if eva else unpack_qkv(model.state_dict())
    for own, tensor in state.items():
        name = back.get(own, "")
        if not name:
            for own_stack, stack in zip(OWN_STACKS, stacks, strict=True):
                if own.startswith(f"{own_stack}."):
                    name = f"{stack}.{layer_to_reference(own.removeprefix(own_stack + '.'), eva)}"
            if not name:
                raise CheckpointError(f"{own} has no published name: {'EVA' if eva else 'CLIP'} checkpoints lack it")
        elif eva and name == "pos_embed":
            tensor = tensor[None]
        elif name in RESHAPED:
            tensor = tensor.reshape(RESHAPED[name])
        result[name] = tensor
    return result


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise CheckpointError(f"the checkpoint does not fit the model; missing: {name}")
    return state[name]


def _tower_of_clip(clip: nn.Module | str | os.PathLike | None, eva: bool) -> tuple[TowerConfig, Tower]:
    if clip is None or eva:
        raise CheckpointError(
            "the checkpoint holds only the branch, like files of instruction tuning; "
            + ("add the tensors of its EVA-CLIP tower to it" if eva else "give clip=, the CLIP it belongs to")
        )
    model = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=1))
    if model.vision_config.model_type != "clip_vision_model":
        raise CheckpointError(
            f"the checkpoint's branch needs a CLIP, but clip has model_type {model.vision_config.model_type!r}"
        )
    return model.vision_config, model.tower


def _count(state: Mapping[str, Tensor], stack: str) -> int:
    return len({name.split(".")[1] for name in state if name.startswith(f"{stack}.")})


def _tower_config(state: Mapping[str, Tensor], given: Any, eva: bool, tower_layers: int, stored: bool) -> TowerConfig:
    spatial = "btadapter_S.0." if eva else "btadapter_S_layers.0."
    intermediate, width = _tensor(state, f"{spatial}mlp.fc1.weight").shape
    position = _tensor(state, "pos_embed")[0] if eva else _tensor(state, "position_embedding.weight")
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
