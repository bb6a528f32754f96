"""Load and save weights: towers from Hugging Face's CLIP, and our own folders. (Published files: ``published.py``.)"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bt_adapter.data.image_settings import ImageSettings, read_image_settings
from bt_adapter.errors import CheckpointError as CheckpointError
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.time_steps import read_branch_config
from bt_adapter.towers import open_clip
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.hugging_face import is_hub_name, locate_branch
from bt_adapter.towers.image_models import FoundTower, load_image_model, read_tower
from bt_adapter.towers.names import pack_qkv

_FORMAT = 1


def model_from_clip(
    clip: nn.Module | str | os.PathLike, adapter_config: BTAdapterConfig | None = None, share: bool = False
) -> BTAdapterVisionModel:
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
        model = BTAdapterVisionModel(found.config, adapter_config)
    _load_tower(model, found, share)
    model.tower_name, model.images = found.name, image_settings_of(clip, found.config)
    model.reset_spatial_layers()
    return model


def save_model(
    model: BTAdapterVisionModel,
    folder: str | os.PathLike,
    include_tower: bool = False,
    dtype: torch.dtype | None = None,
    branch: Mapping[str, Tensor] | None = None,
) -> None:
    """Write ``config.json`` and ``model.safetensors``, each to a temporary name and then renamed.

    Only the name of the frozen tower is stored, unless ``include_tower``. ``dtype`` casts the written tensors.
    ``branch``: tensors to write instead of the branch's (which may be sharded over processes), such as averages.

    Raises:
        ValueError: ``include_tower`` is True for a tower in 8 bits, or for a chat model's tower without its last layer:
            neither has all weights.
    """
    if include_tower and model.tower.is_fp8:
        raise ValueError("include_tower must be False for a tower in 8 bits (optimize(fp8=True)), but is True")
    layers = model.vision_config.num_hidden_layers
    if include_tower and not model.stored_features and len(model.tower.layers) < layers:
        raise ValueError("include_tower must be False where a chat model's tower lacks its last layer, but is True")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t for n, t in model.state_dict().items() if include_tower or n.startswith("branch.")}
    tensors.update({f"branch.{name}": tensor for name, tensor in (branch or {}).items()})
    state = {name: t.detach().to(dtype=dtype, device="cpu").contiguous() for name, t in tensors.items()}
    config = {
        "format": _FORMAT,
        "tower_name": model.tower_name,
        "includes_tower": include_tower,
        "stored_features": model.stored_features,
        "chat_only": len(model.branch.temporal) < model.config.depth,
        "tower_fingerprint": model.tower.fingerprint(),
        "tower": model.vision_config.to_dict(),
        "images": model.images.at(model.vision_config.image_size).to_dict(),
        "branch": model.config.to_dict(),
    }
    weights, settings = folder / "model.safetensors", folder / "config.json"
    # not save_file, whose files only the owner may read
    Path(f"{weights}.writing").write_bytes(save(state, metadata={"format": "pt"}))
    Path(f"{settings}.writing").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    to_disk(f"{weights}.writing", f"{settings}.writing")
    os.replace(f"{weights}.writing", weights)
    os.replace(f"{settings}.writing", settings)
    to_disk(folder)


def image_settings_of(clip: nn.Module | str | os.PathLike, config: TowerConfig) -> ImageSettings:
    """Read the settings of a CLIP's image processor; for a module, from the place it was loaded from, if known."""
    if isinstance(clip, (str, os.PathLike)):
        return read_image_settings(clip, config.image_size)
    if isinstance(found := getattr(clip, "image_settings", None), ImageSettings):  # of this package's loaders
        return found
    if open_clip.is_model(clip):
        return open_clip.image_settings(clip)
    place = getattr(clip, "name_or_path", None)
    return read_image_settings(place, config.image_size, local=True) if place else ImageSettings(config.image_size)


def _stored_images(folder: Path, settings: Mapping[str, Any], clip: Any, config: TowerConfig) -> ImageSettings:
    """Return the image settings of the branch's training or, for folders without them, of its CLIP's processor."""
    theirs = None if clip is None else image_settings_of(clip, config)
    if (stored := settings.get("images")) is None:
        return theirs or ImageSettings(config.image_size)
    mine = ImageSettings.of_dict(stored).at(config.image_size)
    if theirs is not None and theirs != mine:
        warnings.warn(
            f"the branch in {folder} was trained on pictures prepared by {mine}, but its CLIP's image processor has "
            f"{theirs}; the branch's settings are used",
            stacklevel=3,
        )
    return mine


@contextmanager
def float32_by_default() -> Iterator[None]:
    """Set the default dtype to float32 within the context, whatever the program's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def to_disk(*paths: str | os.PathLike) -> None:
    """Flush these files, or the entries of these folders, to disk (fsync).

    Call it before a rename: otherwise a crash of the machine may keep the new name but lose the content.
    """
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_model(
    folder: str | os.PathLike, clip: nn.Module | str | os.PathLike | None = None, share: bool = False
) -> BTAdapterVisionModel:
    """Load a folder written by :func:`save_model`; the model is in evaluation mode, float32 unless the tower is shared.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or the hub name of one (owner/name).
        clip: the branch's image model, if the folder holds only the branch: see :func:`model_from_clip`; None: the one
            named in the folder. With a tower without a projection (of a chat model, a DINOv2) only ``video_tokens``
            works.
        share: use the image model's own parameters, as in :func:`model_from_clip`.

    Raises:
        FileNotFoundError: a file is missing.
        CheckpointError: a file is damaged, names or shapes do not fit, the CLIP is a different one, or none is known.
    """
    folder = locate_branch(folder) if is_hub_name(folder) else Path(folder)
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
    chat_only = settings.get("chat_only", False)
    with float32_by_default():
        model = BTAdapterVisionModel(config, adapter_config, settings["stored_features"], chat_only)
    model.tower_name = name
    model.images = _stored_images(folder, settings, clip, config)
    if found is not None:
        _load_tower(model, found, share)
        check_fingerprint(model, settings.get("tower_fingerprint"), folder)
        state.update({f"tower.{n}": t for n, t in model.tower.state_dict().items()})
    load_exactly(model, state, str(folder))
    return model.eval()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file. Raises CheckpointError if it is not a complete safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def name_of_tower(branch: str | os.PathLike) -> str | None:
    """Return the name of the CLIP stored with a branch; None if there is none, or for a published file.

    Raises:
        FileNotFoundError, CheckpointError: the branch is missing or damaged.
    """
    folder = locate_branch(branch) if is_hub_name(branch) else Path(branch)
    if not folder.exists():
        raise FileNotFoundError(f"no checkpoint at {folder}")
    return read_settings(folder)["tower_name"] if folder.is_dir() else None


def read_settings(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a saved branch. Raises FileNotFoundError, CheckpointError."""
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} has no {file}: not a saved BT-Adapter branch")
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{folder}/config.json is damaged: {error}") from error
    if settings.get("format") != _FORMAT:
        raise CheckpointError(f"{folder}/config.json has format {settings.get('format')!r}, expected {_FORMAT}")
    return settings


def check_fingerprint(model: BTAdapterVisionModel, saved: dict[str, float] | None, folder: Path) -> None:
    """Raise a CheckpointError if the tower differs, beyond half precision, from that of the branch's training."""
    for name, value in model.tower.fingerprint().items():
        before = (saved or {}).get(name, value)
        if abs(before - value) > 1e-2 * abs(before):
            raise CheckpointError(
                f"the branch in {folder} was trained with another CLIP of the same shape: the norm of {name} is "
                f"{value:.4g}, expected {before:.4g}"
            )


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load ``state`` into ``module``; all names and shapes must match.

    Raises:
        CheckpointError: listing every name that does not fit.
    """
    check_fit(module, state, source)
    module.load_state_dict(state)


def check_fit(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Raise a CheckpointError that lists every name and shape of ``state`` that does not match ``module``."""
    expected = module.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(state))
        if state[name].shape != expected[name].shape
    ]
    parts = [
        f"{what}: {', '.join(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", shapes))
        if names
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit the model; {'; '.join(parts)}")


def _loaded(clip: nn.Module | str | os.PathLike) -> nn.Module:
    return load_image_model(clip) if isinstance(clip, (str, os.PathLike)) else clip


def _load_tower(model: BTAdapterVisionModel, found: FoundTower, share: bool) -> None:
    """Load the tensors of an image model's tower into ``model.tower``; ``share``: use the same parameters."""
    if not share:
        load_exactly(model.tower, found.tensors, "the tower of clip")
        return
    if scaled := found.changed - {"position"}:
        raise ValueError(
            f"share must be False for this tower (model_type {found.config.model_type!r}), as {len(scaled)} of its "
            "tensors differ from those of clip, but is True"
        )
    check_fit(model.tower, found.tensors, "the tower of clip")
    for name, tensor in found.tensors.items():
        path, _, leaf = name.rpartition(".")
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        setattr(model.tower.get_submodule(path), leaf, parameter.requires_grad_(False))
