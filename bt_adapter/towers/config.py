"""Configuration of the frozen tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

MODEL_TYPES = ("clip_vision_model", "eva", "siglip_vision_model", "dinov2")
ACTIVATIONS = ("quick_gelu", "gelu", "gelu_pytorch_tanh")
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


@dataclass(frozen=True)
class TowerConfig:
    """Configuration of a CLIP, EVA-CLIP, SigLIP or DINOv2 tower; field names follow ``CLIPVisionConfig``.

    Attributes:
        hidden_size: D. intermediate_size: width of the MLP. num_hidden_layers: L. num_attention_heads: H.
        image_size, patch_size: in pixels; P = (image_size // patch_size)².
        projection_dim: F, width of the shared video-text space; None for a tower without a projection (in chat
            models).
        hidden_act: "quick_gelu", "gelu" or "gelu_pytorch_tanh".
        layer_norm_eps: epsilon of the tower's LayerNorms.
        model_type: "clip_vision_model"; "eva" for EVA-CLIP; "siglip_vision_model" for SigLIP, which has no CLS;
            "dinov2" for DINOv2, with registers or without.
        num_register_tokens: R, number of additional tokens in the tower's layers (DINOv2).
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    projection_dim: int | None = None
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    model_type: str = "clip_vision_model"
    num_register_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, but is {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size {self.hidden_size}, but is {self.num_attention_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act must be {_one_of(ACTIVATIONS)}, but is {self.hidden_act!r}")
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type must be {_one_of(MODEL_TYPES)}, but is {self.model_type!r}")
        registers = self.num_register_tokens
        if not isinstance(registers, int) or registers < 0 or registers and self.model_type != "dinov2":
            raise ValueError(
                f"num_register_tokens must be 0, or a positive int where model_type is 'dinov2', but is {registers!r}"
            )
        if self.is_siglip and self.projection_dim not in (None, self.hidden_size):
            raise ValueError(
                f"projection_dim must be None or hidden_size {self.hidden_size} for a SigLIP, whose pooling head is "
                f"its projection, but is {self.projection_dim!r}"
            )

    @property
    def patches(self) -> int:
        """P, the number of patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    def differences(self, other: TowerConfig) -> list[str]:
        """List the fields that differ and make a branch for this tower unusable for the other."""
        names = [field.name for field in fields(TowerConfig) if field.name != "projection_dim"]
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in names)
        return [f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs]

    @property
    def is_eva(self) -> bool:
        """Whether the tower is an EVA-CLIP one."""
        return self.model_type == "eva"

    @property
    def is_siglip(self) -> bool:
        """Whether the tower is a SigLIP, which has no CLS and an attention-pooling head."""
        return self.model_type == "siglip_vision_model"

    @property
    def rows(self) -> int:
        """Number of tokens of a frame inside the tower: CLS, patches and registers, in this order."""
        return 1 + self.patches + self.num_register_tokens

    @staticmethod
    def of(config: TowerConfig | Mapping[str, Any] | Any) -> TowerConfig:
        """Convert a TowerConfig, a Hugging Face ``CLIPVisionConfig``, or a dict with its keys.

        Raises:
            ValueError: a key is missing or its value is out of range.
        """
        if isinstance(config, TowerConfig):
            return config
        values = dict(config) if isinstance(config, Mapping) else dict(vars(config))
        missing = [name for name in _REQUIRED if values.get(name) is None]
        if missing:
            raise ValueError(f"vision_config must have {', '.join(_REQUIRED)}, but lacks {', '.join(missing)}")
        known = {field.name for field in fields(TowerConfig)}
        values = {name: value for name, value in values.items() if name in known}
        for name in ("image_size", "patch_size"):
            if isinstance(values[name], (tuple, list)):
                height, width = values[name]
                if height != width:
                    raise ValueError(f"{name} must be square, but is {values[name]}")
                values[name] = height
        if not isinstance(config, Mapping) and not values.get("model_type"):
            values["model_type"] = getattr(type(config), "model_type", "clip_vision_model")
        return TowerConfig(**values)

    @staticmethod
    def eva_clip_g(projection_dim: int | None = 1024, image_size: int = 224) -> TowerConfig:
        """Make the configuration of EVA-CLIP-g/14: 40 layers, width 1408, 16 heads of 88."""
        return TowerConfig(1408, 6144, 40, 16, image_size, 14, projection_dim, "gelu", 1e-6, "eva")

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as a dict for JSON."""
        return asdict(self)


def _one_of(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}"
