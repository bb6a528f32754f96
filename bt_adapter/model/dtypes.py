"""Choose the default dtype of a command, with a reason that is printed and recorded.

The default is bfloat16 on a GPU, or float16 if the GPU lacks bfloat16. On a CPU it is float32, unless a measurement of
a few milliseconds shows that bfloat16 is faster in all three matrix products of training: many CPUs only emulate
bfloat16, up to 60 times slower than float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

ROWS, WIDTH = 192, 384  # 28 million multiply-adds per product: half a millisecond in float32
REPEATS = 7
COMPARED = (torch.float32, torch.bfloat16)
STOP_AT = 3.0  # bfloat16 that takes this many times float32's time is not timed further
LARGEST_SHARE = 0.8  # bfloat16 must take less than this share of float32's time to justify its loss of accuracy


@dataclass(frozen=True)
class ChosenDtype:
    """A dtype and the reason for it.

    Attributes:
        name: "float32", "bfloat16" or "float16".
        why: the reason, as the end of a sentence.
    """

    name: str
    why: str

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return getattr(torch, self.name)

    def __str__(self) -> str:
        return f"computing in {self.name}: {self.why}"


def choose_dtype(asked: str, device: torch.device | str) -> ChosenDtype:
    """Choose the dtype to compute in.

    Args:
        asked: "float32", "bfloat16" or "float16", which is returned unchanged; or "auto".
        device: device of the computation.
    """
    if asked != "auto":
        return ChosenDtype(asked, "as asked for")
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        gpu = f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"
        if major >= 8:
            return ChosenDtype("bfloat16", f"the default on a GPU; {gpu} multiplies it in hardware")
        return ChosenDtype("float16", f"the default on a GPU without bfloat16 in hardware, as {gpu}")
    if device.type == "cpu":
        return _for_cpu()
    return ChosenDtype("float32", f"the default on a device of type {device.type}")


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Make the autocast context for a dtype as in :func:`choose_dtype`; float32 disables it."""
    dtype = choose_dtype(precision, device).dtype
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


@cache
def _for_cpu() -> ChosenDtype:
    """Choose the dtype for a CPU by a measurement, which is made once per process."""
    speedups = measure_speedups()
    names = ("forward", "input gradient", "weight gradient")[: len(speedups)]
    times = ", ".join(f"{name} {1 / speedup:.2g}" for name, speedup in zip(names, speedups, strict=True))
    faster = len(speedups) == 3 and speedups[-1] >= 1 / LARGEST_SHARE
    why = f"measured on this CPU, products in bfloat16 take this share of float32's time: {times}"
    return ChosenDtype("bfloat16" if faster else "float32", why)


def measure_speedups() -> list[float]:
    """Time the three matrix products of training alternately in bfloat16 and float32.

    Returns:
        The speedups of bfloat16 for forward, input gradient and weight gradient, in this order. The list ends with the
        first product in which bfloat16 is not clearly faster: the others do not matter then, and would be slow if
        bfloat16 is emulated.
    """
    speedups = []
    with _one_thread(), torch.inference_mode():
        for product in products():
            float32, bfloat16 = _seconds(product)
            speedups.append(float32 / bfloat16)
            if speedups[-1] < 1 / LARGEST_SHARE:
                break
    return speedups


def products() -> Iterator[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Yield the three products of a linear layer of input x, weight w and output gradient g, in their real layouts."""
    yield lambda x, w, g: x @ w.t()
    yield lambda x, w, g: g @ w
    yield lambda x, w, g: g.t() @ x


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread within the context, so that waiting for other threads on a busy machine is not measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[float, float]:
    """Return the shortest time of a product in float32 and bfloat16, alternating, after a warm-up of each.

    The loop ends early if bfloat16 takes several times as long.
    """
    shapes = ((ROWS, WIDTH), (WIDTH, WIDTH), (ROWS, WIDTH))
    operands = {dtype: [torch.ones(shape, dtype=dtype) for shape in shapes] for dtype in COMPARED}
    for dtype in COMPARED:
        product(*operands[dtype])
    shortest = dict.fromkeys(COMPARED, math.inf)
    for _ in range(REPEATS):
        for dtype in COMPARED:
            begin = time.perf_counter()
            product(*operands[dtype])
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - begin)
        if shortest[torch.bfloat16] > STOP_AT * shortest[torch.float32]:
            break
    return shortest[torch.float32], shortest[torch.bfloat16]
