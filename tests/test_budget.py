"""The count of a step on an emulated GPU: single operators, CUDA's autocast rule, and steps of a small tower."""

from __future__ import annotations

import budget
import contenders
import device_work
import emulated_gpu as emulated
import measure
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

pytest.importorskip("triton")
GPU = emulated.DEVICE
LARGE = contenders.VIT_L
CASE = contenders.Case("step", 4, 0.5, 2)


@pytest.fixture(autouse=True)
def small_tower(monkeypatch):
    monkeypatch.setattr(contenders, "VIT_L", contenders.SMALL)


def counted(function, selected=0):
    """What one function does: bytes, launches and waits in all."""
    with emulated.emulated_gpu(), budget.Work(selected) as work:
        function()
    return tuple(sum(getattr(event, name) for event in work.events) for name in ("bytes", "launches", "waits"))


def on_gpu(*size, dtype=torch.float32):
    return torch.empty(*size, dtype=dtype, device=GPU)


@pytest.mark.parametrize(
    "function, expected",
    [
        (lambda: on_gpu(10) + on_gpu(10), (120, 1, 0)),
        (lambda: on_gpu(10).add_(on_gpu(1).expand(10)), (84, 1, 0)),
        (lambda: on_gpu(3, 5).t().contiguous(), (120, 1, 0)),
        (lambda: on_gpu(3, 5).view(5, 3), (0, 0, 0)),
        (lambda: on_gpu(10).to(torch.bfloat16), (60, 1, 0)),
        (lambda: on_gpu(10).copy_(on_gpu(10)), (80, 1, 0)),
        (lambda: torch.zeros(10, device=GPU), (40, 1, 0)),
        (lambda: on_gpu(100, 4)[on_gpu(5, dtype=torch.int64)], (5 * 8 + 2 * 5 * 16, 1, 0)),
        (lambda: on_gpu(4, 8) @ on_gpu(8, 2), (4 * (32 + 16 + 8), 1, 0)),
        (lambda: torch.tensor([1.0, 2.0], device=GPU), (16, 1, 1)),
        (lambda: torch.arange(4).to(GPU), (64, 1, 1)),
        (lambda: torch.arange(4).to(GPU, non_blocking=True), (64, 1, 1)),
        (lambda: torch.arange(4).pin_memory().to(GPU, non_blocking=True), (64, 1, 0)),
        (lambda: torch.arange(4).pin_memory().to(GPU), (64, 1, 1)),
        (lambda: torch.arange(4, device=GPU), (32, 1, 0)),
    ],
)
def test_single_operators(function, expected):
    assert counted(function) == expected


def test_boolean_index_waits():
    moved, launches, waits = counted(lambda: on_gpu(10, 4)[on_gpu(10, dtype=torch.bool)], selected=3)
    assert (moved, waits) == (10 + 2 * 3 * 16, 1) and launches > 1


def test_host_work_is_not_counted():
    assert counted(lambda: torch.ones(5) + 1) == (0, 0, 0)


EXAMPLES = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "addmm": lambda x: torch.addmm(x, x, x),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "sum": lambda x: x.sum(),
    "sum of a dimension": lambda x: x.sum(0),
    "mean": lambda x: x.mean(0),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "cosine_similarity": lambda x: F.cosine_similarity(x, x),
    "cross_entropy": lambda x: F.cross_entropy(x, torch.zeros(8, dtype=torch.int64, device=x.device)),
    "cat": lambda x: torch.cat([x, x.float()]),
    "stack": lambda x: torch.stack([x, x]),
    "exp": lambda x: x.exp(),
    "pow": lambda x: x**2,
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "gelu": lambda x: F.gelu(x),
    "add": lambda x: x + x.float(),
    "einsum": lambda x: torch.einsum("ij,jk->ik", x, x),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", EXAMPLES)
def test_autocast_is_torchs_own_for_cuda(name, dtype):
    """Torch's kernels for CUDA's autocast run on fake tensors, without gradients, in every build of torch."""
    with FakeTensorMode(), ShapesFromMeta(), torch.no_grad(), real_autocast():
        theirs = EXAMPLES[name](torch.empty(8, 8, dtype=dtype, device="cuda")).dtype
    with emulated.emulated_gpu(), torch.autocast(GPU, torch.bfloat16):
        assert EXAMPLES[name](on_gpu(8, 8, dtype=dtype)).dtype == theirs
    assert EXAMPLES[name](on_gpu(8, 8, dtype=dtype)).dtype in (dtype, torch.float32), "the rule ends with the block"


class ShapesFromMeta(TorchDispatchMode):
    """Finds results of operators on CUDA's fake tensors by meta tensors: a build without CUDA has no device guard."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return func(*args)

        def moved(values, device):
            is_tensor = torch.Tensor
            return tree_map(lambda v: torch.empty_like(v, device=device) if isinstance(v, is_tensor) else v, values)

        kwargs = kwargs or {}
        if kwargs.get("device") is not None or not device_work.tensors_in(args):
            return func(*args, **kwargs)
        return moved(func(*moved(args, "meta"), **kwargs), "cuda")


class real_autocast:  # noqa: N801  # torch.autocast refuses to begin without a GPU
    def __enter__(self):
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)

    def __exit__(self, *error):
        torch.set_autocast_enabled("cuda", False)


def test_every_rule_is_one_of_torchs():
    for name in (*emulated.LOWER, *emulated.FLOAT32, *emulated.FLOAT32_RESULT, *emulated.WIDEST):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA"), name


def test_a_parameter_is_cast_once_in_a_block():
    weight, frozen = on_gpu(8, 8).requires_grad_(), on_gpu(8, 8)

    def run(weight):
        with torch.autocast(GPU, torch.bfloat16):
            x = on_gpu(8, 8, dtype=torch.bfloat16)
            F.linear(F.linear(x, weight), weight)

    assert counted(lambda: run(weight))[1] == 3 and counted(lambda: run(frozen))[1] == 4


STEPS = ("eager", "sdpa", "none", "layer", "none own", "layer own")
OURS = STEPS[2:]


@pytest.fixture(scope="module")
def steps():
    """Rows of each contender's parts, and the counters."""
    before, contenders.VIT_L = contenders.VIT_L, contenders.SMALL
    try:
        counters = {name: budget.counted_step(name, CASE) for name in STEPS}
    finally:
        contenders.VIT_L = before
    return counters, {name: {r.part: r for r in budget.rows_of(name, CASE, c)} for name, c in counters.items()}


def test_operations_of_the_tower(steps):
    """Every contender's tower has the same products; SDPA's attention counts as the two products that it is."""
    config = contenders.SMALL
    images, tokens, width = CASE.batch * CASE.frames, 1 + config.patches, config.hidden_size
    layer = 2 * tokens * (4 * width**2 + 2 * width * config.intermediate_size) + 4 * tokens**2 * width
    patches = 2 * config.patches * width * 3 * config.patch_size**2
    expected = images * (config.num_hidden_layers * layer + patches)
    for name, rows in steps[1].items():
        assert rows["tower"].tflop * 1e12 == pytest.approx(expected, rel=1e-9), name


def test_launches_of_the_baseline(steps):
    """SDPA is one kernel where the eager tower has several; each boolean index waits, and so does a backward of one."""
    rows = steps[1]
    layers = contenders.SMALL.num_hidden_layers
    eager, sdpa = rows["eager"]["tower"].launches, rows["sdpa"]["tower"].launches
    assert (eager - sdpa) % layers == 0 and eager > sdpa
    assert rows["eager"]["branch"].waits == 2 + 3 + 1, "boolean indices: embed and its backward, merges, the target"
    assert rows["eager"]["tower"].waits == 0


@pytest.mark.parametrize("name", STEPS)
def test_products_are_in_bfloat16(steps, name):
    of_dtype = {True: 0, False: 0}
    for event in steps[0][name].events:
        if event.kind == "product":
            of_dtype[event.dtype == torch.bfloat16] += event.operations
    assert of_dtype[True] > 0.95 * sum(of_dtype.values())


def test_ours_does_not_wait_in_the_step(steps):
    for name in OURS:
        assert steps[1][name]["tower"].waits == steps[1][name]["branch"].waits == 0


def test_the_tower_is_in_its_own_dtype(steps):
    for name in OURS:
        events = [event for event in steps[0][name].events if event.part == "tower"]
        others = [event.name for event in events if event.dtype != torch.bfloat16]
        assert others == []


# Most of the whole step of ViT-L/14, 52 clips of 8 frames, tubes 0.7: GB outside products, launches, host waits
LIMITS = {"inputs": (0.7, 5, 0), "tower": (107.6, 2600, 0), "branch": (38.3, 394, 0)}
# The same with the products of bt_kernels, which add or activate before they write.
OWN_LIMITS = {"tower": (45.6, 2288, 0), "branch": (28.0, 382, 0)}
KEPT_MB = {"none": 160, "mlp": 120, "layer": 18.5}  # by one clip for backward, once its output has been dropped


def test_the_whole_step_keeps_to_its_limits(monkeypatch):
    monkeypatch.setattr(contenders, "VIT_L", LARGE)
    case = contenders.Case("step", 8, 0.7, 52)
    moved = {}
    for name, limits in (("none", LIMITS), ("none own", OWN_LIMITS)):
        rows = {row.part: row for row in budget.rows_of(name, case, budget.counted_step(name, case))}
        found = {part: (row.other_gb, row.launches, row.waits) for part, row in rows.items()}
        assert all(n <= most for part in limits for n, most in zip(found[part], limits[part], strict=True)), found
        moved[name] = sum(row.product_gb + row.other_gb for row in rows.values())
    assert moved["none own"] < moved["none"] - 40, "the products move what the others no longer do, but less"
    kept = {policy: budget.kept_by_forward(policy, case) / 1e6 for policy in KEPT_MB}
    assert all(kept[policy] <= most for policy, most in KEPT_MB.items()), kept
    own = {policy: budget.kept_by_forward(f"{policy} own", case) / 1e6 for policy in KEPT_MB}
    assert own == kept


def test_the_tower_in_8_bits_keeps_to_its_limits(monkeypatch):
    """One kernel quantises an input, and the bias is added in the product: 12 launches a layer and chunk of images."""
    monkeypatch.setattr(contenders, "VIT_L", LARGE)
    case = contenders.Case("step", 8, 0.7, 52)
    counter = budget.counted_step("8 bits", case)
    (row,) = budget.rows_of("8 bits", case, counter)
    assert row.part == "tower" and row.other_gb <= 162.8
    assert row.launches <= 3848 and row.waits == 0
    of_float8 = [event for event in counter.events if event.dtype == torch.float8_e4m3fn and event.kind == "product"]
    layers, chunks = LARGE.num_hidden_layers, -(-case.batch * case.frames // 32)
    assert len(of_float8) == 4 * layers * chunks, "q, k and v together, out, fc1 and fc2"
    assert "A100 80GB SXM" not in row.least_ms and row.least_ms["H200 SXM"] > 0


def test_own_kernels_move_what_no_implementation_can_avoid():
    """The launches' tensors against ``cases.py``: the same bytes but for partial sums and lists of rows."""
    from compiled_forms import launches

    from bt_kernels._cases import Shape, variants

    visible = CASE.visible("cpu")
    for variant in variants():
        if variant.name not in ("temporal_attention", "gather_merge", "pool_video_tokens"):
            continue
        shape = Shape(CASE.batch, visible.patches, visible.frames, visible.tokens, 2, 64, 2)
        assert launches(variant.name, visible, torch.bfloat16, heads=2, width=64)
        inputs = variant.inputs(visible, 2, 64, lambda *size: on_gpu(*size, dtype=torch.bfloat16))
        with emulated.emulated_gpu(), torch.no_grad(), budget.Work() as work:
            variant.run(inputs, visible.to(GPU))
        moved = sum(event.bytes for event in work.events)
        assert 1.0 <= moved / variant.work(shape)[0].bytes < 1.2, variant.name


def test_kept_for_backward():
    """The same bytes as on the CPU, where tensors have values."""
    kept = {policy: budget.kept_by_forward(policy, CASE) for policy in ("none", "mlp", "layer")}
    assert 0 < kept["layer"] < kept["mlp"] < kept["none"]
    single = contenders.Case("step", CASE.frames, CASE.ratio, 1)
    model, inputs = contenders.make_model("step", "cpu"), contenders.make_inputs(single, "cpu")
    own = {device_work.memory_of(parameter) for parameter in model.parameters()}
    real = measure.kept_bytes(lambda: model(inputs["pixels"], single.visible("cpu")), own)
    assert kept["none"] == pytest.approx(real, rel=0.02)


def test_command_writes_rows(tmp_path, monkeypatch, capsys):
    out = tmp_path / "budget.json"
    monkeypatch.setattr("sys.argv", ["budget.py", "--only", "none", "--frames", "4", "--mask-ratio", "0.5",
                                     "--batch-size", "2", "--operators", "2", "--out", str(out)])  # fmt: skip
    assert budget.main() == 0
    import json

    stored = json.loads(out.read_text())
    rows = stored["steps"]
    assert [row["part"] for row in rows] == ["inputs", "tower", "branch"]
    assert all(row["least_ms"]["H200 SXM"] > 0 for row in rows) and rows[-1]["kept_mb"] > 0
    printed = capsys.readouterr().out
    assert device_work.name_of(torch.ops.aten.add.Tensor) == "add" and "tower" in printed
    assert printed.count("kernels compiled, limit") == len(stored["compiled"]) == 5
    assert all(0 < count["kernels"] <= count["limit"] for count in stored["compiled"])
    monkeypatch.setattr(budget, "print_sequences", list)
    budget.main()
    assert json.loads(out.read_text()) == {"steps": rows, "compiled": []}, "a row counted again takes its own place"
