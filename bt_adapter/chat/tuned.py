"""Load chat models by name: stages of the small stack, folders of tuning runs, and models that transformers loads."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bt_adapter.chat.attach import attach, attached_branch
from bt_adapter.chat.families import family_of
from bt_adapter.chat.loading import LoadOptions, load_with_branch
from bt_adapter.chat.model_folders import TUNED, is_tuned, mini_stage
from bt_adapter.errors import CheckpointError
from bt_adapter.mini import weights_folder
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import load_exactly, read_safetensors
from bt_adapter.towers.image_models import load_image_model

FORMAT = 1  # of tuned.json
FILES = {
    "projector": "projector.safetensors",
    "branch": "branch/model.safetensors",
    "lora": "lora/adapter_model.safetensors",
}


def load_by_name(
    name: str | os.PathLike[str], branch: str | os.PathLike[str] | None, options: LoadOptions
) -> tuple[Any, Any]:
    """Load a chat model with a branch by its name.

    Args:
        name: "mini" or "mini:<stage>" for the small one, else as for ``VideoChat.load``.
        branch: None: mini's own, or, where ``name`` is a tuned folder, that one's. With ``use_branch=False`` the model
            may have no branch.

    Returns:
        The model and its processor or tokenizer, from which ``VideoChat`` is made.
    """
    stage = mini_stage(name)
    if stage is None:
        return load_saved(name, branch, options)
    if options.quantize is not None:
        raise ValueError(f"quantize must be None for {name}, but is {options.quantize!r}")
    options = replace(options, dtype=options.dtype or torch.float32)
    if stage == "fresh":
        return _load_fresh(branch, options)
    return load_tuned(weights_folder(stage), None, branch, options)


def load_saved(
    name: str | os.PathLike[str], branch: str | os.PathLike[str] | None, options: LoadOptions
) -> tuple[Any, Any]:
    """Load a chat model of a folder or hub name: see ``VideoChat.load``. Returns as `load_by_name`."""
    if is_tuned(name):
        return load_tuned(name, None, branch, options)
    return load_with_branch(name, branch, options)


def _load_fresh(branch: str | os.PathLike[str] | None, options: LoadOptions) -> tuple[Any, Any]:
    """Make the small stack before tuning: its CLIP and language model, joined by a fresh projector."""
    from bt_adapter.mini.language import load_language_model
    from bt_adapter.mini.llava import make_llava

    if branch is None and options.use_branch:
        branch = weights_folder("branch")
    clip: Any = load_image_model("mini").requires_grad_(False)
    model, tokenizer = make_llava(clip, *load_language_model())
    attach(model, branch, options.require_same_tower)
    return model.to(device=options.device, dtype=options.dtype), tokenizer


def load_tuned(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | nn.Module | None,
    branch: str | os.PathLike[str] | None,
    options: LoadOptions,
) -> tuple[Any, Any]:
    """Load the chat model that a tuning run made. Adapters are merged into it unless it is quantised.

    Args:
        folder, branch: see `bt_adapter.tune.load`, also for the errors.
        model: the chat model it was tuned from, modified if it is a loaded one; None: the one ``tuned.json`` names.

    Returns:
        The model and its processor or tokenizer, which is None for a loaded ``model``.
    """
    folder = Path(folder)
    about = _read_about(folder)
    parts, recipe = about["parts"], about["recipe"]
    check_files(folder, parts)
    own = folder / "branch" if "branch" in parts and branch is None else None
    other = branch or about["branch"]["source"]
    # in old runs it is "other_tower", the opposite
    same_tower = recipe.get("require_same_tower", not recipe.get("other_tower", False))
    use_branch = recipe.get("use_branch", True)
    options = replace(
        options,
        require_same_tower=options.require_same_tower and same_tower,
        use_branch=options.use_branch and use_branch,
    )
    chat: Any
    if isinstance(model, nn.Module):
        chat, processor, attached_later = model, None, own or other
    else:
        name = about["model"] if model is None else model
        attached_later = own if is_tuned(name) else None  # a tuned folder may hold an older branch
        try:
            chat, processor = load_by_name(name, other if attached_later else own or other, options)
        except OSError as error:
            raise FileNotFoundError(
                f"{folder} was tuned from the chat model {about['model']} and the branch {about['branch']['source']}, "
                f"and needs them: {error}. Give model= (and branch=) if they are elsewhere"
            ) from error
    if attached_later is not None:
        attach(chat, attached_later, options.require_same_tower)
    if "branch" not in parts and about["branch"]["fingerprint"] is not None and other is not None:
        _check_branch(folder, chat, about["branch"]["fingerprint"])
    if not use_branch:
        family_of(chat).home.config.use_branch = branch is not None  # a branch named now is used
    if "projector" in parts:
        load_exactly(projector_of(chat), read_safetensors(folder / FILES["projector"]), str(folder))
    if "lora" in parts:
        _load_adapters(chat, folder / "lora", merge=options.quantize is None)
    return chat, processor


def projector_of(chat: Any) -> nn.Module:
    """Return the projector of visual tokens to the language model's width, or the linear layer after a Q-Former."""
    inner = getattr(chat, "model", chat)
    for name in ("multi_modal_projector", "language_projection"):
        for owner in (inner, chat):
            if isinstance(found := getattr(owner, name, None), nn.Module):
                return found
    raise TypeError(f"chat must have a projector, but {type(chat).__name__} has none")


def branch_fingerprint(model: BTAdapterVisionModel) -> dict[str, float] | None:
    """Compute norms of some of a branch's weights, which identify it in any dtype; None: there is no branch."""
    if model.branch.is_absent:
        return None
    weights = dict(model.branch.named_parameters())
    layers = ("temporal.0.fc.weight", "temporal.0.attention.out_proj.weight", "spatial.0.fc1.weight")
    chosen = ("cls_token", "time", *layers)
    return {name: weights[name].detach().float().norm().item() for name in chosen if name in weights}


def check_files(folder: Path, parts: Sequence[str]) -> None:
    """Raise a CheckpointError that names the missing files of a tuned folder."""
    if lacking := [FILES[part] for part in parts if not (folder / FILES[part]).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(lacking)} of the parts it was tuned in: {', '.join(parts)}")


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / TUNED).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{folder} has no {TUNED}: not what a tuning run writes ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{TUNED} is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/{TUNED} has format {about.get('format')!r}, expected {FORMAT}")
    return about


def _check_branch(folder: Path, chat: Any, stored: dict[str, float]) -> None:
    """Raise CheckpointError unless the branch, which was frozen, is the one the model was tuned with."""
    found = branch_fingerprint(attached_branch(chat)) or {}
    wrong = [
        f"the length of {name} is {found.get(name)}, expected {value:.4g}"
        for name, value in stored.items()
        if name not in found or abs(found[name] - value) > 1e-2 * abs(value) + 1e-6
    ]
    if wrong:
        raise CheckpointError(f"{folder} was tuned with another branch: {'; '.join(wrong)}. Give branch=")


def _load_adapters(chat: Any, folder: Path, merge: bool) -> None:
    """Load the adapters of a PEFT folder; ``merge``: into the weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise FileNotFoundError(f"{folder} holds adapters: pip install 'bt-adapter[chat]'") from error
    model = family_of(chat).chat
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}  # PEFT freezes all of them
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # which PEFT reads
            adapters = PeftModel.from_pretrained(model, os.fspath(folder))
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        raise CheckpointError(f"the adapters in {folder} do not fit the chat model: {error}") from error
    for parameter, before in asked.items():
        parameter.requires_grad_(before)
    if merge:
        adapters.merge_and_unload()
    chat.eval()
