"""Read and write the folders of saved branches, and check that tensors fit a module. (Published files: `published`.)"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bt_adapter.data.image_settings import ImageSettings, read_image_settings
from bt_adapter.errors import CheckpointError
from bt_adapter.files import write_bytes, write_json
from bt_adapter.towers import open_clip
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.hugging_face import branch_path
from bt_adapter.towers.image_models import FoundTower
from bt_adapter.towers.tower import Tower

_FORMAT = 1


def write_folder(
    folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any], dtype: torch.dtype | None = None
) -> None:
    """Write tensors and settings as a saved branch; each file gets a temporary name first and is then renamed.

    Args:
        folder: created if missing.
        tensors: by name; unsharded.
        settings: the content of ``config.json`` except its format.
        dtype: dtype of the written tensors; None: unchanged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: t.detach().to(dtype=dtype, device="cpu").contiguous() for name, t in tensors.items()}
    # not save_file, whose files only the owner may read
    write_bytes(folder / "model.safetensors", save(state, metadata={"format": "pt"}), flush=True)
    write_json(folder / "config.json", {"format": _FORMAT, **settings}, flush=True)


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


def stored_image_settings(folder: Path, settings: Mapping[str, Any], clip: Any, config: TowerConfig) -> ImageSettings:
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
    folder = branch_path(branch)
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


def check_fingerprint(tower: Tower, saved: dict[str, float] | None, folder: Path) -> None:
    """Raise a CheckpointError if the tower differs, beyond half precision, from that of the branch's training."""
    for name, value in tower.fingerprint().items():
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


def load_tower(tower: Tower, found: FoundTower, share: bool) -> None:
    """Load the tensors of an image model's tower into ``tower``; ``share``: use the same parameters."""
    if not share:
        load_exactly(tower, found.tensors, "the tower of clip")
        return
    if scaled := found.changed - {"position"}:
        raise ValueError(
            f"share must be False for this tower (model_type {found.config.model_type!r}), as {len(scaled)} of its "
            "tensors differ from those of clip, but is True"
        )
    check_fit(tower, found.tensors, "the tower of clip")
    for name, tensor in found.tensors.items():
        path, _, leaf = name.rpartition(".")
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        setattr(tower.get_submodule(path), leaf, parameter.requires_grad_(False))
