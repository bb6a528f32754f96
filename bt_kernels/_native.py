"""Loader of the compiled part: one library of CPU kernels and one of CUDA kernels, both in this folder.

Both register their ops as ``torch.ops.bt_kernels_native.<op>`` when ``torch.ops.load_library`` loads them, and do not
depend on Python symbols. They are loaded at first use. If one cannot be loaded, the reason is stored and reported.
"""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parent
_CPU_LIBRARY = "libbt_kernels_cpu.so"
_CUDA_LIBRARY = "libbt_kernels_cuda.so"


@cache
def why_not_cpu() -> str | None:
    """Load the library of CPU kernels at the first call; return the reason why its kernels cannot run, or None."""
    if os.environ.get("BT_NATIVE") == "0":
        return "switched off by BT_NATIVE=0 in the environment"
    if not (_FOLDER / _CPU_LIBRARY).exists():
        note = _FOLDER / "_native_build.txt"
        reason = note.read_text().strip() if note.exists() else "installed as pure Python (BT_NATIVE=0)"
        return f"not built: {reason}"
    return _load(_CPU_LIBRARY)


@cache
def _load_cuda() -> str | None:
    """Load the library of CUDA kernels after that of CPU kernels, which defines the ops; return the error or None."""
    if (reason := why_not_cpu()) is not None:
        return reason
    if not (_FOLDER / _CUDA_LIBRARY).exists():
        return f"not built: {build_info()['why_no_cuda'] or f'{_CUDA_LIBRARY} is missing'}"
    return _load(_CUDA_LIBRARY)


def _load(name: str) -> str | None:
    """Load a library of this folder into torch; return the error or None."""
    try:
        torch.ops.load_library(str(_FOLDER / name))
    except (OSError, RuntimeError) as error:
        return f"{name} could not be loaded under torch {torch.__version__}: {error}"
    return None


def cpu_ops() -> Any:
    """Return ``torch.ops.bt_kernels_native`` with the CPU kernels registered, or None (see :func:`why_not_cpu`)."""
    return None if why_not_cpu() else torch.ops.bt_kernels_native


def cuda_ops() -> Any:
    """Return ``torch.ops.bt_kernels_native`` with the CUDA kernels registered, or None (see :func:`why_not_cuda`)."""
    return None if why_not_cuda() else torch.ops.bt_kernels_native


def why_not_cuda() -> str | None:
    """Return why the compiled CUDA kernels cannot run, or None. A loading error is reported before a missing device,
    because loading needs no device."""
    reason = _load_cuda()
    if reason is None and torch.version.cuda is None:
        reason = f"torch {torch.__version__} was built without CUDA"
    if reason is None and torch.version.cuda is not None:
        reason = _why_other_cuda(build_info()["cuda_compiler"], torch.version.cuda)
    if reason is None and not torch.cuda.is_available():
        reason = "torch sees no CUDA device"
    return reason


def _why_other_cuda(compiler: str, of_torch: str) -> str | None:
    """Compare the major versions of the build's CUDA compiler ("NVIDIA 13.0.88") and of torch's CUDA ("13.0")."""
    built = compiler.split()[-1] if compiler else ""
    if not built or built.partition(".")[0] == of_torch.partition(".")[0]:
        return None
    return f"built with CUDA {built}, but torch {torch.__version__} has CUDA {of_torch}: build again with torch's"


def build_info() -> dict[str, str]:
    """Return the compiler, flags, torch version, CUDA compiler and CUDA targets of the build; empty if not compiled."""
    if why_not_cpu() is not None:
        return {}
    describe = ctypes.CDLL(str(_FOLDER / _CPU_LIBRARY)).bt_kernels_build_facts
    describe.restype = ctypes.c_char_p
    return json.loads(describe())


def why_not_cpu_kernel(tensor: Tensor, *_) -> str | None:
    """Return why a compiled CPU kernel cannot run on ``tensor`` (the op's first argument), or None."""
    return why_not_cpu() if tensor.device.type == "cpu" else f"tensors are on {tensor.device}"


def why_not_cuda_kernel(tensor: Tensor, *_) -> str | None:
    """Return why a compiled CUDA kernel cannot run on ``tensor`` (the op's first argument), or None."""
    return why_not_cuda() if tensor.device.type == "cuda" else f"tensors are on {tensor.device}"
