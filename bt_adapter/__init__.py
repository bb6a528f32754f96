"""BT-Adapter: a small trainable branch beside a frozen CLIP that teaches image chat models to read videos.

The method: arXiv 2309.15785 (CVPR 2024). The path of a video through this package: ``data`` (file to frames),
``tower`` (frozen CLIP), ``branch`` (what learns), ``model`` (both joined: embeddings, losses, video tokens), ``chat``
(video tokens into a language model).
"""

from __future__ import annotations

from typing import Any

from bt_adapter.checkpoint import CheckpointError
from bt_adapter.config import BTAdapterConfig, TowerConfig
from bt_adapter.model import BTAdapterOutput, BTAdapterVisionModel
from bt_adapter.published import load_reference_checkpoint, to_reference_state_dict

__version__ = "0.1.0"

__all__ = [
    "BTAdapterConfig",
    "BTAdapterOutput",
    "BTAdapterVisionModel",
    "CheckpointError",
    "TowerConfig",
    "attach",
    "load_reference_checkpoint",
    "to_reference_state_dict",
]


def __getattr__(name: str) -> Any:
    if name == "attach":  # brings in transformers, which is slow to import
        from bt_adapter.chat.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
