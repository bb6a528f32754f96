"""Load a chat model with a branch from a folder or the hub; its configuration is checked before the weights load."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaNextConfig,
    VipLlavaConfig,
)
from transformers.utils import cached_file

from bt_adapter.chat.attach import attach
from bt_adapter.chat.branch_files import check_branch
from bt_adapter.chat.conversation import GREEDY
from bt_adapter.chat.families import FAMILIES, Family, family_of
from bt_adapter.chat.native.modeling import NATIVE_CLASSES, VideoModel
from bt_adapter.chat.quantize import Quantize, quantization
from bt_adapter.errors import CheckpointError
from bt_adapter.towers.hugging_face import check_place, load_pretrained, locate_branch


@dataclass(frozen=True)
class LoadOptions:
    """The options of loading a chat model; ``VideoChat.load`` describes them."""

    device: str = "cpu"
    dtype: torch.dtype | None = None
    quantize: Quantize | None = None
    require_same_tower: bool = True
    use_branch: bool = True


def load_with_branch(
    name: str | os.PathLike[str], branch: str | os.PathLike[str] | None, options: LoadOptions
) -> tuple[Any, Any]:
    """Load a video chat model and its processor (or the processor or tokenizer of its image chat model).

    name: an image chat model, which needs a branch; or a video chat model, whose branch ``branch`` replaces.

    These errors are found in the configurations, before any weights are read: an unsupported kind of model, a tower
    that is no CLIP, a missing branch, and a branch for a tower of other sizes.

    Raises:
        ValueError: one of these. QuantizeError: the package that quantizes is not installed.
        ImportError: the model's processor needs a package that is not installed.
        CheckpointError, OSError: see `load_pretrained`, and `attach` for the branch.
    """
    name = check_place(name)
    family = read_skeleton(name)
    if branch is None:
        if not isinstance(family.chat, VideoModel) and options.use_branch:
            raise ValueError(
                f"model {name} needs a branch, but branch is None: it is an image chat model (without one, --no-branch "
                "or use_branch=False gives the mean of the frames)"
            )
    else:
        branch = locate_branch(branch)
        check_branch(branch, family, options.require_same_tower)
    processor = read_processor(name)
    further: dict[str, Any] = {}
    if options.quantize is not None:
        kept = names_outside_language_model(family)
        further = {"quantization_config": quantization(options.quantize, kept), "device_map": {"": options.device}}
    if (settings := generation_settings(name)) is not None:
        further["generation_config"] = settings
    chat = load_pretrained(type(family.chat), name, options.dtype, **further)
    # accelerate has already placed a quantised model
    if options.quantize is None and not getattr(chat, "is_quantized", False):
        chat = chat.to(options.device)
    if branch is None and isinstance(family.chat, VideoModel):
        return chat, processor
    return attach(chat, branch, options.require_same_tower), processor


def read_skeleton(name: str) -> Family:
    """Build the chat model of a folder or hub name from its ``config.json`` on the meta device, without weights.

    Raises:
        ValueError: the kind of model is not supported, or its tower is no CLIP.
    """
    config = AutoConfig.from_pretrained(name)
    classes: dict[str, Any] = {family.name: family.model_class for family in FAMILIES}
    natives = {native.config_class.model_type: native for native in NATIVE_CLASSES.values()}
    if config.model_type not in classes | natives:
        kinds = ", ".join(map(repr, classes))
        raise ValueError(f"model {name} is of type {config.model_type!r}, expected {kinds}")
    tower = getattr(config.vision_config, "model_type", None)
    if isinstance(config, (LlavaConfig, LlavaNextConfig, VipLlavaConfig)) and tower != "clip_vision_model":
        raise ValueError(f"model {name} has a vision tower of type {tower!r}, expected a CLIP ('clip_vision_model')")
    with torch.device("meta"):
        return family_of((classes | natives)[config.model_type](config))


def generation_settings(name: str) -> GenerationConfig | None:
    """Read a model's ``generation_config.json`` if transformers refuses it unchanged; else return None.

    The settings that greedy decoding overrides are left out.

    Raises:
        CheckpointError: the file is damaged, or transformers refuses another of its settings.
    """
    file = _file(name, "generation_config.json")
    try:
        values = {} if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    try:
        GenerationConfig.from_dict(values)
    except ValueError:
        try:
            return GenerationConfig.from_dict({key: value for key, value in values.items() if key not in GREEDY})
        except ValueError as error:
            raise CheckpointError(f"{file} is refused by transformers: {error}") from error
    return None


def names_outside_language_model(family: Family) -> list[str]:
    """List the modules of a chat model outside its language model's layers, with its output layer."""
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


def read_processor(name: str) -> Any:
    """Load a model's processor or, if it has none, its tokenizer with its chat template.

    Raises:
        ImportError: the image processor needs a package that is not installed. OSError: there is no tokenizer.
    """
    files = ("preprocessor_config.json", "processor_config.json")
    if not any(_file(name, file) for file in files):  # a folder with only a tokenizer
        tokenizer = AutoTokenizer.from_pretrained(name)
        if not tokenizer.chat_template and (template := _file(name, "chat_template.json")):
            tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
        return tokenizer
    return AutoProcessor.from_pretrained(name)


def _file(name: str, file: str) -> str | None:
    """Return the path of a file in a folder or hub repository, or None if it does not exist."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
