"""Inputs and minimum work of every op, shared by tests, benchmarks and compile checks.

Each op's folder has a ``cases.py`` with its ``VARIANTS``. :func:`variants` collects them, so a new op needs no
registration elsewhere. Legend: B videos, T frames, P patches, N visible rows, S slots, K groups, H heads, E head width,
D = H·E, F width of the shared video-text space.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import bt_kernels
from bt_kernels import VisibleTokens, ops
from bt_kernels._dispatch import Kernel
from bt_kernels._library import OPS, Op

Inputs = dict[str, Tensor | None]
Draw = Callable[..., Tensor]
NORM_EPS = 1e-5
INDEX_BYTES = 8


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. ``width`` is E, ``tokens`` N, ``shared`` F; ``itemsize`` is in bytes."""

    batch: int
    patches: int
    frames: int
    tokens: int
    heads: int
    width: int
    itemsize: int
    shared: int = 768

    @property
    def dim(self) -> int:
        """D, the width H·E of a row."""
        return self.heads * self.width

    @property
    def groups(self) -> int:
        """K, the number of groups of a regular grid with T slots."""
        return self.tokens // self.frames

    def bytes(self, rows: int) -> int:
        """Return the bytes of ``rows`` rows of D elements in each of the B videos."""
        return self.batch * rows * self.dim * self.itemsize

    def table(self, rows: int) -> int:
        """Return the bytes of ``rows`` rows of D elements that all videos share."""
        return rows * self.dim * self.itemsize


@dataclass(frozen=True)
class Work:
    """The minimum work of any implementation: each input element it needs read once, each result written once."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Variant:
    """An op with one choice of its optional arguments.

    Attributes:
        function: public name, ``bt_kernels.<function>``.
        suffix: distinguishes the variants of one function.
        inputs: makes the inputs from visible tokens, H, E and a function that draws random tensors.
        differentiable: names of the inputs that can have a gradient.
        learning: those that have a gradient in training, where the tower is frozen. ``work`` counts their backward.
        work: returns the work of forward and backward on a regular grid.
        op: name of the registered op; empty: ``function``.
        options: arguments that are no tensors, by name.
        float32: names of the inputs that a model keeps in float32 when the others have 16 bits.
        takes_visible: whether the function takes visible tokens. If not, they only give the number of rows.
        oldest: the oldest architecture that its Triton kernels run on (80 for sm_80).
    """

    function: str
    suffix: str
    inputs: Callable[[VisibleTokens, int, int, Draw], Inputs]
    differentiable: tuple[str, ...]
    learning: tuple[str, ...]
    work: Callable[[Shape], tuple[Work, Work]]
    op: str = ""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    float32: tuple[str, ...] = ()
    takes_visible: bool = True
    oldest: int = 80

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", self.op or self.function)

    @property
    def name(self) -> str:
        return self.function + self.suffix

    def draw(self, visible: VisibleTokens, heads: int = 2, width: int = 4, seed: int = 0) -> Inputs:
        """Draw float64 inputs on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        return self.inputs(
            visible, heads, width, lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
        )

    def arguments(self, inputs: Inputs) -> dict:
        """Return ``inputs`` as the keyword arguments of the public function."""
        return self.options | inputs

    def call(self, function: Callable, inputs: Inputs, visible: VisibleTokens, **more) -> Any:
        """Call ``function``, which takes the public function's arguments, and return its result.

        Several results are concatenated along the rows; those of an op without gradients are returned as a tuple.
        """
        if self.takes_visible:
            more["visible"] = visible
        out = function(**self.arguments(inputs), **more)
        return torch.cat(out, 1) if isinstance(out, tuple) and self.differentiable else out

    def run(self, inputs: Inputs, visible: VisibleTokens, backend: str | None = None) -> Any:
        """Call the public function; see :meth:`call`."""
        return self.call(getattr(bt_kernels, self.function), inputs, visible, backend=backend)


def flat_arguments(variant: Variant, inputs: Inputs, visible: VisibleTokens, wanted: bool = True) -> list:
    """Return ``inputs`` as the positional arguments of the registered op, without its backend."""
    values: dict = dict.fromkeys(("eps", "head_norm_eps", "target_norm_eps"), NORM_EPS)
    values |= inputs | variant.options
    narrow = (t.dtype for name, t in inputs.items() if t is not None and name not in variant.float32)
    values["dtype"] = next(narrow)  # of a result whose dtype is chosen, for the product that reads it
    index = visible.target_index if variant.function == "alignment_loss" else visible.index
    names = ("index", "frame_counts", "patches", "frames", "slots")
    values |= dict(zip(names, visible.as_arguments(index), strict=True))
    values["product"] = None
    values["keep"] = wanted
    values["wanted"] = [wanted] * len(OPS[variant.op].differentiable)
    return [values[name] for name in OPS[variant.op].arguments]


def passes(kernel: Kernel, op: Op, arguments: list, needs: tuple[bool, ...]) -> tuple[Callable, Callable]:
    """Return a kernel's forward and its backward (from ones), without dispatch and autograd, to be called in turn.

    The backward of an op without gradients does nothing.
    """
    outputs: list[Tensor] = []

    def forward() -> None:
        result = kernel.forward(*arguments)
        outputs[:] = result if isinstance(result, tuple) else (result,)

    def backward() -> None:
        if not op.differentiable:
            return
        grads = [torch.ones_like(out) for out in outputs[: op.results]]
        saved = [outputs[place] for place in op.kept] + outputs[op.results :]
        kernel.backward(*grads, *arguments, *saved, needs)

    return forward, backward


@cache
def variants() -> tuple[Variant, ...]:
    """Return the variants of all ops, sorted by the name of the op."""
    folders = sorted(module.name for module in pkgutil.iter_modules(ops.__path__))
    modules = [importlib.import_module(f"bt_kernels.ops.{name}.cases") for name in folders]
    return tuple(variant for module in modules for variant in module.VARIANTS)
