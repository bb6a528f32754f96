"""Image models of transformers with random weights: their true configurations, shrunk."""

import torch
from transformers import (
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.configuration_clip import CLIPConfig

# Of openai/clip-vit-large-patch14 (quick-GELU) and laion/CLIP-ViT-H-14-laion2B-s32B-b79K (GELU).
VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 7}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99,
        "max_position_embeddings": 16}  # fmt: skip


def _seeded(make):
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # biases and scales away from their starts, so that each has an effect
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def clip(act: str = "quick_gelu", eps: float = 1e-5) -> CLIPModel:
    both = {"hidden_act": act, "layer_norm_eps": eps, "projection_dim": 24}
    tokens = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 98}
    config = CLIPConfig(text_config=TEXT | both | tokens, vision_config=VISION | both, projection_dim=24)
    return _seeded(lambda: CLIPModel(config))


def siglip(**changes) -> SiglipModel:
    """Of google/siglip-so400m-patch14-384 (heads 72 wide, patches that do not fill the picture): 30 = 4 · 7 + 2."""
    vision = VISION | {"hidden_size": 144, "intermediate_size": 200, "image_size": 30} | changes
    config = SiglipConfig(text_config=TEXT | {"projection_size": 144}, vision_config=vision)
    return _seeded(lambda: SiglipModel(config))


def dinov2(registers: int = 0, **changes):
    """Of facebook/dinov2-base and facebook/dinov2-with-registers-base."""
    sizes = {name: value for name, value in VISION.items() if name != "intermediate_size"} | {"mlp_ratio": 4} | changes
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        return _seeded(lambda: Dinov2WithRegistersModel(config))
    return _seeded(lambda: Dinov2Model(Dinov2Config(**sizes)))
