"""Loading the compiled part: the CPU kernels (``bt_kernels._C``) and the CUDA kernels (``bt_kernels/_C_cuda.so``).

Both register their ops as ``torch.ops.bt_kernels_native.<op>``. They are loaded when first asked for; why one could
not be loaded is kept and reported, never swallowed.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent


@cache
def _load_cpu() -> tuple[Any, str | None]:
    """The module ``_C`` and None, or None and the reason it could not be loaded."""
    if os.environ.get("BT_NATIVE") == "0":
        return None, "switched off by BT_NATIVE=0 in the environment"
    if not any(_FOLDER.glob("_C.*")):
        note = _FOLDER / "_native_build.txt"
        reason = note.read_text().strip() if note.exists() else "installed as pure Python (BT_NATIVE=0)"
        return None, f"not built: {reason}"
    try:
        return importlib.import_module("bt_kernels._C"), None
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"bt_kernels._C could not be loaded under torch {torch.__version__}: {error}"


@cache
def _load_cuda() -> str | None:
    """Load the CUDA library; None, or the reason it could not be."""
    module, reason = _load_cpu()
    if module is None:
        return reason
    library = _FOLDER / "_C_cuda.so"
    if not library.exists():
        return f"not built: {module.build_facts()['why_no_cuda'] or f'{library.name} is missing'}"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} could not be loaded under torch {torch.__version__}: {error}"
    return None


def cpu_ops() -> Any:
    """``torch.ops.bt_kernels_native`` with the CPU kernels registered, or None (see :func:`why_not_cpu`)."""
    return None if why_not_cpu() else torch.ops.bt_kernels_native


def why_not_cpu() -> str | None:
    """Why the compiled CPU kernels cannot run, or None."""
    return _load_cpu()[1]


def cuda_ops() -> Any:
    """``torch.ops.bt_kernels_native`` with the CUDA kernels registered, or None (see :func:`why_not_cuda`)."""
    return None if why_not_cuda() else torch.ops.bt_kernels_native


def why_not_cuda() -> str | None:
    """Why the compiled CUDA kernels cannot run, or None. A library that could not be loaded is said before a
    missing device, since loading it needs none."""
    reason = _load_cuda()
    if reason is None and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return reason


def build_info() -> dict[str, str]:
    """Facts of the compiled part: compiler, flags, torch it was built with, CUDA compiler and targets; empty where
    there is none."""
    module, _ = _load_cpu()
    return {} if module is None else dict(module.build_facts())


def why_not_cpu_kernel(tensor: Tensor, *_) -> str | None:
    """Why a compiled CPU kernel cannot run on ``tensor`` (the op's first argument), or None."""
    return why_not_cpu() if tensor.device.type == "cpu" else f"tensors are on {tensor.device}"


def why_not_cuda_kernel(tensor: Tensor, *_) -> str | None:
    """Why a compiled CUDA kernel cannot run on ``tensor`` (the op's first argument), or None."""
    return why_not_cuda() if tensor.device.type == "cuda" else f"tensors are on {tensor.device}"
