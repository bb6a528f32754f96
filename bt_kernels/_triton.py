"""Launcher of Triton kernels. Triton is imported only when a kernel is requested.

Kernels are ``@triton.jit`` functions on one-dimensional grids (y and z are limited to 65,535), launched by
:func:`launch` with every meta-parameter from a fixed table, without autotuning.
Inside :func:`recorded` launches are collected instead of run. They can then be compiled for any device and their
registers, spills and instructions read, without that device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bt_kernels._dispatch import Kernel, import_on_call

_LARGEST_GRID = 2**31 - 1
_REGISTERS = 65536  # of a multiprocessor, on every target
_recording: list[list[Launch]] = []
around_launch: Callable[[], AbstractContextManager] = nullcontext  # entered around each kernel, by benchmarks


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its grid, run-time arguments, compile-time constants and options (see :func:`launch`).

    ``planned`` are the constants, of which some may be mappings by architecture.
    """

    kernel: Any
    programs: int
    args: tuple
    planned: dict[str, Any]
    warps: int | Mapping[int, int]
    stages: int
    warps_per_sm: int | Mapping[int, int]

    def constants(self, architecture: int) -> dict[str, Any]:
        """Return the compile-time constants on ``architecture``."""
        return {
            name: for_architecture(value, architecture) if isinstance(value, Mapping) else value
            for name, value in self.planned.items()
        }

    def programs_per_sm(self, architecture: int) -> int:
        """Return how many programs are planned to share a multiprocessor of ``architecture`` (90 for sm_90)."""
        return max(1, for_architecture(self.warps_per_sm, architecture) // for_architecture(self.warps, architecture))

    def registers(self, architecture: int) -> int:
        """Return the most registers a thread may use for that; the hardware gives them out by eights."""
        threads = 32 * for_architecture(self.warps, architecture) * self.programs_per_sm(architecture)
        return min(255, _REGISTERS // threads // 8 * 8)

    def options(self, architecture: int) -> dict[str, int]:
        """Return Triton's options of the kernel."""
        options = {"num_warps": for_architecture(self.warps, architecture), "num_stages": self.stages}
        registers = self.registers(architecture)
        return options if registers == 255 else options | {"maxnreg": registers}


def for_architecture(planned: int | Mapping[int, Any], architecture: int) -> Any:
    """Return what is planned for an architecture: in a mapping, that of the newest one which is not newer."""
    return planned if isinstance(planned, int) else planned[max(each for each in planned if each <= architecture)]


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
def architecture(device: torch.device) -> int:
    """Return 90 for sm_90; 80, the oldest there are kernels for, where the interpreter runs them."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _why_not_device(device: torch.device) -> str | None:
    major, minor = divmod(architecture(device), 10)
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
    kernel,
    programs: int,
    *args,
    warps: int | Mapping[int, int] = 4,
    stages: int = 2,
    warps_per_sm: int | Mapping[int, int] = 8,
    **constants,
) -> None:
    """Run ``kernel`` on a grid of ``programs`` on the device of its first tensor; do nothing for 0 programs.

    Args:
        kernel: a ``@triton.jit`` function.
        programs: size of the grid.
        args: the run-time arguments in the kernel's order: tensors, ints, floats, None.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        warps_per_sm: how many warps are planned to share a multiprocessor. The registers of a thread are limited to
            what that leaves: 255 for 8 warps, 168 for 12, 128 for 16, 64 for 32. Compile checks
            (``bench/resources.py``) show that the kernel then spills nothing and that its shared memory fits.
            Here and in ``warps`` a mapping gives the number by architecture (90 for sm_90); that of the newest one
            which is not newer than the device applies.
        constants: the kernel's ``tl.constexpr`` arguments by name, or mappings by architecture of them.

    Raises:
        ValueError: ``programs`` exceeds the largest grid.
    """
    if programs == 0:
        return
    if programs > _LARGEST_GRID:
        raise ValueError(f"{programs} programs exceed the largest grid, {_LARGEST_GRID}: split the batch")
    planned = Launch(kernel, programs, args, constants, warps, stages, warps_per_sm)
    if _recording:
        _recording[-1].append(planned)
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else nullcontext(), around_launch():
        target = architecture(device)
        kernel[(programs,)](*args, **planned.constants(target), **planned.options(target))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches instead of running them; tensors may be on the meta device."""
    _recording.append([])
    try:
        yield _recording[-1]
    finally:
        _recording.pop()
