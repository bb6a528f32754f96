"""Save a video chat model and its processor as one folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bt_adapter.chat.families.attachment import attachment_of
from bt_adapter.chat.native.conversion import describe
from bt_adapter.errors import CommandError
from bt_adapter.files import remove_unfinished, writing


def save_video_model(model: Any, processor: Any, folder: str | os.PathLike[str], replace: bool = False) -> None:
    """Write a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` read; it is renamed when complete.

    Args:
        model: a video chat model. processor: its processor.
        folder: must not exist, or be empty.
        replace: replace an existing folder when the new one is complete.

    Raises:
        FileExistsError: the folder is not empty. ValueError: the model has no branch, or has PEFT adapters that are not
            merged into its weights. CommandError: the disk has too little free space.
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} already exists: choose another one, or remove it first")
    attachment = attachment_of(model)
    chat = attachment.family.chat
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise ValueError(f"{name} has PEFT adapters: merge them into the weights by model.merge_and_unload()")
    now = attachment.model()
    if now.branch.is_absent:
        raise ValueError("the chat model has no branch to save: attach one, or detach() and save the image chat model")
    chat.config.bt_adapter = describe(now.branch, now.tower_name)  # tuning may have changed trained_steps
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent, folder.name)
    _check_space(chat, folder.parent)
    with writing(folder) as temporary:
        chat.save_pretrained(temporary)
        processor.save_pretrained(temporary)
        mode = (temporary / "config.json").stat().st_mode
        for path in temporary.glob("*.safetensors"):
            path.chmod(mode)  # safetensors lets only the owner read its files


def _check_space(model: Any, folder: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CommandError(f"the model needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in {folder}")
