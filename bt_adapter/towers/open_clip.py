"""Loads models of open_clip (package ``open_clip_torch``, extra ``[open-clip]``): LAION's, DataComp's, EVA01-CLIP-g.

Names: ``open_clip:MODEL/WEIGHTS`` such as ``open_clip:ViT-L-14/laion2b_s32b_b82k`` (WEIGHTS may be a file); a hub
repository such as ``open_clip:hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K``; a folder with ``open_clip_config.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.towers.clip import name_of
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.found import FoundTower
from bt_adapter.towers.names import rename, to_own

PREFIX = "open_clip:"
_CONFIG = "open_clip_config.json"
_HUB = "hf-hub:"
# open_clip's name (regex) in its VisionTransformer → this package's name.
_NAMES = [
    (r"conv1\.weight", "patch_embedding.weight"),
    (r"positional_embedding", "position"),
    (r"ln_pre\.", "pre_norm."),
    (r"ln_post\.", "final_norm."),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"layers.\1.norm\2."),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"layers.\1.attention.out_proj."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"layers.\1.fc1."),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"layers.\1.fc2."),
]
_PACKED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def is_name(name: str) -> bool:
    """Tell whether a name refers to a model of open_clip; a folder that transformers can load does not."""
    folder = Path(name).expanduser()
    return name.startswith(PREFIX) or (folder / _CONFIG).is_file() and not (folder / "config.json").is_file()


def is_model(module: nn.Module) -> bool:
    """Tell whether a module is a model of open_clip with an image tower."""
    return any(kind.__module__.partition(".")[0] == "open_clip" for kind in type(module).__mro__) and hasattr(
        module, "visual"
    )


def load(name: str) -> Any:
    """Load a model by name, float32, in evaluation mode, with ``name_or_path`` and ``image_settings`` set.

    Raises:
        CommandError: open_clip is not installed.
        FileNotFoundError: the folder lacks open_clip's configuration.
        CheckpointError: open_clip does not know the model or weights, they do not fit, or it cannot be a tower.
    """
    place = name.removeprefix(PREFIX)
    package = _package(name)
    model_name, weights = _parts(place, package)
    try:
        model: Any = package.create_model(model_name, pretrained=weights, precision="fp32", require_pretrained=True)
    except (RuntimeError, ValueError, OSError, AssertionError) as error:
        raise CheckpointError(f"{name}: open_clip cannot load it: {error}") from error
    model.name_or_path = name
    model.image_settings = image_settings(model)
    read(model)  # raises here if the model cannot be the tower
    return model.eval()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model by the model's name; errors as for :func:`load`."""
    package = _package(name)
    return package.get_tokenizer(_parts(name.removeprefix(PREFIX), package)[0])


def read(model: Any) -> FoundTower:
    """Read the tower of a model of open_clip; see ``read_tower``.

    Raises:
        CheckpointError: the image tower is neither a plain vision transformer with a CLS nor EVA01-CLIP's.
    """
    visual = model.visual
    trunk = getattr(visual, "trunk", None)
    state = dict((visual if trunk is None else trunk).named_parameters(remove_duplicate=False))
    if trunk is None:
        config, tensors = _clip_config(visual), clip_tensors(state)
    else:
        config, tensors = _eva_config(visual), eva_tensors(state)
    return FoundTower(name_of(model), tensors, config)


def clip_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of open_clip's ``VisionTransformer`` to this package's names; views where shapes differ."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _PACKED.fullmatch(name):
            for part, piece in zip("qkv", tensor.detach().chunk(3), strict=True):
                tensors[f"layers.{match[1]}.attention.{part}_proj.{match[2]}"] = piece
        elif name == "proj":
            tensors["projection.weight"] = tensor.detach().T
        else:
            tensors[rename(name, _NAMES)] = tensor
    return tensors


def eva_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of timm's ``Eva``, named as in published EVA checkpoints, to this package's names."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new_name = (to_own(name, True) or name).removeprefix("tower.")
        if new_name == "class_embedding":
            tensor = tensor.detach().flatten()
        elif new_name == "position":
            tensor = tensor.detach()[0]
        tensors[new_name] = tensor
    return tensors


def image_settings(model: Any) -> ImageSettings:
    """Read how the model's evaluation transform resizes, crops and normalises pictures.

    Raises:
        CheckpointError: it pads pictures to a square (resize_mode "longest"), which is not supported.
    """
    size = _square(model.visual.image_size, "image_size")
    values: dict[str, Any] = getattr(model.visual, "preprocess_cfg", None) or {}
    mode = values.get("resize_mode", "shortest")
    if mode not in ("shortest", "squash"):
        raise CheckpointError(
            f"{name_of(model) or 'clip'}: resize_mode is {mode!r}, expected 'shortest' (crop) or 'squash' (stretch)"
        )
    plain = ImageSettings(size)
    interpolation = values.get("interpolation", "bicubic")
    return ImageSettings(
        size,
        (size, size) if mode == "squash" else None,
        "bilinear" if interpolation == "bilinear" else "bicubic",
        tuple(map(float, values.get("mean") or plain.mean)),
        tuple(map(float, values.get("std") or plain.std)),
    )


def _clip_config(visual: Any) -> TowerConfig:
    if type(visual).__name__ != "VisionTransformer":
        raise _refused(f"its image tower is a {type(visual).__name__}")
    pool = getattr(visual, "pool_type", "tok")
    if visual.attn_pool is not None or pool != "tok":
        raise _refused(f"it pools all tokens of a picture ({pool!r} or by attention) instead of taking the CLS")
    layers = list(visual.transformer.resblocks)
    layer = layers[0]
    if type(layer).__name__ != "ResidualAttentionBlock" or type(layer.attn) is not nn.MultiheadAttention:
        raise _refused(f"its layers are a {type(layer).__name__} with a {type(layer.attn).__name__}")
    act = layer.mlp.gelu
    return TowerConfig(
        hidden_size=visual.conv1.out_channels,
        intermediate_size=layer.mlp.c_fc.out_features,
        num_hidden_layers=len(layers),
        num_attention_heads=layer.attn.num_heads,
        image_size=_square(visual.image_size, "image_size"),
        patch_size=_square(visual.patch_size, "patch_size"),
        projection_dim=None if visual.proj is None else visual.proj.shape[1],
        hidden_act="quick_gelu" if type(act).__name__ == "QuickGELU" else _gelu(act),
        layer_norm_eps=_epsilon(visual),
    )


def _eva_config(visual: Any) -> TowerConfig:
    trunk = visual.trunk
    if type(trunk).__name__ != "Eva":
        hint = "; take a SigLIP from Hugging Face" if getattr(trunk, "global_pool", None) == "map" else ""
        raise _refused(f"its image tower is timm's {type(trunk).__name__}{hint}")
    if getattr(trunk, "rope", None) is not None:
        raise _refused("its image tower has rotary position embeddings (EVA02)")
    if trunk.global_pool != "token" or trunk.num_prefix_tokens != 1 or len(visual.head):
        raise _refused("its image tower does not take its embedding from a single CLS")
    layer = trunk.blocks[0]
    if type(layer).__name__ != "EvaBlock" or layer.mlp.fc1.out_features == 0:
        raise _refused(f"its layers are a {type(layer).__name__}")
    head = trunk.head
    return TowerConfig(
        hidden_size=trunk.embed_dim,
        intermediate_size=layer.mlp.fc1.out_features,
        num_hidden_layers=len(trunk.blocks),
        num_attention_heads=layer.attn.num_heads,
        image_size=_square(visual.image_size, "image_size"),
        patch_size=_square(trunk.patch_embed.patch_size, "patch_size"),
        projection_dim=head.out_features if isinstance(head, nn.Linear) else None,
        hidden_act=_gelu(layer.mlp.act),
        layer_norm_eps=_epsilon(trunk),
        model_type="eva",
    )


def _gelu(act: Any) -> str:
    """Return the configuration's name of a GELU module of torch or timm."""
    if "GELU" not in type(act).__name__ or "Quick" in type(act).__name__:
        raise _refused(f"its activation is a {type(act).__name__}")
    is_tanh = getattr(act, "approximate", "none") == "tanh" or "Tanh" in type(act).__name__
    return "gelu_pytorch_tanh" if is_tanh else "gelu"


def _epsilon(tower: Any) -> float:
    """Return the epsilon that all LayerNorms share."""
    found = {part.eps for part in tower.modules() if isinstance(part, nn.LayerNorm)}
    if len(found) != 1:
        raise _refused(f"its LayerNorms have {len(found)} different epsilons")
    return found.pop()


def _square(size: Any, name: str) -> int:
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    if height != width:
        raise _refused(f"its {name} is {height} x {width}, not square")
    return int(height)


def _refused(reason: str) -> CheckpointError:
    return CheckpointError(
        f"this model of open_clip cannot be the tower: {reason}. Use a vision transformer with a CLS (ViT-*) or "
        "EVA01-g-14"
    )


def _parts(place: str, package: Any) -> tuple[str, str | None]:
    """Split a name into open_clip's names of the model and of the weights (None: in the model's name)."""
    folder = Path(place).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return f"local-dir:{folder}", None
    if place.startswith(_HUB):
        return place, None
    model, _, weights = place.partition("/")
    if model not in package.list_models():
        raise CheckpointError(
            f"{PREFIX}{place}: open_clip has no model {model!r}, and there is no such folder; expected "
            f"{PREFIX}MODEL/WEIGHTS with a MODEL of open_clip.list_models(), {PREFIX}{_HUB}OWNER/NAME or a folder"
        )
    tags = package.list_pretrained_tags_by_model(model)
    if weights not in tags and not os.path.isfile(weights):
        raise CheckpointError(
            f"{PREFIX}{place}: {model} has no weights {weights!r}; expected a file or one of "
            f"{', '.join(tags) or 'none'}"
        )
    return model, weights


def _check_folder(folder: Path) -> None:
    if not (folder / _CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}, so it is not a folder of open_clip")
    try:
        json.loads((folder / _CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{_CONFIG} is damaged or holds no model_cfg: {error!r}") from error


def _package(name: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise CommandError(
            f"{name} is a model of open_clip, which is not installed or cannot be imported ({error}); run "
            "pip install 'bt-adapter[open-clip]'"
        ) from error
    return open_clip
