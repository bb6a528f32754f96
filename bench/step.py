"""Time and count a pretraining step, its branch alone, and the encoding of a video for chat: ours and the reference's.

    python bench/step.py                      the cases that targets name, rows to bench/results/
    python bench/step.py --part branch --frames 16 --mask-ratio 0 --batch-size 1
    python bench/step.py --sweep              counted bytes and time against frames and ratio, for the plots
    python bench/step.py --fits [--memory 24] the largest batch that fits: on a GPU by trying, else from counted bytes

Contenders: the reference's structure (``baseline.py``) as it is, with fused attention, compiled, with checkpointing;
and ours under each policy of ``recompute``. ViT-L/14 of random weights, depth 4; a loss and its gradients, no
optimizer. On a CPU float32; on a GPU every contender under the same autocast to bfloat16. Nothing is timed while the
tests that hold the baseline against the golden numbers fail (they run here, or ``--conformance`` names their report),
and no contender whose gradients differ from ours or whose matrix products have another dtype.

Medians of alternating runs in one process; those that compile join last. A contender's row is written as soon as it has
run once and again after the rounds of all. "saved": bytes kept for backward, unique storages, parameters excluded.
"peak": the most memory beyond weights and inputs: on a GPU the allocator's, on a CPU resident, each contender in a
process of its own; once with gradients made by the step, once with gradients that were there before, as where they
accumulate. "products": the branch's matrix products alone, the limit of what anyone can reach. "similarity": the
smallest cosine of a gradient (chat: of the tokens) to that of ours, which tells what a tower in another precision
costs.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import contenders
import torch
import torch.nn.functional as F
from contenders import CONTENDERS, GPU_TOWERS, POLICIES, SMALL, TOWERS, Case, Contender, make_inputs, make_model
from counting import Operators, counted_batch, largest_batch, launches, saved_bytes, why_wrong_products
from measure import ROOT, facts, peak_memory, results_file, rounds_of, update, verdicts
from pytest_benchmark.stats import Stats
from torch import Tensor

from bt_adapter import BTAdapterVisionModel
from bt_adapter.towers.products import input_grad, linear, weight_grad

KEYS = ("part", "frames", "ratio", "batch", "contender")  # of a row: what tells it apart
LAST = ("compiled", "mlp own", *GPU_TOWERS)  # contenders whose first run takes long or may fail
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # gradients, relative in norm


@dataclass
class Row:
    """One contender of one case."""

    part: str
    frames: int
    ratio: float
    batch: int
    contender: str
    dtype: str
    seconds: float = 0.0
    iqr: float = 0.0
    rounds: int = 0
    clips_per_s: float = 0.0
    saved: int | None = None
    peak: int | None = None
    peak_gradients_standing: int | None = None
    operators: int = 0
    waits: int = 0
    similarity: float | None = None
    launches: int | None = None
    error: str = ""
    facts: dict = field(default_factory=dict)


def resident_peaks(case: Case, name: str) -> tuple[int | None, int | None]:
    """Bytes a fresh CPU process holds beyond weights and inputs: with gradients made by the run, and there before."""
    command = [sys.executable, __file__, "--peaks-of", name, "--part", case.part, "--frames", str(case.frames)]
    command += ["--mask-ratio", str(case.ratio), "--batch-size", str(case.batch)]
    # what is freed goes back at once, so that resident is what is in use and not what the allocator holds on to
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        print(f"{case.name}: no peak of {name}, its process ended with {done.returncode}: {done.stderr[-200:]}")
        return None, None
    peaks = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak ")]
    return peaks[0], peaks[1] if len(peaks) > 1 else None


def print_peaks(case: Case, name: str) -> None:
    """The child of :func:`resident_peaks`."""
    contender = Contender(name, make_model(case.part, "cpu"), case, "cpu", make_inputs(case, "cpu"))
    gc.collect()  # the model it was copied from
    small = torch.randn(64, 64)
    small @ small  # threads and libraries come up
    for _ in range(1 if case.part == "chat" else 2):  # the first run's gradients stay for the second
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        contender.run()
        print("peak", status("VmHWM") - before)


def status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def products(case: Case, device: str) -> Callable[[], None]:
    """The branch's matrix products of a step, forward and backward, on rows and weights that are there."""
    rows, width = case.batch * (1 + case.visible(device).index.shape[1]), contenders.VIT_L.hidden_size
    of_time = [(3, 1), (1, 1)] if rows > width else [(3, 1), (1, 1), (1, 1)]  # out and fc are one from there on
    shapes = [(o * width, i * width) for o, i in (*of_time, (3, 1), (1, 1), (4, 1), (1, 4))]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    operands = [[torch.randn(s, device=device).to(dtype) for s in ((rows, i), (o, i), (rows, o))] for o, i in shapes]

    @torch.no_grad()
    def run() -> None:
        for _ in range(contenders.DEPTH):
            for x, weight, grad in operands:
                linear(x, weight)
                input_grad(grad, weight)
                weight_grad(grad, x)

    return run


def measure(case: Case, device: str, names: tuple[str, ...], seconds: float, least: int, peaks: bool) -> Iterator[Row]:
    """Yield the row of each contender once it has run, and again after alternating rounds of all.

    The contenders in :data:`LAST` begin when the others' rounds are over.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = tuple(name for name in case.contenders if name in names)

    def new_row(name: str) -> Row:
        return Row(case.part, case.frames, case.ratio, case.batch, name, str(dtype)[6:])

    if not case.timed:
        for name in (n for n in names if n not in ("sdpa", "compiled")):
            row = new_row(name)
            row.peak, row.peak_gradients_standing = resident_peaks(case, name)
            yield row
        return
    model, inputs = make_model(case.part, device), make_inputs(case, device)
    rows: dict[str, Row] = {}
    functions: dict[str, Callable[[], None]] = {}
    if case.part == "branch":
        rows["products"], functions["products"] = new_row("products"), products(case, device)
    expected: list[Tensor] = []
    for names_now in ([n for n in names if n not in LAST], [n for n in names if n in LAST]):
        for name in sorted(names_now, key=lambda n: n not in POLICIES):
            row = rows[name] = new_row(name)
            contender = prepared(row, model, case, device, inputs, expected)
            if contender is not None:
                functions[name] = timed(contender)
                note(row, rounds_of({name: functions[name]}, device, 0.0, 1)[name])
                if device == "cuda":
                    contender.clear()
                    row.peak = int(peak_memory(contender.run, device) * 2**20)
                    row.peak_gradients_standing = int(peak_memory(contender.run, device) * 2**20)
                elif peaks and name not in ("sdpa", "compiled"):
                    row.peak, row.peak_gradients_standing = resident_peaks(case, name)
                contender.clear()
            yield row
        if names_now:
            for name, stats in rounds_of(functions, device, seconds, least).items():
                note(rows[name], stats)
            yield from rows.values()


def prepared(
    row: Row, model: BTAdapterVisionModel, case: Case, device: str, inputs: dict, expected: list[Tensor]
) -> Contender | None:
    """Make a contender, compare its gradients with ``expected`` (filled by the first one) and count its step.

    Returns:
        The contender, or None if it is not to be timed; ``row.error`` then tells why.
    """
    try:
        contender = Contender(row.contender, model, case, device, inputs)
        contender.clear()
        out = contender.run()
        found = [out.float()] if case.part == "chat" else [g.float().clone() for g in contender.gradients()]
        contender.clear()
        with torch.compiler.set_stance("force_eager"), Operators() as operators:
            contender.run()
        contender.clear()
        row.saved = saved_bytes(contender)
        row.launches = launches(contender)
        contender.clear()
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return None
    if not expected:
        expected += found
    pairs = list(zip(found, expected, strict=True))
    row.similarity = min(float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in pairs)
    worst = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    row.error = why_wrong_products(contender, operators) or ""
    if not worst <= TOLERANCE[getattr(torch, row.dtype)] and row.contender not in TOWERS:
        row.error = f"differs from ours by {worst:.1e}"
    if row.contender != "compiled":  # its operators were counted as if it were not
        row.operators, row.waits = operators.count, operators.waits
    return None if row.error else contender


def timed(contender: Contender) -> Callable[[], None]:
    """Return a function that runs a contender without gradients from before."""

    def run() -> None:
        contender.clear()
        contender.run()

    return run


def note(row: Row, stats: Stats) -> None:
    """Put times into a row."""
    row.seconds, row.iqr, row.rounds = stats.median, stats.iqr, stats.rounds
    row.clips_per_s = row.batch / stats.median


def golden_is_green(reports: Sequence[Path]) -> bool:
    """Return whether the tests of the baseline passed: in the reports given, or by running them."""
    if reports:
        passed = [ok for test, ok in verdicts(reports).items() if "test_step" in test and "baseline" in test]
        return bool(passed) and all(passed)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "baseline"]
    command.append("tests/test_step.py")
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def chosen_cases(options: argparse.Namespace, device: str) -> list[Case]:
    if options.sweep:
        shapes = [(8, r) for r in (0.0, 0.3, 0.5, 0.7, 0.9)] + [(t, 0.7) for t in (16, 32)]
        return [Case("branch", *shape, 1 if device == "cpu" else 16) for shape in shapes]
    if device == "cpu":
        return [Case("branch", 8, 0.7, 1), Case("step", 8, 0.7, 1), Case("branch", 16, 0.0, 1), Case("chat", 8, 0.0, 1),
                Case("step", 8, 0.7, 4, timed=False), Case("chat", 100, 0.0, 1, timed=False)]  # fmt: skip
    return [Case("step", 8, 0.7, 52), Case("branch", 8, 0.7, 52), Case("chat", 100, 0.0, 1), Case("chat", 8, 0.0, 1),
            Case("branch", 16, 0.0, 8), Case("step", 8, 0.0, 52)]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("branch", "step", "chat"), help="one case alone")
    parser.add_argument("--peaks", action="store_true", help="its peaks alone (CPU)")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--mask-ratio", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--sweep", action="store_true", help="the branch against frames and ratio")
    parser.add_argument("--fits", action="store_true", help="the largest batch")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB, for --fits without a GPU")
    parser.add_argument("--seconds", type=float, default=None, help="for each contender of a case (CPU 15, GPU 1)")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so long")
    parser.add_argument("--no-peaks", action="store_true", help="leave the processes of their own out (CPU)")
    parser.add_argument("--conformance", type=Path, nargs="+", default=(), help="JUnit XML of the baseline's tests")
    parser.add_argument("--small", action="store_true", help="a small tower: a rehearsal")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/step[-sweep]-<device>.json")
    parser.add_argument("--peaks-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # the baseline was, by the parent
    options = parser.parse_args()
    if options.small:
        contenders.VIT_L = SMALL
    if options.peaks_of:
        print_peaks(Case(options.part, options.frames, options.mask_ratio, options.batch_size), options.peaks_of)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not options.checked and not golden_is_green([report for report in options.conformance if report.exists()]):
        print("tests/test_step.py fails: the baseline is not the reference's procedure, nothing is timed")
        return 1
    if options.fits:
        largest_batch(device) if device == "cuda" else counted_batch(options.memory)
        return 0
    out = options.out or results_file("step-sweep" if options.sweep else "step", facts(device))
    if options.part:
        run_case(options, device, out)
        return 0
    ends = time.monotonic() + 60 * options.minutes
    failed = False
    for case in chosen_cases(options, device):  # each in a process of its own, whose memory is whole
        if time.monotonic() > ends:
            print(f"stopped after {options.minutes} minutes, before {case.name}")
            break
        command = [sys.executable, __file__, "--part", case.part, "--frames", str(case.frames), "--out", str(out)]
        command += ["--mask-ratio", str(case.ratio), "--batch-size", str(case.batch), "--only", *options.only]
        command += ["--rounds", str(options.rounds), *(["--seconds", str(options.seconds)] if options.seconds else [])]
        flags = {"--no-peaks": options.no_peaks, "--peaks": not case.timed, "--small": options.small, "--checked": True}
        command += [flag for flag, on in flags.items() if on]
        failed |= subprocess.run(command, cwd=ROOT).returncode != 0
    return int(failed)


def run_case(options: argparse.Namespace, device: str, out: Path) -> None:
    """Measure one case; its rows take the place of those that ``out`` has of the same contenders and case."""
    case = Case(options.part, options.frames, options.mask_ratio, options.batch_size, not options.peaks)
    about = facts(device)
    seconds = options.seconds or (1.0 if device == "cuda" else 15.0)
    for row in measure(case, device, tuple(options.only), seconds, options.rounds, not options.no_peaks):
        row.facts = about
        update([row], out, KEYS)
        print(f"{case.name:<28} {row.contender:<11} {row.error or told(row)}", flush=True)


def told(row: Row) -> str:
    def megabytes(count: int | None) -> str:
        return "-" if count is None else f"{count / 1e6:.1f}"

    return (
        f"{row.seconds:8.3f} s ±{row.iqr:6.3f} ({row.rounds}) saved {megabytes(row.saved):>8} MB, peak "
        f"{megabytes(row.peak):>8}, gradients standing {megabytes(row.peak_gradients_standing):>8} MB, "
        f"{row.operators} operators, {row.waits} waits, launches {row.launches}, "
        f"cosine to ours {'-' if row.similarity is None else format(row.similarity, '.6f')}"
    )


if __name__ == "__main__":
    sys.exit(main())
