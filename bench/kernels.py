"""Time every op against plain PyTorch, ``torch.compile`` and the attention libraries, alternating in one process.

    python bench/kernels.py                        the cases that fit this machine, rows to bench/results/
    python bench/kernels.py --op gather_merge --all
    python bench/kernels.py --named --conformance report.xml
    python bench/kernels.py --predict              no timing: the least time each case can take, per device
    pytest bench/kernels.py --benchmark-only       our kernels alone, for pytest-benchmark's own comparisons

On a GPU: bf16, CUDA events, the cache flushed before each run. The host takes longer to enqueue an op than the GPU to
run it, so a run is the replay of a CUDA graph or, where none can be recorded, enqueued while the GPU sleeps; each row
says which ("timing"). On a CPU: float32, wall clock. Medians. An op is not timed where its conformance tests fail (they
run here, or ``--conformance`` names their reports), nor an implementation whose result differs from ours. GB/s is the
least an implementation could move (``cases.py`` of the op) over the time it took; "copy" its share of the bandwidth a
plain copy of 256 MiB reaches.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from devices import DEVICES
from measure import COPY_BYTES, ROOT, facts, peak_memory, replay_of, results_file, rounds_of, update, verdicts
from peers import peers

from bt_kernels import BackendUnavailable, VisibleTokens
from bt_kernels._cases import Shape, Variant, variants
from bt_kernels._library import OPS

# (name, heads, head width, patches)
MODELS = {"B/32": (12, 64, 49), "L/14": (16, 64, 256), "L/14-336": (16, 64, 576), "EVA-g": (16, 88, 256)}
SIZES = {**MODELS, "small": (2, 64, 16)}
FRAMES, RATIOS, BATCHES = (8, 16, 32, 64), (0.0, 0.7), (1, 52)
# (model, frames, ratio, batch) that targets name, on a GPU and on a CPU, and one for a rehearsal.
NAMED = {
    "cuda": [("L/14", 8, 0.7, 52), ("L/14", 16, 0.0, 1), ("EVA-g", 8, 0.7, 52)],
    "cpu": [("L/14", 8, 0.7, 1), ("L/14", 16, 0.0, 1)],
    "small": [("small", 4, 0.5, 2)],
}
CONFORMANCE = ("tests/test_conformance.py", "tests/test_conformance_quantize.py")
# Rows of the frozen tower for the products: a chunk of 32 images, and all images of a step.
PRODUCTS, TOWER_ROWS = ("linear_add", "mlp"), [("L/14", 8, 0.0, 4), ("L/14", 8, 0.0, 52)]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest value: do two implementations agree at all


@dataclass(frozen=True)
class Case:
    """One op at one shape."""

    variant: Variant
    model: str
    frames: int
    ratio: float
    batch: int

    @property
    def name(self) -> str:
        return f"{self.variant.name} {self.model} T={self.frames} ratio {self.ratio} B={self.batch}"

    def visible(self, device: str) -> VisibleTokens:
        patches = SIZES[self.model][2]
        if self.ratio == 0:
            return VisibleTokens.all(self.batch, patches, self.frames, device=device)
        generator = torch.Generator(device).manual_seed(0)
        return VisibleTokens.tube(self.batch, patches, self.frames, self.ratio, generator, device)

    def shape(self, itemsize: int) -> Shape:
        heads, width, patches = SIZES[self.model]
        tokens = (patches - int(self.ratio * patches)) * self.frames
        return Shape(self.batch, patches, self.frames, tokens, heads, width, itemsize)

    def inputs(self, device: str, dtype: torch.dtype) -> dict:
        heads, width, _ = SIZES[self.model]
        generator = torch.Generator(device).manual_seed(1)

        def draw(*size):
            return torch.randn(*size, generator=generator, device=device, dtype=dtype)

        inputs = self.variant.inputs(self.visible(device), heads, width, draw)
        for name in self.variant.learning:
            inputs[name].requires_grad_()
        return inputs


@dataclass
class Row:
    """One implementation of one case."""

    op: str
    model: str
    frames: int
    ratio: float
    batch: int
    direction: str
    implementation: str
    dtype: str
    ms: float = 0.0
    iqr_ms: float = 0.0
    rounds: int = 0
    gb_per_s: float = 0.0
    copy_share: float = 0.0
    peak_mib: float | None = None
    timing: str = ""
    default: bool = False
    error: str = ""
    facts: dict = field(default_factory=dict)


KEYS = ("op", "model", "frames", "ratio", "batch", "direction", "implementation")  # of a row: what tells it apart


def cases(device: str, shapes: list[tuple] | None = None, only: Sequence[str] = ()) -> Iterator[Case]:
    """Yield the cases, attention first: those that targets name or, in ``shapes``, others. ``only``: of these ops."""
    chosen = [v for v in variants() if (not only or v.function in only) and not v.suffix]
    if device == "cpu":  # an op without a kernel is the plain PyTorch that it would be compared with
        chosen = [v for v in chosen if any(kernel.backend == "cpu" for kernel in OPS[v.op].kernels)]
    shapes = NAMED[device] if shapes is None else shapes
    for is_first in (True, False):
        for shape in shapes:
            for variant in chosen:
                if variant.function in PRODUCTS and shape in TOWER_ROWS:  # named, below
                    continue
                if ("attention" in variant.function) == is_first:
                    yield Case(variant, *shape)
    for shape in TOWER_ROWS if device == "cuda" and shapes is NAMED["cuda"] else ():
        yield from (Case(variant, *shape) for variant in chosen if variant.function in PRODUCTS)


def other_shapes(device: str) -> list[tuple]:
    """Return the shapes that targets do not name."""
    return [shape for shape in itertools.product(MODELS, FRAMES, RATIOS, BATCHES) if shape not in NAMED[device]]


class Conformance:
    """Tells whether a kernel passed its conformance tests: in the reports given, or by running them at first need."""

    def __init__(self, device: str, reports: Sequence[Path] = ()) -> None:
        self.device = device
        self.read = verdicts(reports) if reports else None
        self.red: dict[str, str | None] = {}

    def why_not(self, variant: str, backend: str) -> str | None:
        """Return why a kernel is not to be timed, or None. It is printed once."""
        name = f"{variant}-{backend}-{self.device}"
        if name not in self.red:
            self.red[name] = self._run(name) if self.read is None else self._look_up(name, self.read)
            if self.red[name]:
                print(f"{name} is not timed, its conformance is red: {self.red[name]}", flush=True)
        return self.red[name]

    @staticmethod
    def _look_up(name: str, read: dict[str, bool]) -> str | None:
        own = {test: passed for test, passed in read.items() if "test_conformance" in test and f"[{name}-" in test}
        failed = [test for test, passed in own.items() if not passed]
        if failed:
            return f"{len(failed)} of {len(own)} tests failed, such as {failed[0]}"
        return None if own else "no test of it ran"

    @staticmethod
    def _run(name: str) -> str | None:
        wanted = f"{name} and (equals_dense or padding) and not float64"
        command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *CONFORMANCE, "-k", wanted]
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
        return None if done.returncode == 0 and " passed" in last else last


def implementations(case: Case, device: str, dtype: torch.dtype, conformance: Conformance) -> dict[str, Callable]:
    """Our kernels that can run this case, then the peers, as functions of inputs and visible tokens."""
    found = {}
    op = OPS[case.variant.op]
    for kernel in op.kernels:
        if kernel.backend == "reference" or kernel.why_not(torch.empty(0, device=device, dtype=dtype)) is not None:
            continue
        if conformance.why_not(case.variant.name, kernel.backend) is None:
            found[kernel.backend] = lambda i, v, name=kernel.backend: case.variant.run(i, v, name)
    others = peers(case.variant.function, device, dtype)
    if case.model == "small":  # compiling takes longer than all else of a rehearsal
        others.pop("compiled")
    return found | others


def run_both(implementation: Callable, inputs: dict, visible, learning: tuple[str, ...], upstream) -> list:
    """Run forward and backward; of an op without gradients the forward alone."""
    out = implementation(inputs, visible)
    if not learning:
        return list(out)
    return [out, *torch.autograd.grad(out, [inputs[name] for name in learning], upstream)]


def agrees(got: list, expected: list, dtype: torch.dtype) -> str:
    """Empty, or how far apart two implementations are."""
    for a, b in zip(got, expected, strict=True):
        size = b.float().abs().max().item() or 1.0
        error = (a.float() - b.float()).abs().max().item() / size
        if not error <= TOLERANCE[dtype]:
            return f"differs from ours by {error:.1e} of the largest value"
    return ""


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a plain copy."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    stats = rounds_of({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * COPY_BYTES / stats.median


def enqueued(
    functions: dict[str, Callable], device: str
) -> tuple[dict[str, Callable], dict[str, str], dict[str, float]]:
    """Return what is timed of each function: on a GPU, the replay of its CUDA graph if there is one.

    Returns:
        The functions, how each is timed, and the milliseconds that the GPU sleeps before it.
    """
    if device != "cuda":
        return functions, dict.fromkeys(functions, "wall clock"), {}
    replays = {name: replay_of(function) for name, function in functions.items()}
    timed = {name: replays[name] or function for name, function in functions.items()}
    timing = {name: "graph" if replays[name] else "behind a sleep" for name in functions}
    return timed, timing, {name: 1.0 if replays[name] else 5.0 for name in functions}


def measure(case: Case, device: str, seconds: float, bandwidth: float, conformance: Conformance) -> Iterator[Row]:
    """Yield rows of every implementation, forward and forward + backward."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    visible, inputs = case.visible(device), case.inputs(device, dtype)
    learning = case.variant.learning
    default = chosen(case, inputs)
    forward, backward, errors = {}, {}, {}
    expected = upstream = None
    for name, implementation in implementations(case, device, dtype, conformance).items():
        try:
            if upstream is None and learning:
                upstream = torch.randn_like(implementation(inputs, visible))
            got = run_both(implementation, inputs, visible, learning, upstream)
        except (RuntimeError, ValueError, NotImplementedError, BackendUnavailable, ImportError) as error:
            errors[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        expected = expected or got
        errors[name] = agrees(got, expected, dtype)
        if errors[name]:
            continue

        def ahead(implementation=implementation):
            with torch.no_grad():
                return implementation(inputs, visible)

        forward[name] = ahead
        backward[name] = partial(run_both, implementation, inputs, visible, learning, upstream)
    works = case.variant.work(case.shape(dtype.itemsize))
    for direction, functions, least in (
        ("forward", forward, works[0].bytes),
        ("forward+backward", backward, works[0].bytes + works[1].bytes),
    )[: 1 + bool(learning)]:
        for function in functions.values():  # compile and warm up
            function()
        timed, timing, sleeps = enqueued(functions, device)
        stats = rounds_of(timed, device, seconds, sleeps=sleeps)
        for name, error in errors.items():
            row = Row(
                case.variant.name, case.model, case.frames, case.ratio, case.batch, direction, name, str(dtype)[6:]
            )
            row.error, row.default = error, name == default
            if name in stats:
                found = stats[name]
                row.ms, row.iqr_ms, row.rounds = found.median * 1e3, found.iqr * 1e3, found.rounds
                row.gb_per_s = least / found.median / 1e9
                row.copy_share = least / found.median / bandwidth
                row.peak_mib, row.timing = peak_memory(functions[name], device), timing[name]
            yield row


def chosen(case: Case, inputs: dict) -> str:
    """The backend that runs when none is asked for."""
    first = next(t for t in inputs.values() if t is not None)
    for kernel in OPS[case.variant.op].kernels:
        if kernel.why_not(first) is None and kernel.why_not_default(first) is None:
            return kernel.backend
    return ""


def predict(only: Sequence[str]) -> None:
    """The roofline: least bytes over bandwidth, or operations over the peak, whichever takes longer."""
    print(f"{'case':<52}{'MB':>9}{'GFLOP':>9}" + "".join(f"{name + ' us':>20}" for name in DEVICES))
    for case in itertools.chain(cases("cuda", None, only), cases("cuda", other_shapes("cuda"), only)):
        for direction, work in zip(("forward", "backward"), case.variant.work(case.shape(2)), strict=True):
            times = [device.seconds(work.flops, work.bytes) * 1e6 for device in DEVICES.values()]
            line = f"{case.name + ' ' + direction:<52}{work.bytes / 1e6:>9.1f}{work.flops / 1e9:>9.1f}"
            print(line + "".join(f"{t:>20.1f}" for t in times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", default=(), help="these public ops alone")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="every shape, on a CPU too")
    chosen.add_argument("--named", action="store_true", help="the shapes that targets name, on a GPU too")
    chosen.add_argument("--others", action="store_true", help="every shape but these")
    chosen.add_argument("--small", action="store_true", help="one small shape, without torch.compile: a rehearsal")
    parser.add_argument("--conformance", type=Path, nargs="+", default=(), help="JUnit XML of the conformance tests")
    parser.add_argument("--predict", action="store_true", help="print the roofline and time nothing")
    parser.add_argument(
        "--seconds", type=float, default=None, help="for each implementation of a case (CPU 2, GPU 0.05)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so long")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/kernels-<device>.json")
    options = parser.parse_args()
    if options.predict:
        predict(options.op)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = facts(device)
    out = options.out or results_file("kernels", about)
    bandwidth = copy_bandwidth(device)
    print(f"{about}, copy {bandwidth / 1e9:.1f} GB/s", flush=True)
    reports = [report for report in options.conformance if report.exists()]  # a run that was stopped leaves none
    conformance = Conformance(device, reports)
    rows: list[Row] = []
    named = [] if options.others else cases("small" if options.small else device, None, options.op)
    whole = options.all or options.others or (device == "cuda" and not (options.named or options.small))
    others = cases(device, other_shapes(device), options.op) if whole else []
    ends = time.monotonic() + 60 * options.minutes
    for case in itertools.chain(named, others):
        if time.monotonic() > ends:
            print(f"stopped after {options.minutes} minutes, before {case.name}")
            break
        try:
            for row in measure(
                case, device, options.seconds or (0.05 if device == "cuda" else 2.0), bandwidth, conformance
            ):
                row.facts = {**about, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
                rows.append(row)
                mark = "*" if row.default else " "
                told = row.error or (
                    f"{row.ms:9.3f} ms ±{row.iqr_ms:7.3f} {row.gb_per_s:8.1f} GB/s {row.copy_share:6.1%} of copy"
                    + ("" if row.peak_mib is None else f" {row.peak_mib:9.1f} MiB, {row.timing}")
                )
                print(f"{case.name:<50} {row.direction:<17} {row.implementation:<11}{mark} {told}", flush=True)
                update(rows, out, KEYS)
        except torch.OutOfMemoryError as error:
            print(f"{case.name}: {str(error).splitlines()[0]}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    print(f"wrote {out}")
    return int(any(conformance.red.values()))


def _backends() -> list:
    return [
        pytest.param(case, kernel.backend, id=f"{case.name}-{kernel.backend}")
        for case in cases("cpu")
        for kernel in OPS[case.variant.op].kernels
        if kernel.why_not(torch.empty(0)) is None
    ]


@pytest.mark.parametrize("case, backend", _backends())
def test_kernel(case: Case, backend: str, benchmark) -> None:
    """Forward and backward of one of our kernels on the CPU, for ``pytest --benchmark-compare``."""
    visible, inputs = case.visible("cpu"), case.inputs("cpu", torch.float32)
    learning = case.variant.learning
    upstream = torch.randn_like(case.variant.run(inputs, visible, backend)) if learning else None

    def run(inputs, visible):
        return case.variant.run(inputs, visible, backend)

    benchmark.pedantic(run_both, (run, inputs, visible, learning, upstream), rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    sys.exit(main())
