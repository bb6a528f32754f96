"""Make torchvision importable beside a torch that its wheel was not built for: imported before transformers.

open_clip imports torchvision, whose Python part needs no more than its operators' declarations.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _declare() -> torch.library.Library | None:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_KEPT = _declare()  # the declarations live as long as it does
