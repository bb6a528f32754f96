"""BT-Adapter: a small trainable branch of a frozen CLIP that teaches image chat models to read videos.

The method: arXiv 2309.15785 (CVPR 2024). A video passes through the subpackages ``data`` (decoding), ``towers``
(the frozen CLIP), ``model`` (the branch beside it: embeddings, losses, video tokens) and ``chat`` (the language model).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bt_adapter import files

if TYPE_CHECKING:
    from bt_adapter.chat.attach import attach as attach
    from bt_adapter.errors import CheckpointError as CheckpointError
    from bt_adapter.live.source import LiveSource as LiveSource
    from bt_adapter.live.video import LiveVideo as LiveVideo
    from bt_adapter.model.adapter import BTAdapterOutput as BTAdapterOutput
    from bt_adapter.model.adapter import BTAdapterVisionModel as BTAdapterVisionModel
    from bt_adapter.model.config import BTAdapterConfig as BTAdapterConfig
    from bt_adapter.model.published import load_reference_checkpoint as load_reference_checkpoint
    from bt_adapter.model.published import to_reference_state_dict as to_reference_state_dict
    from bt_adapter.towers.config import TowerConfig as TowerConfig

__version__ = files.VERSION

# Imported on first access: torch and transformers take seconds, which would delay the command line.
_PLACES = {
    "BTAdapterConfig": "model.config",
    "BTAdapterOutput": "model.adapter",
    "BTAdapterVisionModel": "model.adapter",
    "CheckpointError": "errors",
    "LiveSource": "live.source",
    "LiveVideo": "live.video",
    "TowerConfig": "towers.config",
    "attach": "chat.attach",
    "load_reference_checkpoint": "model.published",
    "to_reference_state_dict": "model.published",
}

__all__ = list(_PLACES)


def import_on_access(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package that imports its public names when they are first accessed.

    Args:
        package: its ``__name__``. places: public name -> module within the package that defines it.
    """

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{places[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load


__getattr__ = import_on_access(__name__, _PLACES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
