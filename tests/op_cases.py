"""Inputs and visible forms for the tests of every op: small, in float64, the same for each backend and dtype."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bt_kernels
from bt_kernels import BackendUnavailable, VisibleTokens
from bt_kernels._library import OPS

SHARED = 6  # F, width of the shared video-text space
Inputs = dict[str, Tensor | None]


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


@dataclass(frozen=True)
class Variant:
    """An op with one choice of its optional arguments."""

    op: str
    suffix: str
    inputs: Callable[[VisibleTokens, int, int, Callable[..., Tensor]], Inputs]
    differentiable: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.op + self.suffix

    def draw(self, visible: VisibleTokens, heads: int = 2, width: int = 4, seed: int = 0) -> Inputs:
        """float64 inputs on the CPU."""
        generator = seeded(seed)
        return self.inputs(
            visible, heads, width, lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
        )


def _tower(visible: VisibleTokens, d: int, draw: Callable[..., Tensor]) -> Tensor:
    return draw(visible.batch, visible.frames, 1 + visible.patches, d)


def _embed(visible, heads, width, draw):
    d = heads * width
    return {
        "backbone": _tower(visible, d, draw),
        "cls_token": draw(d),
        "pos": draw(1 + visible.patches, d),
        "time": draw(visible.frames + 2, d),
    }


def _merge(gated: bool):
    def inputs(visible, heads, width, draw):
        d = heads * width
        return {
            "backbone": _tower(visible, d, draw),
            "branch": draw(visible.batch, 1 + visible.tokens, d),
            "gate": draw(d).sigmoid() if gated else None,
        }

    return inputs


def _temporal(visible, heads, width, draw):
    return {"qkv": draw(visible.batch, visible.tokens, 3, heads, width)}


def _spatial(weighted: bool):
    def inputs(visible, heads, width, draw):
        steps = visible.frames if visible.slots is None else visible.slots
        weight = draw(visible.batch, steps).abs() if weighted else None
        return {"qkv": draw(visible.batch, 1 + visible.tokens, 3, heads, width), "frame_weight": weight}

    return inputs


def _alignment(biased: bool):
    def inputs(visible, heads, width, draw):
        d = heads * width
        return {
            "branch": draw(visible.batch, 1 + visible.tokens, d),
            "target": _tower(visible, d, draw),
            "head_weight": draw(SHARED, d) / d**0.5,
            "head_bias": draw(SHARED),
            "head_norm_weight": 1 + draw(SHARED) / 4,
            "head_norm_bias": draw(SHARED),
            "target_norm_weight": 1 + draw(d) / 4,
            "target_norm_bias": draw(d),
            "target_projection": draw(SHARED, d) / d**0.5,
            "target_projection_bias": draw(SHARED) if biased else None,
        }

    return inputs


def _pool(visible, heads, width, draw):
    d = heads * width
    return {"backbone": _tower(visible, d, draw), "branch": draw(visible.batch, 1 + visible.tokens, d)}


_HEAD = ("branch", "head_weight", "head_bias", "head_norm_weight", "head_norm_bias")
VARIANTS = (
    Variant("gather_embed", "", _embed, ("backbone", "cls_token", "pos", "time")),
    Variant("gather_merge", "", _merge(True), ("backbone", "branch", "gate")),
    Variant("gather_merge", "-sum", _merge(False), ("backbone", "branch")),
    Variant("temporal_attention", "", _temporal, ("qkv",)),
    Variant("spatial_attention", "", _spatial(False), ("qkv",)),
    Variant("spatial_attention", "-weighted", _spatial(True), ("qkv",)),
    Variant("alignment_loss", "", _alignment(False), _HEAD),
    Variant("alignment_loss", "-biased", _alignment(True), _HEAD),
    Variant("pool_video_tokens", "", _pool, ("backbone", "branch")),
)
VARIANT = {variant.name: variant for variant in VARIANTS}


def _runs() -> list:
    """(variant, backend, device) of every kernel of every op; those on CUDA tensors are marked as GPU tests."""
    triton_device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    devices = {"reference": ("cpu", "cuda"), "cpu": ("cpu",), "triton": (triton_device,), "cuda": ("cuda",)}
    return [
        pytest.param(
            variant,
            kernel.backend,
            device,
            id=f"{variant.name}-{kernel.backend}-{device}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for variant in VARIANTS
        for kernel in OPS[variant.op].kernels
        for device in devices[kernel.backend]
    ]


RUNS = _runs()


def call(variant: Variant, inputs: Inputs, visible: VisibleTokens, backend: str | None) -> Tensor:
    """Run the op; skip the test with the backends' reasons where this one cannot run. The reference always can."""
    try:
        return getattr(bt_kernels, variant.op)(**inputs, visible=visible, backend=backend)
    except BackendUnavailable as reason:
        if backend in (None, "reference"):
            raise
        pytest.skip(str(reason))


def grads(out: Tensor, inputs: Inputs, names: tuple[str, ...], upstream: Tensor) -> dict[str, Tensor]:
    """Gradient of each named input."""
    found = torch.autograd.grad(out, [inputs[name] for name in names], upstream)
    return dict(zip(names, found, strict=True))


class HostSyncs(TorchDispatchMode):
    """Collects operators whose result (or its shape) the host has to wait for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = func.overloadpacket.__name__
        boolean_index = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for i in arg
        )
        if name in self.WAITING or boolean_index:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))
