"""Convert the settings of a published LLaVA v1 to Hugging Face's LLaVA: configuration, tower, processor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from bt_adapter.chat.convert.vicuna import PLACE
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.towers.hugging_face import load_clip_model

# these describe the program that wrote the file, not the model; use_cache was switched off for training
_WRITERS = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
_NOT_TAKEN = _WRITERS | {"model_type", "use_cache"}


def read_config(folder: Path) -> dict[str, Any]:
    """Read the published ``config.json``. Raises FileNotFoundError, CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def load_vision_tower(published: dict[str, Any], clip: str | None) -> CLIPVisionModel:
    """Load the vision tower: ``clip`` (folder or hub name), or the one that the published configuration names."""
    name = clip or published.get("mm_vision_tower")
    if name is None:
        raise CommandError("the model's config.json names no mm_vision_tower: give the CLIP (--clip)")
    return load_clip_model(CLIPVisionModel, name)


def make_config(
    published: dict[str, Any],
    projector: Sequence[int],
    dtype: torch.dtype,
    rows: int,
    token: int,
    clip: CLIPVisionModel,
) -> LlavaConfig:
    """Make Hugging Face's configuration. Raises CheckpointError if the widths of the parts do not fit.

    projector: shape of its weight. rows: number of rows of the embedding table. token: id of the visual token.
    """
    known = {*LlamaConfig().to_dict(), "rope_theta", "rope_scaling"} - _NOT_TAKEN
    text = {key: value for key, value in published.items() if key in known and value is not None}
    vision: Any = clip.config
    if tuple(projector) != (text.get("hidden_size"), vision.hidden_size):
        raise CheckpointError(
            f"model.mm_projector.weight is {list(projector)}, expected [{text.get('hidden_size')}, "
            f"{vision.hidden_size}]: the widths of the language model and of clip's tower"
        )
    config = LlavaConfig(
        vision_config={key: value for key, value in vision.to_dict().items() if key not in _WRITERS},
        text_config=LlamaConfig(**{**text, "vocab_size": rows}),
        image_token_index=token,
        projector_hidden_act="linear",
        vision_feature_layer=published.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        tie_word_embeddings=False,
        dtype=str(dtype).removeprefix("torch."),
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def save_settings(folder: Path, config: LlavaConfig, tokenizer: Any, clip: CLIPVisionModel) -> None:
    """Write the configuration, generation settings, tokenizer with its chat template, and image processor."""
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config.text_config).save_pretrained(folder)
    vision: Any = config.vision_config
    size = vision.image_size
    try:
        images = CLIPImageProcessor.from_pretrained(clip.name_or_path)
    except OSError:  # a CLIP without its preprocessor_config.json
        images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=PLACE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
