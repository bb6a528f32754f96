"""Launcher of Triton kernels. Triton is imported only when a kernel is requested.

Kernels are plain ``@triton.jit`` functions on one-dimensional grids (y and z are limited to 65,535), launched by
:func:`launch` with every meta-parameter from a fixed table: no autotuning, so no length becomes a compile key.
Inside :func:`recorded` launches are collected instead of run. They can then be compiled for any device and their
registers, spills and instructions read, without that device.
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

from bt_kernels._dispatch import Kernel, import_on_call

_LARGEST_GRID = 2**31 - 1
_recording: list[list[Launch]] = []
around_launch: Callable[[], AbstractContextManager] = nullcontext  # entered around each kernel, by benchmarks


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid, run-time arguments, compile-time constants and options.

    ``resident`` is the number of programs planned per multiprocessor; it limits registers and shared memory.
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
    """Return whether Triton's interpreter runs the kernels, on CPU tensors (``TRITON_INTERPRET=1``, for tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _why_not_device(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"the kernels need compute capability 8.0 or newer, {device} has {major}.{minor}"


def why_not(tensor: Tensor, *_) -> str | None:
    """Return why Triton kernels cannot run on ``tensor`` (the op's first argument), or None."""
    device = tensor.device
    if device.type == "cuda":
        return _why_not_installed() or _why_not_device(device)
    if (device.type == "cpu" and interpreting()) or (device.type == "meta" and _recording):
        return _why_not_installed()
    return f"tensors are on {device}"


def why_not_without_float64(tensor: Tensor, *_) -> str | None:
    """Return the reason as :func:`why_not`, for kernels on tensor cores, which do not support float64."""
    return "float64 runs on the reference" if tensor.dtype == torch.float64 else why_not(tensor)


def why_not_default(tensor: Tensor, *_) -> str | None:
    """Return why Triton is not the default on CPU tensors: its interpreter is meant for tests."""
    return "Triton's interpreter is slow" if tensor.device.type == "cpu" else None


def triton_kernel(module: str, suffix: str = "", why_not: Callable[..., str | None] = why_not) -> Kernel:
    """Make a :class:`Kernel` of ``forward`` and ``backward`` (+ ``suffix``) of ``module``, imported at first use."""
    forward, backward = (import_on_call(module, name + suffix) for name in ("forward", "backward"))
    return Kernel("triton", forward, backward, why_not, why_not_default)


def launch(
    kernel, programs: int, *args, warps: int = 4, stages: int = 2, resident: int = 2, **constants
) -> None:  # fmt: skip
    """Run ``kernel`` on a grid of ``programs`` on the device of its first tensor; do nothing for 0 programs.

    ``args`` are the run-time arguments in the kernel's order (tensors, ints, None), ``constants`` its
    ``tl.constexpr`` arguments by name. ``resident`` is the planned number of programs per multiprocessor; compile
    checks verify that registers and shared memory allow it.

    Raises:
        ValueError: ``programs`` exceeds the largest grid.
    """
    if programs == 0:
        return
    if programs > _LARGEST_GRID:
        raise ValueError(f"{programs} programs exceed the largest grid, {_LARGEST_GRID}: split the batch")
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
