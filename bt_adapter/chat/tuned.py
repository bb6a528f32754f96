"""Loading of chat models by name, and of the parts that a tuning run trained."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

from bt_adapter.chat.attach import attach, attached_branch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.model_folders import mini_stage
from bt_adapter.errors import CheckpointError
from bt_adapter.mini import weights_folder
from bt_adapter.model.checkpoint import load_exactly, read_safetensors
from bt_adapter.tune import ABOUT, is_tuned
from bt_adapter.tune.parts import FILES, FORMAT, branch_fingerprint, check_files, projector_of
from bt_adapter.tune.recipe import TuneRecipe


def load_base(
    name: str | os.PathLike[str],
    branch: str | os.PathLike[str] | None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoChat:
    """Load a chat model with a branch by its name.

    Args:
        name: "mini" or "mini:<stage>" for the small one, else as for ``VideoChat.load``.
        branch: None: mini's own, or, where ``name`` is a tuned folder, that one's.
        device, dtype, options: as there. With ``use_branch=False`` the model may have no branch.
    """
    stage = mini_stage(name)
    if stage is None:
        return VideoChat.load(name, branch, device, dtype, **options)
    if options.get("quantize") is not None:
        raise ValueError(f"quantize must be None for {name}, but is {options['quantize']!r}")
    dtype = dtype or torch.float32
    if stage == "fresh":
        return _load_fresh(branch, device, dtype, **options)
    return load_tuned(weights_folder(stage), None, branch, device, dtype, **options)


def _load_fresh(
    branch: str | os.PathLike[str] | None,
    device: str,
    dtype: torch.dtype,
    use_branch: bool = True,
    require_same_tower: bool = True,
    **_: Any,
) -> VideoChat:
    """Make the small stack before tuning: its CLIP and language model, joined by a fresh projector."""
    from bt_adapter.mini.clip import load_clip
    from bt_adapter.mini.language import load_language_model
    from bt_adapter.mini.llava import make_llava

    if branch is None and use_branch:
        branch = weights_folder("branch")
    model, tokenizer = make_llava(load_clip()[0].requires_grad_(False), *load_language_model())
    attach(model, branch, require_same_tower)
    return VideoChat(model.to(device=device, dtype=dtype), tokenizer)


def load_tuned(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | VideoChat | None,
    branch: str | os.PathLike[str] | None,
    device: str,
    dtype: torch.dtype | None,
    **options: Any,
) -> VideoChat:
    """See :func:`bt_adapter.tune.load`."""
    folder = Path(folder)
    about = _read_about(folder)
    parts = about["parts"]
    check_files(folder, parts)
    own = folder / "branch" if "branch" in parts and branch is None else None
    other = branch or about["branch"]["source"]
    if not about["recipe"].get("require_same_tower", True):  # another tower was allowed when it was tuned
        options["require_same_tower"] = False
    if not about["recipe"].get("use_branch", True):
        options["use_branch"] = False
    same = options.get("require_same_tower", True)
    if isinstance(model, VideoChat):
        chat = model
        if (source := own or other) is not None:
            attach(chat.model, source, same)
    else:
        name = about["model"] if model is None else model
        try:
            if own is not None and is_tuned(name):  # which may hold an older branch
                chat = load_base(name, other, device, dtype, **options)
                attach(chat.model, own, same)
            else:
                chat = load_base(name, own or other, device, dtype, **options)
        except OSError as error:
            raise FileNotFoundError(
                f"{folder} was tuned from the chat model {about['model']} and the branch {about['branch']['source']}, "
                f"and needs them: {error}. Give model= (and branch=) if they are elsewhere"
            ) from error
    if "branch" not in parts and about["branch"]["fingerprint"] is not None and other is not None:
        _check_branch(folder, chat, about["branch"]["fingerprint"])
    if not about["recipe"].get("use_branch", True):
        chat.family.home.config.use_branch = branch is not None  # a branch named now is used
    if "projector" in parts:
        load_exactly(projector_of(chat.model), read_safetensors(folder / FILES["projector"]), str(folder))
    if "lora" in parts:
        _load_adapters(chat, folder / "lora", merge=options.get("quantize") is None)
    return chat


def _read_about(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"{folder} has no {ABOUT}: not what a tuning run writes ({error})") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}/{ABOUT} is damaged: {error}") from error
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/{ABOUT} has format {about.get('format')!r}, expected {FORMAT}")
    return about | {"recipe": TuneRecipe.rename_stored(about["recipe"])}


def _check_branch(folder: Path, chat: VideoChat, stored: dict[str, float]) -> None:
    """Raise CheckpointError unless the branch, which was frozen, is the one the model was tuned with."""
    found = branch_fingerprint(attached_branch(chat.model)) or {}
    wrong = [
        f"the length of {name} is {found.get(name)}, expected {value:.4g}"
        for name, value in stored.items()
        if name not in found or abs(found[name] - value) > 1e-2 * abs(value) + 1e-6
    ]
    if wrong:
        raise CheckpointError(f"{folder} was tuned with another branch: {'; '.join(wrong)}. Give branch=")


def _load_adapters(chat: VideoChat, folder: Path, merge: bool) -> None:
    """Load the adapters of a PEFT folder; ``merge``: into the weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise FileNotFoundError(f"{folder} holds adapters: pip install 'bt-adapter[chat]'") from error
    model = chat.family.chat
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
    chat.model.eval()
