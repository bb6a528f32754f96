"""Visible forms and runs for the tests of every op, the same for each backend and dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from device_work import host_waits
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bt_kernels import BackendUnavailable, VisibleTokens
from bt_kernels._cases import Inputs, Variant, variants
from bt_kernels._library import OPS
from bt_kernels._triton import interpreting


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Form:
    """A way tokens can be visible, with the head sizes to run it at."""

    name: str
    build: Callable[[], VisibleTokens]
    heads: int = 2
    width: int = 4


def _reference_mask() -> VisibleTokens:
    pattern = torch.rand(2, 8, generator=seeded(3)).argsort(1) < 5
    return VisibleTokens.from_reference_mask(pattern.repeat(1, 4), 4)


def _empty_frame() -> VisibleTokens:
    """P = 4, T = 3; video 0 shows nothing of frame 1, video 1 nothing of patch 2 and has a padded row."""
    index = torch.tensor([[0, 2, 3, 6, 9, 11], [1, 2, 4, 9, 10, -1]])
    return VisibleTokens(index, patches=4, frames=3).validate()


def _tubes(ratio: float, patches: int, frames: int) -> Callable[[], VisibleTokens]:
    return lambda: VisibleTokens.tube(2, patches, frames, ratio, generator=seeded(1))


def _random(ratio: float, patches: int, frames: int, counts: list[int] | None = None) -> Callable[[], VisibleTokens]:
    frame_counts = None if counts is None else torch.tensor(counts)
    batch = 2 if counts is None else len(counts)
    return lambda: VisibleTokens.random(batch, patches, frames, ratio, seeded(2), frame_counts=frame_counts)


FORMS = (
    Form("all", lambda: VisibleTokens.all(2, 5, 4)),
    Form("tube70", _tubes(0.7, 10, 4)),
    Form("tube0", _tubes(0.0, 4, 3)),
    Form("reference_mask", _reference_mask),
    Form("random50", _random(0.5, 6, 4)),
    Form("padded", _random(0.3, 4, 5, [1, 5, 3])),
    Form("padded_to_nothing", _random(0.2, 3, 4, [0, 4])),
    Form("one_frame", lambda: VisibleTokens.all(2, 5, 1)),
    Form("one_frame_random", _random(0.5, 6, 1)),
    Form("odd_frames", _tubes(0.5, 6, 5)),
    Form("one_patch", _tubes(0.7, 3, 4)),
    Form("one_token", _random(0.95, 4, 3)),
    Form("empty_frame", _empty_frame),
    Form("windows", lambda: VisibleTokens.all(2, 4, 6, slots=3)),
    Form("windows_across_patches", lambda: VisibleTokens.all(2, 4, 5, slots=2)),
    Form("heads64", _tubes(0.5, 4, 3), heads=2, width=64),
    Form("heads88", _random(0.4, 4, 3, [3, 2]), heads=1, width=88),
    Form("odd_width", _random(0.4, 4, 3), heads=1, width=7),
)
FORM = {form.name: form for form in FORMS}


VARIANTS = tuple(each for each in variants() if each.differentiable)  # test_conformance_quantize.py has the other
VARIANT = {variant.name: variant for variant in VARIANTS}


def runs(variants: Sequence[Variant]) -> list:
    """(variant, backend, device) of every kernel of these ops; those on CUDA tensors are marked as GPU tests."""
    triton_device = "cpu" if interpreting() else "cuda"
    devices = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": (triton_device,), "cuda": ("cuda",)}
    return [
        pytest.param(
            variant,
            kernel.backend,
            device,
            id=f"{variant.name}-{kernel.backend}-{device}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for variant in variants
        for kernel in OPS[variant.op].kernels
        for device in devices[kernel.backend]
    ]


RUNS = runs(VARIANTS)
VISIBLE_RUNS = [run for run in RUNS if run.values[0].takes_visible]


def grid(names: str, *axes: Sequence, kept: Callable[..., bool]) -> pytest.MarkDecorator:
    """Parametrize a test over all combinations of the axes' values.

    Every commit runs the combinations for whose places on the axes, counted from 0, ``kept`` is true. The others are
    marked ``full``.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        chosen = [_as_parameters(axis[place]) for axis, place in zip(axes, places, strict=True)]
        marks = [mark for parameters in chosen for mark in parameters.marks]
        cases.append(
            pytest.param(
                *(value for parameters in chosen for value in parameters.values),
                id="-".join(parameters.id for parameters in chosen),
                marks=marks if kept(*places) else [*marks, pytest.mark.full],
            )
        )
    return pytest.mark.parametrize(names, cases)


def _as_parameters(value):
    if hasattr(value, "marks"):
        return value
    name = getattr(value, "name", None) or getattr(value, "__name__", None) or str(value).removeprefix("torch.")
    return pytest.param(value, id=name)


def interpreted(backend: str, device: str) -> bool:
    """Whether a kernel runs in Triton's interpreter, which is slow."""
    return backend == "triton" and device == "cpu"


def run_at(place: int) -> tuple[bool, bool]:
    """Of a run by its place in ``RUNS``: whether it is interpreted, and whether its op is called with options."""
    variant, backend, device = RUNS[place].values
    return interpreted(backend, device), variant.name != variant.op


def call(variant: Variant, inputs: Inputs, visible: VisibleTokens, backend: str | None) -> Tensor:
    """Run the op; skip the test with the backends' reasons where this one cannot run. The reference always can."""
    try:
        return variant.run(inputs, visible, backend)
    except BackendUnavailable as reason:
        if backend in (None, "reference"):
            raise
        pytest.skip(str(reason))


def grads(out: Tensor, inputs: Inputs, names: tuple[str, ...], upstream: Tensor) -> dict[str, Tensor]:
    """Gradient of each named input."""
    found = torch.autograd.grad(out, [inputs[name] for name in names], upstream)
    return dict(zip(names, found, strict=True))


class HostSyncs(TorchDispatchMode):
    """Collects operators for which the host waits on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0
        self.counting = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.counting = False
        yield
        self.counting = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        if self.counting and host_waits(func, args, kwargs or {}):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def scattered(module: nn.Module, deviation: float = 0.05) -> nn.Module:
    """``module`` with every parameter drawn around where it started: a zero start would hide errors."""
    generator = seeded(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * deviation)
    return module


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def results(run, leaves: list[Tensor]) -> list[Tensor]:
    """The result of ``run()`` and the gradients of a weighted sum of it."""
    out = run()
    loss = (out * normal(*out.shape, dtype=out.dtype, seed=2)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def assert_all_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within ``tolerance`` of the largest value of what is expected.

    A key bias has the gradient 0, so what is expected is rounding alone: hence a floor beside the largest of all.
    """
    floor = 1e-14 * max(tensor.abs().max().item() for tensor in expected)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        error, largest = (one - other).abs().max().item(), other.abs().max().item()
        assert error <= tolerance * largest + floor, f"tensor {number}: error {error} of {largest}"
