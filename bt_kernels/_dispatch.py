"""Selection of the kernel that runs an op: the first in the op's ordered tuple whose ``why_not`` returns None."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

BACKENDS = ("cuda", "triton", "cpu", "reference")

# Process-wide on purpose: backward passes run on autograd's own threads, which see no context variable.
_forced: list[str] = []


class BackendUnavailable(RuntimeError):
    """Raised when the requested backend cannot run a call; the message lists the reason of every backend."""


def _refuse_backward(*args):
    """Serve as ``backward`` of a kernel of an op without gradients; it is never called."""
    raise RuntimeError("this op has no gradient")


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        backend: one of "cuda", "triton", "cpu", "reference".
        forward, backward: take the arguments of the registered op without its ``backend``. An op without gradients has
            no backward.
        why_not: takes the forward's arguments; returns the reason why the kernel cannot run, or None.
        why_not_default: takes the same; returns the reason why the kernel runs only when requested by name, or None.
    """

    backend: str
    forward: Callable
    backward: Callable = _refuse_backward
    why_not: Callable[..., str | None] = lambda *args: None
    why_not_default: Callable[..., str | None] = lambda *args: None


def unmeasured(*args) -> str:
    """Serve as ``why_not_default`` of a kernel whose speed has not been measured on its hardware."""
    return "no recorded run shows it to win"


def slower_than_compiled(*args) -> str:
    """Serve as ``why_not_default`` of a kernel measured to be slower than ``torch.compile`` of plain PyTorch."""
    return "bench/results shows torch.compile of the reference to be faster"


def import_on_call(module: str, function: str) -> Callable:
    """Wrap ``module.function`` so that its module is imported at the first call: Triton modules import Triton."""

    def call(*args):
        return getattr(importlib.import_module(module), function)(*args)

    return call


def check_backend(name: str | None) -> str | None:
    """Return ``name`` if it names a backend or is None.

    Raises:
        ValueError: ``name`` is neither a backend nor None.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but is {name!r}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op inside the block to run on one backend; the innermost block applies to the whole process.

    The backward of an op called inside the block runs on that backend too, wherever it is started.

    An argument ``backend=`` of a call overrides the block, and the block overrides the environment variable
    ``BT_KERNELS_BACKEND``. ``backend(None)`` restores the automatic choice inside its block.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    _forced.append(check_backend(name) or "")
    try:
        yield
    finally:
        _forced.pop()


def forced_backend(requested: str | None) -> str | None:
    """Return the backend forced by the call, else by the innermost block, else by the environment; None if none is."""
    if requested is not None:
        return check_backend(requested)
    if _forced:
        return _forced[-1] or None
    return check_backend(os.environ.get("BT_KERNELS_BACKEND") or None)


def choose(op: str, kernels: tuple[Kernel, ...], requested: str | None, args: Sequence) -> Kernel:
    """Return the kernel that runs ``op`` on ``args``.

    Raises:
        BackendUnavailable: a forced backend cannot run, or none can.
    """
    forced = forced_backend(requested)
    for kernel in kernels:
        # why_not may load a library, so it is asked last.
        wanted = kernel.backend == forced if forced else kernel.why_not_default(*args) is None
        if wanted and kernel.why_not(*args) is None:
            return kernel
    reasons = {name: "not written for this op" for name in BACKENDS}
    for kernel in kernels:
        reason = kernel.why_not(*args)
        if reason is None and forced is None:
            reason = f"runs only when requested by name: {kernel.why_not_default(*args)}"
        reasons[kernel.backend] = reason or "could run"
    subject = f"backend {forced!r}" if forced else "no backend"
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(f"{op}: {subject} cannot run this call ({listed})")
