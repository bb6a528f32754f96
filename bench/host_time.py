"""Time that a public op takes on the host around its kernels: forward and backward of tiny tensors, in microseconds.

    python bench/host_time.py                        every op, the backends that run on a CPU
    python bench/host_time.py --op gather_merge

"call": the public function with gradients and its backward. "kernels": the forward's and the backward's kernel alone,
called without checks, choice of a backend and autograd. On a GPU the difference precedes every launch. Times are
processor time of this process, so that other processes matter little: the least of several means.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import bt_kernels
from bt_kernels import BackendUnavailable, VisibleTokens
from bt_kernels._cases import Variant, flat_arguments, passes, variants
from bt_kernels._library import OPS

LIMIT = 150.0  # microseconds of a call


@dataclass(frozen=True)
class Row:
    """Microseconds of one op on one backend."""

    op: str
    backend: str
    call: float
    kernels: float


def microseconds(function: Callable[[], object], calls: int, rounds: int) -> float:
    """Return the least of ``rounds`` mean times of ``calls`` calls."""
    for _ in range(calls):
        function()
    means = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(calls):
            function()
        means.append((time.process_time() - began) / calls)
    return 1e6 * min(means)


def measure(variant: Variant, backend: str, calls: int, rounds: int) -> Row:
    """Time one op; raises BackendUnavailable where it cannot run."""
    visible = VisibleTokens.tube(1, 2, 2, 0.5)
    inputs = {name: None if t is None else t.float() for name, t in variant.draw(visible, 1, 8).items()}
    op = OPS[variant.op]
    leaves = [inputs[name].requires_grad_() for name in variant.learning]  # type: ignore[union-attr]
    arguments = variant.arguments(inputs)
    if variant.takes_visible:
        arguments["visible"] = visible
    function = getattr(bt_kernels, variant.function)
    upstream = [torch.ones_like(out) for out in _tuple(function(**arguments, backend=backend))]

    def call() -> None:
        out = function(**arguments, backend=backend)
        if leaves:
            torch.autograd.grad(_tuple(out), leaves, upstream)

    kernel = next(each for each in op.kernels if each.backend == backend)
    bare = {name: None if t is None else t.detach() for name, t in inputs.items()}
    needs = tuple(name in variant.learning for name in op.differentiable)
    forward, backward = passes(kernel, op, flat_arguments(variant, bare, visible), needs)

    def kernels() -> None:
        forward()
        backward()

    return Row(variant.name, backend, microseconds(call, calls, rounds), microseconds(kernels, calls, rounds))


def _tuple(out) -> tuple:
    return out if isinstance(out, tuple) else (out,)


def rows(only: list[str], calls: int = 200, rounds: int = 7) -> Iterator[Row]:
    """Yield a row for each op (or those named) and backend that runs on a CPU."""
    for variant in variants():
        if only and variant.name not in only:
            continue
        for backend in ("cpu", "reference"):
            try:
                yield measure(variant, backend, calls, rounds)
            except BackendUnavailable:
                continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="this op alone; may be given more than once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'op':<28}{'backend':<12}{'call':>8}{'kernels':>10}{'between':>10}   microseconds, forward and backward")
    for row in rows(options.op):
        over = "   <--" if row.backend == "cpu" and row.call > LIMIT else ""
        print(f"{row.op:<28}{row.backend:<12}{row.call:>8.0f}{row.kernels:>10.0f}{row.call - row.kernels:>10.0f}{over}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
