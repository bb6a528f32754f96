"""Time and count a pretraining step, its branch alone, and the encoding of a video for chat: ours and the reference's.

    python bench/step.py                      the cases that targets name, rows to bench/results/
    python bench/step.py --part branch --frames 16 --ratio 0 --batch 1
    python bench/step.py --sweep              counted bytes and time against frames and ratio, for the plots
    python bench/step.py --fits [--memory 24] the largest batch that fits: on a GPU by trying, else from counted bytes

Contenders: the reference's structure (``baseline.py``) as it is, with fused attention, compiled, with checkpointing;
and ours under each policy of ``recompute``. ViT-L/14 of random weights, depth 4; a loss and its gradients, no
optimizer. On a CPU float32; on a GPU bf16, the reference under autocast as it trains. Nothing is timed while the tests
that hold the baseline against the golden numbers fail, and no contender whose gradients differ from ours.

Medians of alternating runs in one process. "saved": bytes kept for backward, unique storages, parameters excluded.
"peak": the most memory beyond weights and inputs: on a GPU the allocator's, on a CPU resident, each contender in a
process of its own; once with gradients made by the step, once with gradients that were there before, as where they
accumulate. "products": the branch's matrix products alone, the limit of what anyone can reach. "similarity": the
smallest cosine of a gradient (chat: of the tokens) to that of ours, which tells what a tower in another precision
costs.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from baseline import Baseline, Options
from measure import ROOT, facts, peak_memory, results_file, rounds_of, write
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.config import TowerConfig
from bt_adapter.products import input_grad, linear, weight_grad
from bt_kernels import VisibleTokens

VIT_L = TowerConfig(1024, 4096, 24, 16, 224, 14, 768)
BASELINES = {
    "eager": Options(),
    "sdpa": Options(sdpa=True),
    "compiled": Options(),
    "checkpoint": Options(checkpoint=True),
}
POLICIES = ("none", "mlp", "layer")
# Ours with the tower run otherwise (``Tower.optimize``), under "mlp"; on a GPU it is in bfloat16 always.
TOWERS: dict[str, dict] = {"half": {"dtype": torch.bfloat16}}
GPU_TOWERS: dict[str, dict] = {
    "compiled tower": {"compile": True},
    "graphs": {"graphs": True},
    "fp8": {"fp8": True, "compile": True},
}
if torch.cuda.is_available():
    TOWERS = GPU_TOWERS
CONTENDERS = (*BASELINES, *POLICIES, *TOWERS)
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # gradients, relative in norm


@dataclass(frozen=True)
class Case:
    """What is run: "branch" and "step" forward and backward, "chat" forward."""

    part: str
    frames: int
    ratio: float
    batch: int
    timed: bool = True  # else memory alone

    @property
    def contenders(self) -> tuple[str, ...]:
        if self.part == "chat":
            return ("eager", "sdpa", "compiled", "none", *TOWERS)
        return CONTENDERS if self.part == "step" else (*BASELINES, *POLICIES)

    @property
    def name(self) -> str:
        return f"{self.part} T={self.frames} ratio {self.ratio} B={self.batch}"

    def mask(self, device: str) -> Tensor | None:
        """Bool ``[B, P·T]``, patch by patch, True = masked: true tubes."""
        if self.ratio == 0:
            return None
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(self.batch, VIT_L.patches, generator=generator).argsort(1)
        tubes = order < int(self.ratio * VIT_L.patches)
        return tubes[:, :, None].expand(-1, -1, self.frames).flatten(1).to(device)

    def visible(self, device: str) -> VisibleTokens:
        mask = self.mask(device)
        if mask is None:
            return VisibleTokens.all(self.batch, VIT_L.patches, self.frames, device=device)
        return VisibleTokens.from_reference_mask(mask, self.frames)


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


class Contender:
    """A model in one of the forms, and its run of a case: ``run()``, then gradients in ``parameters``."""

    def __init__(self, name: str, model: BTAdapterVisionModel, case: Case, device: str, inputs: dict[str, Tensor]):
        self.name, self.case, self.device, self.inputs = name, case, device, inputs
        self.visible = case.visible(device)
        self.mask = case.mask(device)
        if name in BASELINES:
            self.model = Baseline(model, BASELINES[name]).to(device)
            if name == "compiled":
                for layer in self.model.tower:
                    layer.compile(dynamic=False)
                self.model.branch = torch.compile(self.model.branch, dynamic=False)
        elif name in TOWERS:
            self.model = copy.deepcopy(model)
            self.model.tower.optimize(**TOWERS[name])
        else:
            self.model = model
        learning = self.model if name in BASELINES else self.model.branch
        self.parameters = [p for p in learning.parameters() if p.requires_grad]

    def run(self) -> Tensor:
        """Gradients set anew."""
        amp = self.device == "cuda" and self.name in BASELINES
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            out = getattr(self, self.case.part)()
        if out.requires_grad:
            out.backward()
        return out

    def branch(self) -> Tensor:
        states, cotangent = self.inputs["states"], self.inputs["cotangent"]
        if self.name in BASELINES:
            z = self.model.branch([x.flatten(0, 1) for x in states], self.case.frames, self.mask)
        else:
            self.model.recompute, branch = self.name, self.model.branch
            z = branch.embed(states[0], self.model.tower.position, self.visible)
            for layer, x in enumerate(states):
                z = z if layer == 0 else branch.merge(x, z, self.visible)
                z = branch.run_layer(layer, z, self.visible, None)
        return (z * cotangent[:, : z.shape[1]]).sum()

    def step(self) -> Tensor:
        pixels, text = self.inputs["pixels"], self.inputs["text"]
        if self.name in BASELINES:
            losses = self.model(pixels, text, self.mask)
        else:
            self.model.recompute = "mlp" if self.name in TOWERS else self.name
            losses = self.model.pretraining_losses(self.model(pixels, self.visible), text)
        return sum(losses.values())

    @torch.no_grad()
    def chat(self) -> Tensor:
        return self.model.video_tokens(self.inputs["pixels"])

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Of some weights that every form has alike."""
        spatial = self.model.spatial if self.name in BASELINES else self.model.branch.spatial
        own = self.model if self.name in BASELINES else self.model.branch
        return [spatial[0].fc1.weight.grad, spatial[-1].fc2.weight.grad, own.time.grad, own.merge_gate.grad]


def make_model(part: str, device: str) -> BTAdapterVisionModel:
    """For the branch alone, a tower of no more layers than it has."""
    torch.manual_seed(0)
    with torch.device(device):
        config = dataclasses.replace(VIT_L, num_hidden_layers=4) if part == "branch" else VIT_L
        model = BTAdapterVisionModel(config, BTAdapterConfig(depth=4)).eval()
    with torch.no_grad():
        for layer in model.branch.temporal:  # a fresh one adds nothing
            layer.fc.weight.normal_(0, 0.02)
    if device == "cuda":
        model.tower.optimize(dtype=torch.bfloat16)
    return model


def make_inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if case.part == "branch":
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        tokens = 1 + VIT_L.patches
        states = [draw(case.batch, case.frames, tokens, 1024).to(dtype) for _ in range(4)]
        return {"states": states, "cotangent": draw(case.batch, tokens * case.frames, 1024)}
    return {"pixels": draw(case.batch, case.frames, 3, 224, 224), "text": draw(case.batch, 768)}


def saved_bytes(contender: Contender) -> int | None:
    """Unique storages kept for backward, without parameters, inputs and buffers."""
    if contender.case.part == "chat":
        return None
    own = {t.untyped_storage().data_ptr() for t in contender.model.parameters()}
    if contender.case.part == "branch":  # of the product that stands for a loss
        own.add(contender.inputs["cotangent"].untyped_storage().data_ptr())
    kept: dict[int, int] = {}

    @torch.compiler.disable
    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        getattr(contender, contender.case.part)()
    return sum(kept.values())


class Operators(TorchDispatchMode):
    """Counts operators that do work, and those whose result a host waits for on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        indices = args[1] if func.overloadpacket.__name__ in ("index", "index_put_", "index_put") else ()
        boolean = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        self.waits += boolean or func.overloadpacket.__name__ in self.WAITING
        self.count += not func.is_view
        return result


def launches(contender: Contender) -> int | None:
    """Kernels a run starts on a GPU."""
    if contender.device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as record:
        contender.run()
        torch.cuda.synchronize()
    return sum(1 for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def resident_peaks(case: Case, name: str) -> tuple[int | None, int | None]:
    """Bytes a fresh CPU process holds beyond weights and inputs: with gradients made by the run, and there before."""
    command = [sys.executable, __file__, "--peaks-of", name, "--part", case.part, "--frames", str(case.frames)]
    command += ["--ratio", str(case.ratio), "--batch", str(case.batch)]
    # what is freed goes back at once, so that resident is what is in use and not what the allocator holds on to
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
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
    rows = case.batch * (1 + case.visible(device).index.shape[1])
    shapes = [(3072, 1024), (1024, 1024), (1024, 1024), (3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)]
    if rows > 1024:
        shapes.pop(1)  # out and fc as one
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    operands = [[torch.randn(s, device=device).to(dtype) for s in ((rows, i), (o, i), (rows, o))] for o, i in shapes]

    @torch.no_grad()
    def run() -> None:
        for _ in range(4):
            for x, weight, grad in operands:
                linear(x, weight)
                input_grad(grad, weight)
                weight_grad(grad, x)

    return run


def measure(case: Case, device: str, names: tuple[str, ...], seconds: float, least: int, peaks: bool) -> Iterator[Row]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    names = tuple(name for name in case.contenders if name in names)
    if not case.timed:
        for name in (n for n in names if n not in ("sdpa", "compiled")):
            row = Row(case.part, case.frames, case.ratio, case.batch, name, str(dtype)[6:])
            row.peak, row.peak_gradients_standing = resident_peaks(case, name)
            yield row
        return
    model, inputs = make_model(case.part, device), make_inputs(case, device)
    rows, running, expected = {}, {}, None
    for name in sorted(names, key=lambda n: n not in POLICIES):
        row = rows[name] = Row(case.part, case.frames, case.ratio, case.batch, name, str(dtype)[6:])
        try:
            contender = Contender(name, model, case, device, inputs)
            contender.clear()
            out = contender.run()
            found = [out.float()] if case.part == "chat" else [g.float().clone() for g in contender.gradients()]
        except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
            row.error = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            continue
        expected = expected or found
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
        row.similarity = min(
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(found, expected, strict=True)
        )
        if not worst <= TOLERANCE[dtype] and name not in TOWERS:
            row.error = f"differs from ours by {worst:.1e}"
            continue
        running[name] = contender
        contender.clear()
        row.saved = saved_bytes(contender)
        with Operators() as operators:
            contender.run()
        row.operators, row.waits = operators.count, operators.waits
        row.launches = launches(contender)
        contender.clear()

    def timed(contender: Contender) -> Callable[[], None]:
        def run() -> None:
            contender.clear()
            contender.run()

        return run

    functions = {name: timed(contender) for name, contender in running.items()}
    if case.part == "branch":
        rows["products"] = Row(case.part, case.frames, case.ratio, case.batch, "products", str(dtype)[6:])
        functions["products"] = products(case, device)
    for name, stats in rounds_of(functions, device, seconds, least).items():
        row = rows[name]
        row.seconds, row.iqr, row.rounds = stats.median, stats.iqr, stats.rounds
        row.clips_per_s = case.batch / stats.median
    for name, contender in running.items():
        contender.clear()
        if device == "cuda":
            rows[name].peak = int(peak_memory(contender.run, device) * 2**20)
            rows[name].peak_gradients_standing = int(peak_memory(contender.run, device) * 2**20)
            contender.clear()
        elif peaks and name not in ("sdpa", "compiled"):
            rows[name].peak, rows[name].peak_gradients_standing = resident_peaks(case, name)
    yield from rows.values()


def largest_batch(device: str) -> None:
    """Print the largest batch of a step (T = 8, ratio 0.7) for each contender, by trying."""
    model = make_model("step", device)
    for name in CONTENDERS:
        fits, fails = 0, None
        while fails is None or fails - fits > max(1, fits // 32):
            batch = max(1, 2 * fits) if fails is None else (fits + fails) // 2
            try:
                case = Case("step", 8, 0.7, batch)
                contender = Contender(name, model, case, device, make_inputs(case, device))
                contender.run()
                contender.clear()
                fits = batch
            except torch.OutOfMemoryError:
                fails = batch
            contender = None
            gc.collect()
            torch.cuda.empty_cache()
        print(f"{name}: {fits} clips of 8 frames, ratio 0.7")


def counted_batch(memory: float) -> None:
    """Print the largest batch of the branch (T = 8, ratio 0.7, float32) from the bytes that each contender keeps.

    Counted too: the tower's weights, the branch's, its gradients and Adam's two moments. Not counted: what lives within
    a layer, and the tower's state.
    """
    model = make_model("step", "cpu")
    fixed = sum(p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in model.parameters())
    for name in (*BASELINES, *POLICIES):
        kept = []
        for batch in (1, 2):
            case = Case("branch", 8, 0.7, batch)
            kept.append(saved_bytes(Contender(name, model, case, "cpu", make_inputs(case, "cpu"))) or 0)
        clip = kept[1] - kept[0]
        print(f"{name}: {clip / 1e6:.1f} MB a clip, {int((memory * 2**30 - fixed) // clip)} clips in {memory:g} GiB")


def golden_is_green() -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_step.py"]
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
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--sweep", action="store_true", help="the branch against frames and ratio")
    parser.add_argument("--fits", action="store_true", help="the largest batch")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB, for --fits without a GPU")
    parser.add_argument("--seconds", type=float, default=None, help="for each contender of a case (CPU 15, GPU 1)")
    parser.add_argument("--rounds", type=int, default=3, help="at least so many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further case after so long")
    parser.add_argument("--no-peaks", action="store_true", help="leave the processes of their own out (CPU)")
    parser.add_argument("--out", type=Path, help="JSON file; default: bench/results/step[-sweep]-<device>.json")
    parser.add_argument("--peaks-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peaks_of:
        print_peaks(Case(options.part, options.frames, options.ratio, options.batch), options.peaks_of)
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not golden_is_green():
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
        command += ["--ratio", str(case.ratio), "--batch", str(case.batch), "--only", *options.only]
        command += ["--rounds", str(options.rounds), *(["--seconds", str(options.seconds)] if options.seconds else [])]
        command += [flag for flag, on in (("--no-peaks", options.no_peaks), ("--peaks", not case.timed)) if on]
        failed |= subprocess.run(command, cwd=ROOT).returncode != 0
    return int(failed)


def run_case(options: argparse.Namespace, device: str, out: Path) -> None:
    """Measure one case; its rows take the place of those that ``out`` has of the same contenders and case."""
    case = Case(options.part, options.frames, options.ratio, options.batch, not options.peaks)
    about = facts(device)
    seconds = options.seconds or (1.0 if device == "cuda" else 15.0)
    rows = []
    for row in measure(case, device, tuple(options.only), seconds, options.rounds, not options.no_peaks):
        row.facts = about
        rows.append(row)
        print(f"{case.name:<28} {row.contender:<11} {row.error or told(row)}", flush=True)

    def place(row: Row) -> tuple:
        return row.part, row.frames, row.ratio, row.batch, row.contender

    new = {place(row) for row in rows}
    old = [Row(**row) for row in json.loads(out.read_text(encoding="utf-8"))] if out.exists() else []
    write([row for row in old if place(row) not in new] + rows, out)


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
