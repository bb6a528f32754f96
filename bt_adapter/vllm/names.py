"""Names of weights: from a video chat model's files and LoRA adapters to those of the model in vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping

SERVED = ("llava", "llava_next", "vipllava")
"""Families whose models vLLM runs, by their names in ``bt_adapter.chat.families``."""

ENCODER, LANGUAGE = "encoder", "language_model"
"""Attributes of the model in vLLM: everything that encodes stills and videos, and vLLM's own language model."""

_PARTS = "vision_tower|multi_modal_projector|bt_adapter|image_newline"

RENAMED: Mapping[re.Pattern[str], str] = {
    # A tower of CLIP stands one level deeper in files of older versions of transformers.
    re.compile(r"^((?:model\.)?vision_tower)\.vision_model\."): r"\1.",
    re.compile(rf"^(?:model\.)?({_PARTS})(?=\.|$)"): rf"{ENCODER}.chat.model.\1",
    re.compile(r"^model\.language_model\."): f"{LANGUAGE}.model.",
    re.compile(r"^lm_head\."): f"{LANGUAGE}.lm_head.",
    # vLLM compares the last part of an adapted layer's name alone, and would ignore adapters outside of the language
    # model. This part is in no model, so that they are refused, and the error shows it.
    re.compile(rf"^({ENCODER}\..*)\.(lora_[AB])\."): r"\1.only_adapters_of_the_language_model_are_supported.\2.",
}
"""Regular expressions and their replacements, applied one after the other to each name."""


def rename(name: str) -> str:
    """Convert the name of a weight, or of an adapter's weight without PEFT's prefix, to that of the model in vLLM."""
    for pattern, replacement in RENAMED.items():
        name = pattern.sub(replacement, name)
    return name
