"""The device code of the CUDA kernels, run on the CPU by a small emulator (``cuda_emulator/``) against the references.

What this shows: results, and what would hang or crash a GPU (see emulator.h). What it cannot: speed, the torch side of
the launchers (``csrc/cuda/*.cu``), the inline assembly that the emulator replaces. Legend: B, T, P, N, D, S, H, E as in
``bt_kernels.visible``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from op_cases import FORM, FORMS, VARIANT, Form, seeded
from torch import Tensor

from bt_kernels import VisibleTokens
from bt_kernels.ops.gather_embed import reference as embed
from bt_kernels.ops.gather_merge import reference as merge
from bt_kernels.ops.pool_video_tokens import reference as pool
from bt_kernels.ops.temporal_attention import reference as temporal

ROOT = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).parent / "cuda_emulator"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CXX = shutil.which("g++")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
GUARD = 64  # elements before and behind every tensor, NaN in inputs, checked in outputs


def cuda_headers() -> Path | None:
    """The folder of the CUDA headers, whose 16-bit types have host versions."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), NVCC and Path(NVCC).resolve().parents[1]]
    for home in [*filter(None, homes), "/usr/local/cuda"]:
        if (Path(home) / "include" / "cuda_bf16.h").exists():
            return Path(home) / "include"
    return None


HEADERS = cuda_headers()
pytestmark = [
    pytest.mark.skipif(CXX is None, reason="g++ was not found"),
    pytest.mark.skipif(HEADERS is None, reason="no CUDA headers (cuda_bf16.h) beside nvcc or in /usr/local/cuda"),
]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("emulated") / "kernels.so"
    includes = [f"-I{SOURCES}", f"-I{ROOT / 'csrc' / 'cuda'}", "-isystem", str(HEADERS)]
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [CXX, *flags, "-DBT_EMULATED", *includes, str(SOURCES / "kernels.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    for name in ("gather_merge", "gather_embed", "gather_embed_backward", "pool_video_tokens",
                 "pool_video_tokens_backward", "temporal_attention", "broken"):  # fmt: skip
        getattr(loaded, name).restype = ctypes.c_char_p
    return loaded


def guarded(tensor: Tensor | None) -> Tensor | None:
    """A copy with the same strides, 16-byte aligned, NaN around it; lists of integers stay."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    store = tensor.new_full((max(span, 0) + 2 * GUARD,), torch.nan)
    copy = store.as_strided(tensor.shape, tensor.stride(), GUARD)
    return copy.copy_(tensor) if not any(stride == 0 for stride in tensor.stride()) else _expanded(tensor, copy)


def _expanded(tensor: Tensor, copy: Tensor) -> Tensor:
    """Dimensions of stride 0 cannot be copied into; their first entry is the whole."""
    first = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    copy[first] = tensor[first]
    return copy


class Output:
    """An uninitialised result: NaN, between guards."""

    def __init__(self, shape, dtype: torch.dtype) -> None:
        size = torch.Size(shape).numel()
        self.store = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
        self.store[:GUARD] = self.store[size + GUARD :] = 7
        self.tensor = self.store[GUARD : size + GUARD].view(shape)

    def checked(self) -> Tensor:
        size = self.tensor.numel()
        assert (self.store[:GUARD] == 7).all() and (self.store[size + GUARD :] == 7).all(), "written past the end"
        return self.tensor


def run(kernel, dtype: torch.dtype, tensors: list[Tensor | None], numbers: list[int], reverse: bool = False) -> None:
    pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
    values = (ctypes.c_int64 * len(numbers))(*numbers)
    error = kernel(DTYPES.index(dtype), reverse, pointers, values).decode()
    assert not error, error


def both_orders(call, outputs: list[Output | None]) -> list[Tensor | None]:
    """Run with the threads in one order and in the other: the results must have the same bits."""
    call(False)
    first = [None if o is None else o.checked().clone() for o in outputs]
    for output in filter(None, outputs):
        output.tensor.fill_(torch.nan)
    call(True)
    for value, output in zip(first, outputs, strict=True):
        if output is not None:
            assert torch.equal(value.view(torch.uint8), output.checked().view(torch.uint8)), "depends on thread order"
    return first


def places(visible: VisibleTokens, width: int) -> tuple[list[Tensor | None], list[int]]:
    index = visible.index.contiguous()
    return [index, visible.frame_counts], [visible.batch, visible.patches, visible.frames, visible.tokens, width]


def adjacent(tensor: Tensor) -> Tensor:
    """As the launchers do it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def run_merge(kernels, inputs, visible, upstream, needs):
    backbone, branch = guarded(adjacent(inputs["backbone"])), guarded(adjacent(inputs["branch"]))
    gate, grad = guarded(inputs["gate"]), guarded(adjacent(upstream))
    dtype = branch.dtype
    listed, sizes = places(visible, branch.shape[2])
    numbers = [*sizes, *backbone.stride()[:3], *branch.stride()[:2], *grad.stride()[:2], 64]
    out = Output(branch.shape, dtype)
    forward = both_orders(
        lambda reverse: run(kernels.gather_merge, dtype, [*listed, backbone, branch, grad, gate, out.tensor, None, None,
                                                          None], numbers, reverse), [out])  # fmt: skip
    to = [Output(inputs[name].shape, dtype) if need else None
          for name, need in zip(("backbone", "branch", "gate"), needs, strict=True)]  # fmt: skip
    tensors = [*listed, backbone, branch, grad, gate, None, *(o and o.tensor for o in to)]
    return forward + both_orders(lambda reverse: run(kernels.gather_merge, dtype, tensors, numbers, reverse), to)


def run_embed(kernels, inputs, visible, upstream, needs):
    backbone, grad = guarded(adjacent(inputs["backbone"])), guarded(adjacent(upstream))
    tables = [guarded(inputs[name].contiguous()) for name in ("cls_token", "pos", "time")]
    dtype = backbone.dtype
    listed, sizes = places(visible, backbone.shape[3])
    out = Output((visible.batch, 1 + visible.tokens, backbone.shape[3]), dtype)
    tensors, numbers = [*listed, backbone, *tables, out.tensor], [*sizes, *backbone.stride()[:3]]
    forward = both_orders(lambda reverse: run(kernels.gather_embed, dtype, tensors, numbers, reverse), [out])
    to = [Output(inputs[name].shape, dtype) if need else None
          for name, need in zip(("backbone", "cls_token", "pos", "time"), needs, strict=True)]  # fmt: skip
    tensors = [*listed, grad, *(o and o.tensor for o in to)]
    numbers = [*sizes, *grad.stride()[:2], inputs["time"].shape[0]]
    return forward + both_orders(
        lambda reverse: run(kernels.gather_embed_backward, dtype, tensors, numbers, reverse), to
    )


def run_pool(kernels, inputs, visible, upstream, needs):
    backbone, branch = guarded(adjacent(inputs["backbone"])), guarded(adjacent(inputs["branch"]))
    grad = guarded(adjacent(upstream))
    dtype = branch.dtype
    listed, sizes = places(visible, branch.shape[2])
    out = Output((visible.batch, visible.patches + 1, branch.shape[2]), dtype)
    tensors = [*listed, backbone, branch, out.tensor]
    numbers = [*sizes, *backbone.stride()[:3], *branch.stride()[:2], backbone.shape[1]]
    forward = both_orders(lambda reverse: run(kernels.pool_video_tokens, dtype, tensors, numbers, reverse), [out])
    to = [Output(inputs[name].shape, dtype) if need else None
          for name, need in zip(("backbone", "branch"), needs, strict=True)]  # fmt: skip
    tensors = [*listed, grad, *(o and o.tensor for o in to)]
    numbers = [*sizes, *grad.stride()[:2], backbone.shape[1]]
    return forward + both_orders(
        lambda reverse: run(kernels.pool_video_tokens_backward, dtype, tensors, numbers, reverse), to
    )


def run_temporal(kernels, inputs, visible, upstream, needs=(True,)):
    qkv, grad = guarded(adjacent(inputs["qkv"])), guarded(adjacent(upstream))
    batch, tokens, _, heads, width = qkv.shape
    numbers = [batch, tokens, visible.slots, heads, width, *qkv.stride()[:4], *grad.stride()[:3]]
    results = []
    for given, shape in ((None, (batch, tokens, heads, width)), (grad, qkv.shape)):
        out = Output(shape, qkv.dtype)
        tensors = [qkv, given, out.tensor]
        results += both_orders(
            lambda reverse, tensors=tensors: run(kernels.temporal_attention, qkv.dtype, tensors, numbers, reverse),
            [out],
        )
    return results


RUNNERS = {
    "gather_merge": (run_merge, merge),
    "gather_merge-sum": (run_merge, merge),
    "gather_embed": (run_embed, embed),
    "pool_video_tokens": (run_pool, pool),
    "temporal_attention": (run_temporal, temporal),
}
GATHERS = tuple(RUNNERS)[:-1]


def by_reference(name: str, inputs, visible, upstream, needs) -> list[Tensor | None]:
    """The result and the gradients that are needed."""
    reference = RUNNERS[name][1]
    arguments = (*inputs.values(), *visible.as_arguments())
    grads = reference.backward(upstream, *arguments, needs)
    return [
        reference.forward(*arguments),
        *(g if need else None for g, need in zip(grads, needs, strict=True)),
    ]


def check(kernels, name, inputs, visible, upstream, needs=None) -> list[Tensor | None]:
    """The tolerance rule of test_conformance.py: twice the reference's error in the same dtype, three times for
    gradients, plus two roundings."""
    if needs is None:
        needs = tuple(t is not None for key, t in inputs.items())
    got = RUNNERS[name][0](kernels, inputs, visible, upstream, needs)
    wide = {key: None if t is None else t.double() for key, t in inputs.items()}
    exact = by_reference(name, wide, visible, upstream.double(), needs)
    plain = by_reference(name, inputs, visible, upstream, needs)
    largest = max((t.abs().max().item() for t in exact[1:] if t is not None and t.numel()), default=0.0)
    for i, (value, same_dtype, true) in enumerate(zip(got, plain, exact, strict=True)):
        assert (value is None) == (true is None)
        if value is None or not value.numel():
            continue
        assert value.shape == true.shape
        size = true.abs().max().item() or largest
        allowed = (3 if i else 2) * (same_dtype.double() - true).abs().max().item()
        allowed += 2 * torch.finfo(value.dtype).eps * size
        error = (value.double() - true).abs().max().item()
        assert error <= allowed, f"result {i}: error {error:.3g} over {allowed:.3g}"
    return got


def drawn(name: str, visible: VisibleTokens, heads: int, width: int, dtype: torch.dtype):
    """Inputs, and a gradient of the result's shape."""
    inputs = {key: None if t is None else t.to(dtype) for key, t in VARIANT[name].draw(visible, heads, width).items()}
    if name == "temporal_attention":
        shape = (visible.batch, visible.tokens, heads, width)
    elif name == "pool_video_tokens":
        shape = (visible.batch, visible.patches + 1, heads * width)
    else:
        shape = (visible.batch, 1 + visible.tokens, heads * width)
    return inputs, torch.randn(shape, generator=seeded(9), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", GATHERS)
def test_gathers_equal_the_reference(kernels, name, form, dtype):
    visible = form.build()
    inputs, upstream = drawn(name, visible, form.heads, form.width, dtype)
    check(kernels, name, inputs, visible, upstream)


WIDE = Form("wide", lambda: VisibleTokens.random(2, 9, 40, 0.4, seeded(4), frame_counts=torch.tensor([40, 33])), 5, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GATHERS)
def test_gathers_of_several_tiles_and_partials(kernels, name, dtype):
    """Rows wider than a warp's 256 columns, more frames than lanes, more rows than one partial sum takes."""
    visible = WIDE.build()
    inputs, upstream = drawn(name, visible, WIDE.heads, WIDE.width, dtype)
    check(kernels, name, inputs, visible, upstream)


def test_time_gradient_of_many_rows(kernels):
    """2,048 rows of one frame make 32 partial sums."""
    visible = VisibleTokens.all(4, 512, 1)
    inputs, upstream = drawn("gather_embed", visible, 1, 8, torch.bfloat16)
    check(kernels, "gather_embed", inputs, visible, upstream, (False, True, False, True))


@pytest.mark.parametrize("name, count", [("gather_merge", 3), ("gather_embed", 4), ("pool_video_tokens", 2)])
def test_only_what_is_asked_for(kernels, name, count):
    visible = FORM["padded"].build()
    inputs, upstream = drawn(name, visible, 2, 4, torch.float32)
    for which in range(count):
        check(kernels, name, inputs, visible, upstream, tuple(i == which for i in range(count)))


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1)


def sliced(t: Tensor) -> Tensor:
    """Rows apart by one element more than they have: no whole vectors."""
    return torch.cat([t, t.new_full((*t.shape[:-1], 1), torch.nan)], -1)[..., :-1]


def broadcast(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


@pytest.mark.parametrize("form", ["tube70", "padded"])
@pytest.mark.parametrize("layout", [every_other, transposed, sliced, broadcast], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", GATHERS)
def test_any_strides(kernels, name, layout, form):
    visible = FORM[form].build()
    inputs, upstream = drawn(name, visible, 2, 4, torch.float32)
    inputs = {key: t if t is None or t.ndim < 3 else layout(t) for key, t in inputs.items()}
    check(kernels, name, inputs, visible, layout(upstream))


@pytest.mark.parametrize("form", ["padded", "padded_to_nothing", "empty_frame"])
@pytest.mark.parametrize("name", GATHERS)
def test_padding_and_invisible_tokens_are_never_read(kernels, name, form):
    visible = FORM[form].build()
    inputs, upstream = drawn(name, visible, 2, 4, torch.float32)
    poisoned, poisoned_upstream = dict(inputs), upstream.clone()
    padding = visible.index < 0
    if "branch" in inputs:
        poisoned["branch"] = inputs["branch"].clone()
        poisoned["branch"][:, 1:][padding] = torch.nan
    if name != "pool_video_tokens":
        poisoned_upstream[:, 1:][padding] = torch.nan
    poisoned["backbone"] = torch.full_like(inputs["backbone"], torch.nan)
    for b in range(visible.batch):
        real = visible.frames if visible.frame_counts is None else int(visible.frame_counts[b])
        poisoned["backbone"][b, :real, 0] = inputs["backbone"][b, :real, 0]
        if name == "pool_video_tokens":
            poisoned["backbone"][b, :real] = inputs["backbone"][b, :real]
        for place in visible.index[b][~padding[b]].tolist():
            at = (b, place % visible.frames, 1 + place // visible.frames)
            poisoned["backbone"][at] = inputs["backbone"][at]
    needs = (True,) * sum(t is not None for t in inputs.values()) + (False,) * (inputs.get("gate", 0) is None)
    runner = RUNNERS[name][0]
    clean = runner(kernels, inputs, visible, upstream, needs)
    for value, same in zip(runner(kernels, poisoned, visible, poisoned_upstream, needs), clean, strict=True):
        assert value is same or torch.equal(value, same)


def test_pooling_a_long_video(kernels):
    """The tower's mean runs over all its frames, also where the branch saw averaged pairs of them."""
    visible = VisibleTokens.all(2, 3, 4)
    inputs, upstream = drawn("pool_video_tokens", visible, 1, 8, torch.float32)
    inputs["backbone"] = torch.randn(2, 8, 4, 8, generator=seeded(0))
    check(kernels, "pool_video_tokens", inputs, visible, upstream)


def test_places_past_the_end_are_nan(kernels):
    """No launcher waits to check the values of index; what it names wrongly must neither crash nor pass unnoticed."""
    index = torch.tensor([[0, 3, 12, 1 << 40]])
    visible = VisibleTokens(index, 4, 3, check=False)
    for name in GATHERS:
        inputs, upstream = drawn(name, visible, 2, 4, torch.float32)
        needs = tuple(t is not None for t in inputs.values())
        got = RUNNERS[name][0](kernels, inputs, visible, upstream, needs)
        if name != "pool_video_tokens":
            assert got[0][0, 3:].isnan().all() and got[0][0, :3].isfinite().all(), name


def grid(slots: int, groups: int, batch: int = 2) -> VisibleTokens:
    return VisibleTokens.all(batch, groups, slots)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [64, 88])
@pytest.mark.parametrize("slots", [1, 3, 5, 8, 12, 16, 17, 32, 50, 64])
def test_temporal_attention_equals_the_reference(kernels, slots, width, dtype):
    groups = 9 if slots <= 8 else 2
    visible = grid(slots, groups)
    inputs, upstream = drawn("temporal_attention", visible, 2 if slots <= 16 else 1, width, dtype)
    check(kernels, "temporal_attention", inputs, visible, upstream)


@pytest.mark.parametrize("slots", [4, 20, 40])
@pytest.mark.parametrize("width", [8, 24, 72, 104, 128])
def test_temporal_attention_of_other_widths(kernels, slots, width):
    visible = grid(slots, 3, 1)
    inputs, upstream = drawn("temporal_attention", visible, 1, width, torch.bfloat16)
    check(kernels, "temporal_attention", inputs, visible, upstream)


@pytest.mark.parametrize("slots", [3, 24])
def test_temporal_attention_of_any_strides(kernels, slots):
    visible = grid(slots, 4)
    inputs, upstream = drawn("temporal_attention", visible, 2, 16, torch.bfloat16)
    layouts = (
        transposed,
        broadcast,
        lambda t: torch.cat([t.new_full(t.shape, torch.nan), t], 1)[:, t.shape[1] :],
        lambda t: torch.cat([t, t.new_full(t.shape, torch.nan)], -1)[..., : t.shape[-1]],
        lambda t: t.transpose(1, -2).contiguous().transpose(1, -2),
    )
    for layout in layouts:
        check(kernels, "temporal_attention", {"qkv": layout(inputs["qkv"])}, visible, layout(upstream))
    check(kernels, "temporal_attention", inputs, visible, torch.full((), 0.5).bfloat16().expand(upstream.shape))


@pytest.mark.parametrize("slots", [5, 16, 30])
def test_temporal_attention_of_large_logits(kernels, slots):
    visible = grid(slots, 2)
    inputs, upstream = drawn("temporal_attention", visible, 1, 64, torch.bfloat16)
    for factor in (30, -30):
        scaled = inputs["qkv"].clone()
        scaled[:, :, 0] *= factor
        scaled[:, :, 1] *= 30
        out, grad = run_temporal(kernels, {"qkv": scaled}, visible, upstream)
        exact = by_reference("temporal_attention", {"qkv": scaled.double()}, visible, upstream.double(), (True,))[0]
        assert grad.isfinite().all()
        assert (out.double() - exact).abs().max() <= 2 * 2**-7 * exact.abs().max()


@pytest.mark.parametrize("part", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("slots, groups", [(3, 6), (20, 3), (40, 2)])
def test_temporal_attention_of_a_sequence_that_is_not_finite(kernels, slots, groups, part):
    """Packs hold several sequences (of 40 rows, one): the others' results are those without it."""
    visible = grid(slots, groups, 1)
    inputs, upstream = drawn("temporal_attention", visible, 1, 40, torch.bfloat16)
    clean = run_temporal(kernels, inputs, visible, upstream)
    spoilt = slice(slots, 2 * slots)
    for value in (torch.inf, -torch.inf, torch.nan):
        qkv, grad = inputs["qkv"].clone(), upstream.clone()
        target = grad if part == "grad" else qkv[:, :, "qkv".index(part)]
        target[0, slots + 1, 0, 35] = value
        for i, (got, wanted) in enumerate(zip(run_temporal(kernels, {"qkv": qkv}, visible, grad), clean, strict=True)):
            own = got[:, spoilt].clone()
            assert own.isfinite().all() == (i == 0 and part == "grad")
            got[:, spoilt] = wanted[:, spoilt]
            torch.testing.assert_close(got, wanted, rtol=2**-6, atol=2**-8)


def test_temporal_attention_of_nothing(kernels):
    for visible in (grid(4, 3, 0), VisibleTokens(torch.zeros(2, 0, dtype=torch.int64), 4, 3, 3)):
        inputs, upstream = drawn("temporal_attention", visible, 2, 8, torch.bfloat16)
        out, grad = run_temporal(kernels, inputs, visible, upstream)
        assert out.numel() == grad.numel() == 0


@pytest.mark.parametrize("name", GATHERS)
def test_nothing_visible_and_no_video(kernels, name):
    none = torch.zeros(2, 0, dtype=torch.int64)
    for visible in (VisibleTokens(none, 4, 3), VisibleTokens(none[:0], 4, 3), VisibleTokens.all(0, 4, 3)):
        inputs, upstream = drawn(name, visible, 2, 4, torch.float32)
        check(kernels, name, inputs, visible, upstream)


def test_the_emulator_finds_what_would_hang_or_crash(kernels):
    assert kernels.broken(0) == b"the lanes of a warp are at different operations"
    assert kernels.broken(1) == b"threads of a block wait for others that ended or wait elsewhere"
    assert kernels.broken(2) == b"a vector is misaligned"
