"""Choosing the kernel of an op: one ordered tuple an op, the first whose ``why_not`` says None runs."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BACKENDS = ("cuda", "triton", "cpu", "reference")

# Process-wide on purpose: backward passes run on autograd's own threads, which see no context variable.
_forced: list[str] = []


class BackendUnavailable(RuntimeError):
    """The backend asked for by name cannot run this call; the message lists every backend's reason."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an op.

    Attributes:
        backend: one of "cuda", "triton", "cpu", "reference".
        forward, backward: take the arguments of the registered op without its ``backend``.
        why_not: takes the forward's arguments; says why the kernel cannot run them, or None.
        why_not_default: likewise, says why it runs them only when asked for by name, or None.
    """

    backend: str
    forward: Callable
    backward: Callable
    why_not: Callable[..., str | None] = lambda *args: None
    why_not_default: Callable[..., str | None] = lambda *args: None


def unmeasured(*args) -> str:
    """``why_not_default`` of a kernel that never ran where it could show its worth."""
    return "no recorded run shows it to win"


def slower_than_compiled(*args) -> str:
    """``why_not_default`` of a kernel that loses to ``torch.compile`` of plain PyTorch where it was measured."""
    return "bench/results shows torch.compile of the reference to be faster"


def imported(module: str, function: str) -> Callable:
    """``module.function``, imported when first called: Triton kernels, whose import loads Triton."""

    def call(*args):
        return getattr(importlib.import_module(module), function)(*args)

    return call


def check_backend(name: str | None) -> str | None:
    """Return ``name`` if it names a backend or is None.

    Raises:
        ValueError: it does not.
    """
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, but is {name!r}")
    return name


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op inside the block to run on one backend; process-wide, innermost block wins.

    The backward of an op called inside runs on it too, wherever it is started.

    A ``backend=`` given in a call goes before it; the environment variable ``BT_KERNELS_BACKEND`` comes after it.
    ``backend(None)`` restores the automatic choice for its block.

    Raises:
        ValueError: ``name`` is no backend.
    """
    _forced.append(check_backend(name) or "")
    try:
        yield
    finally:
        _forced.pop()


def forced_backend(asked: str | None) -> str | None:
    """The backend to force: the call's own, the innermost context's, or the environment's; None: choose."""
    if asked is not None:
        return check_backend(asked)
    if _forced:
        return _forced[-1] or None
    return check_backend(os.environ.get("BT_KERNELS_BACKEND") or None)


def choose(op: str, kernels: tuple[Kernel, ...], asked: str | None, args: tuple) -> Kernel:
    """The kernel that runs ``op`` on ``args``.

    Raises:
        BackendUnavailable: a forced backend cannot run, or none can.
    """
    forced = forced_backend(asked)
    reasons = {name: "not written for this op" for name in BACKENDS}
    for kernel in kernels:
        if forced is not None and kernel.backend != forced:
            continue
        reason = kernel.why_not(*args)
        if reason is None and forced is None and (default := kernel.why_not_default(*args)):
            reason = f"runs only when asked for by name: {default}"
        if reason is None:
            return kernel
        reasons[kernel.backend] = reason
    for kernel in kernels:  # a forced choice failed: the message names the others' state too
        if forced is not None and kernel.backend != forced:
            reasons[kernel.backend] = kernel.why_not(*args) or "could run"
    asked_for = f"backend {forced!r}" if forced else "no backend"
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise BackendUnavailable(f"{op}: {asked_for} cannot run this call ({listed})")
