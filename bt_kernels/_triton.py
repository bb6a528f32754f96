"""Launching Triton kernels. Nothing here imports Triton before a kernel is asked for.

Kernels are plain ``@triton.jit`` functions on one-dimensional grids (y and z end at 65,535), launched by
:func:`launch` with every meta-parameter from a fixed table: no autotuning, so no length becomes a compile key.
Inside :func:`recorded` launches are collected instead of run; what would run can then be compiled for any device and
its registers, spills and instructions read, without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bt_kernels._dispatch import Kernel, imported

_LARGEST_GRID = 2**31 - 1
_recording: list[list[Launch]] = []
around_launch: Callable[[], AbstractContextManager] = nullcontext  # entered while a kernel runs: benchmarks count


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, run-time arguments, compile-time constants and options.

    ``resident`` is how many programs are meant to share a multiprocessor: it bounds registers and shared memory.
    """

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]
    warps: int
    stages: int
    resident: int


@cache
def _why_not_installed() -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton could not be imported: {error}"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``): for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _why_not_device(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need compute capability 8.0 or newer, {device} has {major}.{minor}"


def why_not(tensor: Tensor, *_) -> str | None:
    """Why Triton kernels cannot run on ``tensor`` (the op's first argument), or None."""
    device = tensor.device
    if device.type == "cuda":
        return _why_not_installed() or _why_not_device(device)
    if (device.type == "cpu" and interpreting()) or (device.type == "meta" and _recording):
        return _why_not_installed()
    return f"tensors are on {device}"


def why_not_without_float64(tensor: Tensor, *_) -> str | None:
    """:func:`why_not` of kernels on tensor cores, which do not take float64."""
    return "float64 runs on the reference" if tensor.dtype == torch.float64 else why_not(tensor)


def why_not_default(tensor: Tensor, *_) -> str | None:
    """The interpreter is for tests."""
    return "Triton's interpreter is slow" if tensor.device.type == "cpu" else None


def triton_kernel(module: str, suffix: str = "", why_not: Callable[..., str | None] = why_not) -> Kernel:
    """An op's Triton kernel: ``forward`` and ``backward`` (+ ``suffix``) of ``module``, imported when first used."""
    forward, backward = (imported(module, name + suffix) for name in ("forward", "backward"))
    return Kernel("triton", forward, backward, why_not, why_not_default)


def launch(
    kernel, programs: int, *args, warps: int = 4, stages: int = 2, resident: int = 2, **constants
) -> None:  # fmt: skip
    """Run ``kernel`` on a grid of ``programs``, on the device of its first tensor; nothing for no programs.

    ``args`` are the run-time arguments in the kernel's order (tensors, ints, None), ``constants`` its
    ``tl.constexpr`` ones by name. ``resident``, programs meant to share a multiprocessor, is a plan that compile checks
    hold the kernel to.

    Raises:
        ValueError: more programs than a grid holds.
    """
    if programs == 0:
        return
    if programs > _LARGEST_GRID:
        raise ValueError(f"{programs} programs are more than a grid holds, {_LARGEST_GRID}: split the batch")
    if _recording:
        _recording[-1].append(Launch(kernel, programs, args, constants, warps, stages, resident))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), around_launch():
        kernel[(programs,)](*args, **constants, num_warps=warps, num_stages=stages)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be on the meta device."""
    _recording.append([])
    try:
        yield _recording[-1]
    finally:
        _recording.pop()
