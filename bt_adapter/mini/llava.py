"""A CLIP's vision tower, a two-layer projector and SmolLM2, joined as a LLaVA: the small stack's chat model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"

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
