"""A video chat model and its processor written as one folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bt_adapter.chat.attachment import attachment_of
from bt_adapter.errors import CommandError
from bt_adapter.files import replace_folder
from bt_adapter.native.conversion import describe


def save_video_model(model: Any, processor: Any, folder: str | os.PathLike[str], replace: bool = False) -> None:
    """Write a folder that ``AutoModelForImageTextToText`` and ``AutoProcessor`` read, which appears when it is whole.

    Args:
        model: a video chat model. processor: its own.
        folder: one that is not there yet, or empty.
        replace: take the place of a folder that is there, once the new one is whole.

    Raises:
        FileExistsError: the folder has something in it. ValueError: the model has no branch, or holds adapters of PEFT
            that are not merged into its weights. CommandError: the disk has too little space left.
    """
    folder = Path(folder)
    if not replace and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder {folder} is there already: name another one, or remove it first")
    attachment = attachment_of(model)
    chat = attachment.family.chat
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise ValueError(f"{name} holds adapters of PEFT: model.merge_and_unload() puts them into the weights")
    now = attachment.model()
    if now.branch.is_absent:
        raise ValueError("the chat model has no branch to save: attach one, or detach() and save the image chat model")
    chat.config.bt_adapter = describe(now.branch, now.tower_name)  # tuning may have changed what it says of frames
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    _check_space(chat, aside)
    chat.save_pretrained(aside)
    processor.save_pretrained(aside)
    mode = (aside / "config.json").stat().st_mode
    for path in aside.glob("*.safetensors"):
        path.chmod(mode)  # safetensors lets nobody but their owner read its files
    replace_folder(aside, folder)


def _check_space(model: Any, folder: Path) -> None:
    needed = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    free = shutil.disk_usage(folder).free
    if needed > free:
        folder.rmdir()
        raise CommandError(
            f"the model takes {needed / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free in {folder.parent}"
        )
