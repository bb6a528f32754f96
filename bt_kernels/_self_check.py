"""Every op on every backend that runs here against the reference: ``python -m bt_kernels --check``.

Small inputs in float32, values and gradients, so that an installed wheel can be tried in seconds where it is to run.
The test suite holds the same kernels to far more.
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
"""Of a float32 kernel, relative to the largest value of the float64 reference: rounding gives about 1e-6."""


@dataclass(frozen=True)
class Result:
    """One op on one backend: the largest relative error over values and gradients, or why it does not run here."""

    name: str
    backend: str
    error: float = 0.0
    why_not: str | None = None

    @property
    def wrong(self) -> bool:
        """Whether it ran and its numbers are off; NaN is off too."""
        return self.why_not is None and not self.error <= LARGEST_ERROR


def check(device: str) -> Iterator[Result]:
    """Compare every op on every backend but the reference, for tensors on ``device``."""
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
    exact = _values_and_gradients(variant, inputs, visible, "reference", torch.float64, "cpu")
    ours = _values_and_gradients(variant, inputs, visible.to(device), backend, torch.float32, device)
    return [
        (got.cpu().double() - want).abs().max() / want.abs().max().clamp(min=1)
        for got, want in zip(ours, exact, strict=True)
    ]


def _values_and_gradients(
    variant: Variant, inputs: Inputs, visible: VisibleTokens, backend: str, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """The result of the op, and the gradients of its differentiable inputs from one random gradient."""
    own = {name: None if t is None else t.to(device, dtype, copy=True) for name, t in inputs.items()}
    learning = [own[name].requires_grad_() for name in variant.differentiable]  # type: ignore[union-attr]
    out = variant.run(own, visible, backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [out.detach(), *torch.autograd.grad(out, learning, upstream.to(out.device, out.dtype))]
