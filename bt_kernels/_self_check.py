"""Comparison of every op on every available backend with the reference: ``python -m bt_kernels --check``.

It compares values and gradients on small float32 inputs, so an installed wheel can be checked in seconds on its target
machine. The test suite checks the same kernels much more thoroughly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bt_kernels import VisibleTokens
from bt_kernels._cases import Inputs, Variant, variants
from bt_kernels._dispatch import BackendUnavailable
from bt_kernels._library import OPS

LARGEST_ERROR = 1e-4
"""Largest error allowed in float32, relative to the largest float64 value; rounding gives about 1e-6."""


@dataclass(frozen=True)
class Result:
    """The largest relative error of one op on one backend (values and gradients), or the reason it cannot run."""

    name: str
    backend: str
    error: float = 0.0
    why_not: str | None = None

    @property
    def wrong(self) -> bool:
        """True if the op ran and its error exceeds :data:`LARGEST_ERROR` or is NaN."""
        return self.why_not is None and not self.error <= LARGEST_ERROR


def check(device: str) -> Iterator[Result]:
    """Compare every op on every backend except the reference, with tensors on ``device``."""
    regular = VisibleTokens.tube(2, 6, 4, 0.5, generator=torch.Generator().manual_seed(0))
    ragged = VisibleTokens.random(2, 6, 4, 0.5, generator=torch.Generator().manual_seed(0))
    for variant in variants():
        for backend in (kernel.backend for kernel in OPS[variant.op].kernels if kernel.backend != "reference"):
            try:
                errors = [e for visible in (regular, ragged) for e in _errors(variant, visible, backend, device)]
            except BackendUnavailable as reason:
                yield Result(variant.name, backend, why_not=" ".join(str(reason).split()))
            else:
                yield Result(variant.name, backend, torch.stack(errors).max().item())


def _errors(variant: Variant, visible: VisibleTokens, backend: str, device: str) -> list[Tensor]:
    inputs = variant.draw(visible, heads=2, width=16)
    dtype = torch.float64 if variant.differentiable else torch.float32  # what is rounded to 8 bits is rounded alike
    exact = _values_and_gradients(variant, inputs, visible, "reference", dtype, "cpu")
    actual = _values_and_gradients(variant, inputs, visible.to(device), backend, torch.float32, device)
    return [
        (value.cpu().double() - expected).abs().max() / expected.abs().max().clamp(min=1)
        for value, expected in zip(actual, exact, strict=True)
    ]


def _values_and_gradients(
    variant: Variant, inputs: Inputs, visible: VisibleTokens, backend: str, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Return the op's result and the gradients of its differentiable inputs for one random output gradient."""
    copies = {name: None if t is None else t.to(device, dtype, copy=True) for name, t in inputs.items()}
    leaves = [copies[name].requires_grad_() for name in variant.differentiable]  # type: ignore[union-attr]
    out = variant.run(copies, visible, backend)
    if not variant.differentiable:
        return [each.double() for each in out]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.device, out.dtype))]
