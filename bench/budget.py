"""Count one masked pretraining step as a GPU would run it, without one, and its least time on several GPUs.

    python bench/budget.py                          ViT-L/14, 52 clips of 8 frames, tubes 0.7; rows to bench/results/
    python bench/budget.py --only none --operators 12   and what moves the most bytes, operator by operator
    python bench/budget.py --only "8 bits"          the tower in 8 bits (fp8) alone, which is not compiled here

The step runs on meta tensors under CUDA's autocast rule (``emulated_gpu.py``) and bfloat16; our kernels are Triton's,
whose launchers are recorded. Parts: "inputs" (ours alone: visible tokens and stochastic depth are drawn, pixels
normalised), "tower", and "branch" (with losses and backward).

Columns: "TFLOP" of matrix products and fused attention; "products, GB" that matrix products move; "other, GB" that all
else moves, attention included, each element read and written once by each operator; "launches" of kernels; "waits" of
the host for the device: values read, boolean indices, copies through pageable memory; "kernels" of Triton that are
compiled. Then the least milliseconds on each device: for each kernel its operations at the peak or its bytes at the
bandwidth (``devices.py``), added up. "kept" is what our forward pass of one clip in float32 keeps for backward once its
output is dropped, in MB. The last lines count the kernels that Triton compiles while lengths change
(``compiled_forms.py``). A device without products of float8 has no least time of a tower in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter as Bag
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import device_work as work
import torch
from compiled_forms import Count, form, print_sequences
from contenders import (
    BASELINES,
    COUNTED_TOWERS,
    OWN,
    POLICIES,
    Case,
    Contender,
    choose_form,
    make_inputs,
    make_model,
)
from devices import DEVICES
from emulated_gpu import DEVICE, emulated_gpu
from measure import ROOT, kept_bytes, merged
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bt_adapter import BTAdapterVisionModel
from bt_adapter.files import write_json
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.pretrain.step import draw_depth, draw_visible
from bt_kernels import VisibleTokens, _triton
from bt_kernels._library import OPS

COUNTED = ("eager", "sdpa", *(name for pair in zip(POLICIES, OWN, strict=True) for name in pair), *COUNTED_TOWERS)
PRODUCT = "_product"  # our own matrix product, of bt_kernels/_triton_product.py
PARTS = ("inputs", "tower", "branch")
KEYS = ("contender", "part", "frames", "ratio", "batch")  # of a row: what tells it apart
GPU = torch.device(DEVICE)
ARCHITECTURE = 90  # sm_90, for which Triton compiles


@dataclass(frozen=True)
class Event:
    """The work of one operator of torch, or of one launch of a Triton kernel."""

    part: str
    name: str
    kind: str  # "product", "attention" or "other"
    dtype: torch.dtype
    operations: int
    bytes: int
    launches: int
    waits: bool = False


class Work(TorchDispatchMode):
    """Counts what operators on meta tensors would do on a GPU.

    Args:
        selected: number of true elements of every boolean index, whose values meta tensors do not have.
    """

    def __init__(self, selected: int = 0) -> None:
        super().__init__()
        self.selected = selected
        self.part = PARTS[-1]
        self.events: list[Event] = []
        self.kernels: dict[str, set[str]] = {part: set() for part in PARTS}

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Attribute what runs in the block to ``part``."""
        before, self.part = self.part, part
        yield
        self.part = before

    def attributed(self, function: Callable, part: str) -> Callable:
        """Return ``function`` with its work attributed to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.within(part):
                return function(*args, **kwargs)

        return call

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "bt_kernels":
            return self._run_own(func, args)
        with self:  # operators that are made of others
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        if work.has_boolean_index(func, args):
            return self._index(func, args, kwargs)
        result = func(*args, **kwargs)
        if any(t.device.type == DEVICE for t in work.tensors_in(args, kwargs, result)):
            self._add(func, args, kwargs, result)
        return result

    def _add(self, func: Any, args: Any, kwargs: Any, result: Any, more: int = 0) -> None:
        name, waits = work.name_of(func), work.host_waits(func, args, kwargs)
        launches = work.launches_of(func, result) + more
        if not launches and not waits:
            return
        kind = "product" if name in work.PRODUCTS else "attention" if name in work.ATTENTION else "other"
        operands = work.tensors_in(args[work.PRODUCTS[name]] if kind == "product" else args, result)
        dtype = next((t.dtype for t in operands if t.is_floating_point()), torch.float32)
        count, moved = work.operations(name, args, result), work.bytes_moved(func, args, kwargs, result)
        self.events.append(Event(self.part, name, kind, dtype, count, moved, launches, waits))

    def _index(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Index by a bool tensor: its true elements are found, then read or written."""
        x, indices = args[:2]
        mask = next(t for t in work.tensors_in(indices) if t.dtype == torch.bool)
        reads = work.name_of(func) == "index"
        result = x.new_empty(self.selected, *x.shape[mask.ndim :]) if reads else x
        self._add(func, args, kwargs, result, work.SEVERAL["nonzero"])
        return result

    def _run_own(self, func: Any, args: Sequence[Any]) -> Any:
        """Run an op of ``bt_kernels`` by its Triton kernels, whose launches are recorded."""
        name = work.name_of(func)
        op = OPS[name.removesuffix("_backward")]
        kernel = next(each for each in op.kernels if each.backend == "triton")
        with _triton.recorded() as launches, self:
            if name == op.name:
                result = kernel.forward(*args[:-1])
                inputs = args
            else:
                *inputs, needs, _ = args
                grads = kernel.backward(*inputs, tuple(needs))
                result = tuple(inputs[op.results].new_empty(0) if g is None else g for g in grads)
                result = result[0] if len(result) == 1 else result
                inputs = inputs[op.results :]
        self._add_launches(name, dict(zip(op.arguments, inputs, strict=False)), launches)
        return result

    def _add_launches(self, name: str, inputs: dict[str, Any], launches: list) -> None:
        """Count the tensors of each launch once; of the tower's state, the rows that the op reads."""
        tower = next((inputs[key] for key in ("backbone", "target") if key in inputs), None)
        operations, tower_bytes = _attention_operations(name, inputs), _tower_bytes(name, inputs)
        for launch in launches:
            tensors: dict[int, Tensor] = {}
            for tensor in sorted((t for t in launch.args if isinstance(t, Tensor)), key=work.bytes_of):
                tensors[work.memory_of(tensor)] = tensor
            moved = 0
            if tower is not None and tensors.pop(work.memory_of(tower), None) is not None:
                moved, tower_bytes = tower_bytes, 0
            moved += sum(map(work.bytes_of, tensors.values()))
            dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
            if launch.kernel.__name__ == PRODUCT:
                kind, count, dtype = "product", _product_operations(launch), launch.args[0].dtype
            else:
                kind, count, operations = "other", operations, 0
            self.events.append(Event(self.part, launch.kernel.__name__, kind, dtype, count, moved, 1))
            self.kernels[self.part].add(form(launch, ARCHITECTURE).key)


def _product_operations(launch: _triton.Launch) -> int:
    """Return the operations of a launch of our own matrix product."""
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    return 2 * given["M"] * given["N"] * given["K"]


def _attention_operations(name: str, inputs: dict[str, Any]) -> int:
    """Return the operations of our attention on a regular grid: two products forward, five with the backward's."""
    if "attention" not in name or not inputs["slots"]:
        return 0
    (batch, rows, _, heads, width), slots = inputs["qkv"].shape, inputs["slots"]
    per_pair = 2 * heads * width * (5 if name.endswith("_backward") else 2)
    if name.startswith("temporal"):
        return per_pair * batch * rows * slots
    return per_pair * batch * slots * (1 + (rows - 1) // slots) ** 2


def _tower_bytes(name: str, inputs: dict[str, Any]) -> int:
    """Return the bytes of the tower's state that an op reads: visible tokens and, but for alignment, CLS rows."""
    tower = inputs.get("backbone", inputs.get("target"))
    if tower is None:
        return 0
    if name.startswith("pool"):
        return work.bytes_of(tower)
    rows = inputs["index"].numel() + (tower.shape[0] * tower.shape[1] if "backbone" in inputs else 0)
    return rows * tower.shape[-1] * tower.element_size()


@dataclass
class Row:
    """The work of one part of a contender's step."""

    contender: str
    part: str
    frames: int
    ratio: float
    batch: int
    tflop: float
    product_gb: float
    other_gb: float
    launches: int
    waits: int
    kernels: int
    least_ms: dict[str, float] = field(default_factory=dict)
    kept_mb: float | None = None


def counted_step(name: str, case: Case) -> Work:
    """Count the work of a contender's step."""
    with emulated_gpu():
        contender = Contender(name, make_model("step", DEVICE), case, DEVICE, make_inputs(case, DEVICE))
        counter = Work(_selected(case))
        model: Any = contender.model
        owner, methods = (model, ("states",)) if name in BASELINES else (model.tower, ("run", "run_layer"))
        for method in methods:
            setattr(owner, method, counter.attributed(getattr(owner, method), "tower"))
        with counter:
            if name not in BASELINES:
                with counter.within("inputs"):
                    draw_inputs(model, case)
            contender.run()
    return counter


def draw_inputs(model: BTAdapterVisionModel, case: Case) -> tuple[VisibleTokens, list[Tensor], Tensor]:
    """Draw visible tokens and stochastic depth and normalise frames that are on the device, as pretraining does."""
    recipe = Recipe(batch_size=case.batch, frames=case.frames, mask_ratio=case.ratio)
    size = model.vision_config.image_size
    frames = torch.empty(case.batch * case.frames, 3, size, size, dtype=torch.uint8, device=GPU)
    visible = draw_visible(recipe, model.vision_config.patches, 1, 0, 1, GPU)
    draws = draw_depth(model.config, recipe, visible, 1, 0, GPU)
    return visible, draws, model.images.normalise(frames, model.tower.dtype)


def kept_by_forward(policy: str, case: Case) -> int:
    """Return the bytes that our forward pass of one clip in float32 keeps for backward, once its output is dropped."""
    single = Case("step", case.frames, case.ratio, 1)
    with emulated_gpu(), Work(_selected(single)):
        model = make_model("step", DEVICE)
        model.tower.optimize(dtype=torch.float32)
        choose_form(model, policy)
        pixels, visible = make_inputs(single, DEVICE)["pixels"], single.visible(DEVICE)
        return kept_bytes(lambda: model(pixels, visible), {work.memory_of(t) for t in model.parameters()})


def _selected(case: Case) -> int:
    return case.visible("cpu").index.numel()


def rows_of(name: str, case: Case, counter: Work) -> Iterator[Row]:
    """Add up the events of each part; of a contender that has another tower alone, the tower's."""
    for part in ("tower",) if name in COUNTED_TOWERS else PARTS:
        events = [event for event in counter.events if event.part == part]
        if not events:
            continue
        yield Row(
            name, part, case.frames, case.ratio, case.batch,
            tflop=sum(event.operations for event in events) / 1e12,
            product_gb=sum(event.bytes for event in events if event.kind == "product") / 1e9,
            other_gb=sum(event.bytes for event in events if event.kind != "product") / 1e9,
            launches=sum(event.launches for event in events),
            waits=sum(event.waits for event in events),
            kernels=len(counter.kernels[part]),
            least_ms={
                device: 1e3 * sum(peaks.seconds(event.operations, event.bytes, event.dtype) for event in events)
                for device, peaks in DEVICES.items()
                if peaks.multiplies_float8 or all(event.dtype != torch.float8_e4m3fn for event in events)
            },
        )  # fmt: skip


def print_operators(counter: Work, most: int) -> None:
    """Print the operators of each part that move the most bytes."""
    for part in PARTS:
        moved: Bag = Bag()
        launches: Bag = Bag()
        for event in counter.events:
            if event.part == part and event.kind != "product":
                moved[event.name, str(event.dtype)[6:]] += event.bytes
                launches[event.name, str(event.dtype)[6:]] += event.launches
        for (name, dtype), count in moved.most_common(most):
            print(f"    {part:<8}{name:<48}{dtype:<10}{count / 1e9:>8.2f} GB{launches[name, dtype]:>8} launches")


def print_row(row: Row) -> None:
    """Print a line of the table."""
    times = "".join(f"{row.least_ms[device]:>19.1f}" if device in row.least_ms else f"{'-':>19}" for device in DEVICES)
    kept = "" if row.kept_mb is None else f"{row.kept_mb:.1f}"
    print(
        f"{row.contender:<12}{row.part:<8}{row.tflop:>7.2f}{row.product_gb:>14.2f}{row.other_gb:>11.2f}"
        f"{row.launches:>10}{row.waits:>7}{row.kernels:>9}{times}{kept:>8}",
        flush=True,
    )


def store(rows: list[Row], counts: list[Count], path: Path) -> None:
    """Write "steps", the rows after those stored of other cases, and "compiled", the counts of compiled kernels."""
    stored = json.loads(path.read_text(encoding="utf-8"))["steps"] if path.exists() else []
    steps = [row if isinstance(row, dict) else asdict(row) for row in merged(stored, rows, KEYS)]
    write_json(path, {"steps": steps, "compiled": [asdict(count) for count in counts]}, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=COUNTED, default=COUNTED)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--mask-ratio", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=52)
    parser.add_argument("--operators", type=int, default=0, help="print so many operators of each part (default: none)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "budget.json", help="JSON file")
    options = parser.parse_args()
    case = Case("step", options.frames, options.mask_ratio, options.batch_size)
    head = "".join(f"{device + ', ms':>19}" for device in DEVICES)
    print(f"{'contender':<12}{'part':<8}{'TFLOP':>7}{'products, GB':>14}{'other, GB':>11}{'launches':>10}{'waits':>7}"
          f"{'kernels':>9}{head}{'kept':>8}")  # fmt: skip
    rows: list[Row] = []
    for name in options.only:
        counter = counted_step(name, case)
        own = list(rows_of(name, case, counter))
        if name in POLICIES + OWN:
            own[-1].kept_mb = kept_by_forward(name, case) / 1e6
        for row in own:
            print_row(row)
        print_operators(counter, options.operators)
        rows += own
    counts = print_sequences()
    store(rows, counts, options.out)
    return int(any(count.broken for count in counts))


if __name__ == "__main__":
    sys.exit(main())
