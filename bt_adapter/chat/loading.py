"""An image chat model from a folder or the hub: checked against its branch first, then loaded whole."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from bt_adapter.chat.attach import attach
from bt_adapter.chat.branch_files import check_branch
from bt_adapter.chat.families import FAMILIES, Family, family_of
from bt_adapter.chat.quantize import Quantize, quantization
from bt_adapter.hugging_face import check_place, load_pretrained, locate_branch


def load_with_branch(
    name: str | os.PathLike[str],
    branch: str | os.PathLike[str],
    device: str,
    dtype: torch.dtype | None,
    quantize: Quantize | None,
    require_same_tower: bool,
) -> tuple[Any, Any, Any, Any]:
    """A chat model with its branch attached, its tokenizer, image processor or None, and Q-Former's tokenizer or None.

    What configurations tell is told before any weights are read: that the model is of another kind, that its tower is
    no CLIP, and that the branch belongs to a tower of other sizes.

    Raises:
        ValueError: one of these. QuantizeError: the package that quantizes is not installed.
        ImportError: the model's processor needs a package that is not installed.
        CheckpointError, OSError: as `load_pretrained`; as `attach` for the branch.
    """
    name = check_place(name)
    family = read_skeleton(name)
    place = locate_branch(branch)
    check_branch(place, family, require_same_tower)
    tokenizer, images, questions = read_processors(name)
    options: dict[str, Any] = {}
    if quantize is not None:
        kept = names_outside_language_model(family)
        options = {"quantization_config": quantization(quantize, kept), "device_map": {"": device}}
    chat = load_pretrained(family.model_class, name, dtype, **options)
    if quantize is None:
        chat = chat.to(device)
    return attach(chat, place, require_same_tower), tokenizer, images, questions


def read_skeleton(name: str) -> Family:
    """The chat model of a folder or hub name without its weights (on the meta device), read off its ``config.json``.

    Raises:
        ValueError: the model is of a kind that takes no branch, or its tower is no CLIP.
    """
    config = AutoConfig.from_pretrained(name)
    classes: dict[str, Any] = {family.name: family.model_class for family in FAMILIES}
    if config.model_type not in classes:
        kinds = ", ".join(map(repr, classes))
        raise ValueError(f"model {name} is of type {config.model_type!r}, expected {kinds}")
    tower = getattr(config.vision_config, "model_type", None)
    if config.model_type in ("llava", "llava_next", "vipllava") and tower != "clip_vision_model":
        raise ValueError(f"model {name} has a vision tower of type {tower!r}, expected a CLIP ('clip_vision_model')")
    with torch.device("meta"):
        return family_of(classes[config.model_type](config))


def names_outside_language_model(family: Family) -> list[str]:
    """Names of all modules of a chat model that are no part of its language model's layers, and of its output layer."""
    chat = family.chat
    language: Any = family.language_model if family.generator is chat else family.generator
    names = [name for name, module in chat.named_modules() if module is family.lm_head]

    def collect(module: Any, prefix: str) -> None:
        for name, child in module.named_children():
            if child is language or child is family.lm_head:
                continue
            if any(part is language for part in child.modules()):
                collect(child, f"{prefix}{name}.")
            else:
                names.append(prefix + name)

    collect(chat, "")
    return names


def read_processors(name: str) -> tuple[Any, Any, Any]:
    """A model's tokenizer with its chat template, its image processor or None, its Q-Former's tokenizer or None.

    Raises:
        ImportError: the image processor needs a package that is not installed. OSError: there is no tokenizer.
    """
    files = ("preprocessor_config.json", "processor_config.json")
    if not any(_file(name, file) for file in files):  # a folder with a tokenizer alone
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer.chat_template and (template := _file(name, "chat_template.json")):
            tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
        return tokenizer, None, None
    processor = AutoProcessor.from_pretrained(name)
    tokenizer, images = processor.tokenizer, processor.image_processor
    if getattr(processor, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    return tokenizer, images, getattr(processor, "qformer_tokenizer", None)


def _file(name: str, file: str) -> str | None:
    """Where a file of a folder or hub repository lies; None where it has none."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
