"""Image chat models of every family, small, with random weights; and branches for them."""

from dataclasses import replace

import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    OPTConfig,
    T5Config,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.chat.attach import attach
from bt_adapter.chat.families import family_of

IMAGE_TOKEN = 60
SIZE, PATCHES, QUERIES, WIDTH = 24, 9, 5, 40  # 24 px in patches of 8
LAYERS = 4  # of the tower a branch stands beside; the Q-Former models' own has one less
FAMILIES = ("llava", "llava_next", "vipllava", "blip-2", "instructblip")
QFORMERS = ("blip-2", "instructblip")
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "image_size": SIZE, "patch_size": 8,
}  # fmt: skip
QFORMER = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 70,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def text_config() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, eos_token_id=63, pad_token_id=62, bos_token_id=61,
    )  # fmt: skip


def opt_config() -> OPTConfig:
    return OPTConfig(
        hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, max_position_embeddings=128, dropout=0.0, eos_token_id=63, pad_token_id=62, bos_token_id=61,
    )  # fmt: skip


def make_chat(name: str, seed: int = 0, text=None, true: bool = False, **vision):
    """true: with the tower, the number of queries and the feature layers of the published model."""
    torch.manual_seed(seed)
    text = text or (opt_config() if name == "blip-2" else text_config())
    if name in ("blip-2", "instructblip"):
        config_class, model_class = {
            "blip-2": (Blip2Config, Blip2ForConditionalGeneration),
            "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration),
        }[name]
        tower = {**VISION, "num_hidden_layers": LAYERS - 1, "initializer_range": 0.1, **vision}
        tower = {} if true else tower
        config = config_class(
            vision_config=tower,
            qformer_config=QFORMER,
            text_config=text,
            num_query_tokens=32 if true else QUERIES,
            image_token_index=IMAGE_TOKEN,
        )
        model = model_class(config).eval()
        for name_, parameter in model.named_parameters():
            # what starts at zero, or as an identity, in training
            if name_ == "query_tokens" or "post_layernorm" in name_ or name_.endswith("qkv.bias"):
                nn.init.normal_(parameter)
        return model
    config_class, model_class, more = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration, {}),
        "llava_next": (
            LlavaNextConfig,
            LlavaNextForConditionalGeneration,
            {"image_grid_pinpoints": [[SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]},
        ),
        "vipllava": (VipLlavaConfig, VipLlavaForConditionalGeneration, {"vision_feature_layers": [-2, -3, 1]}),
    }[name]
    if true:
        return model_class(config_class(text_config=text, image_token_index=IMAGE_TOKEN))
    config = config_class(
        vision_config=CLIPVisionConfig(**{**VISION, "projection_dim": 16, **vision}),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        **more,
    )
    return model_class(config).eval()


def t5_config() -> T5Config:
    return T5Config(
        d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, pad_token_id=62, eos_token_id=63,
        decoder_start_token_id=62,
    )  # fmt: skip


@torch.no_grad()
def make_branch(chat, depth: int = 3, **fields) -> BTAdapterVisionModel:
    """A branch trained, as it were, beside a copy of the chat's tower; parts that start at zero drawn."""
    family = family_of(chat)
    config = replace(family.tower_config, projection_dim=16)
    model = BTAdapterVisionModel(config, BTAdapterConfig(depth=depth, **fields)).eval()
    tensors, _ = family.tower()
    model.tower.load_state_dict({name: t.clone() for name, t in tensors.items()}, strict=False)
    model.reset_spatial_layers()
    for layer in model.branch.temporal:
        nn.init.normal_(layer.fc.weight, std=0.5)
    nn.init.normal_(model.branch.time)
    return model


def videos(count: int = 2, frames: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, frames, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def ids(*lengths: int, batch: int = 1) -> torch.Tensor:
    """A prompt with so many image tokens in each of its places."""
    row = [61, 5]
    for length in lengths:
        row += [IMAGE_TOKEN] * length + [7]
    return torch.tensor([[*row, 8, 9]]).repeat(batch, 1)


def question(chat, rows: int) -> dict:
    """What InstructBLIP's Q-Former reads, one row a visual; {} for the others."""
    if not family_of(chat).needs_question:
        return {}
    return {"qformer_input_ids": torch.tensor([[3, 4, 5]]).repeat(rows, 1)}


def stills(name: str, count: int = 2) -> tuple[dict, int]:
    """Arguments for so many stills, and how many tokens each takes."""
    generator = torch.Generator().manual_seed(2)
    if name == "llava_next":  # two tiles and the whole picture; 3 x 6 patches with 3 line ends
        pixels = torch.randn(count, 3, 3, SIZE, SIZE, generator=generator)
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[SIZE, 2 * SIZE]] * count)}, PATCHES + 18 + 3
    pixels = torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return {"pixel_values": pixels}, QUERIES if name in ("blip-2", "instructblip") else PATCHES


def attached(name: str = "llava", **fields):
    chat = make_chat(name)
    return attach(chat, make_branch(chat, drop_path=0.0, **fields))
