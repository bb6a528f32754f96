"""Models and videos small enough for a test."""

import torch

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "projection_dim": 24,
}
EVA = {**SIZES, "model_type": "eva", "hidden_act": "gelu", "layer_norm_eps": 1e-6}
PATCHES = 16


def make(config=SIZES, seed=0, **fields) -> BTAdapterVisionModel:
    torch.manual_seed(seed)
    return BTAdapterVisionModel(config, BTAdapterConfig(**{"depth": 2, "max_frames": 8, **fields})).eval()


def shake(model: BTAdapterVisionModel) -> BTAdapterVisionModel:
    """Random values where training starts at zero, so that every part has an effect."""
    with torch.no_grad():
        for name, p in model.branch.named_parameters():
            p.add_(torch.randn_like(p) * (1e-4 if "gate" in name else 0.2))
    return model


def video(frames=4, batch=2, seed=1):
    return torch.randn(batch, frames, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
