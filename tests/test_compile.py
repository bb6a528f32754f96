"""Every op under torch.compile, opcheck and autocast, forward and backward."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, VARIANT, VARIANTS, HostSyncs, call, seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bt_kernels
from bt_kernels import VisibleTokens, _triton
from bt_kernels._cases import Variant, flat_arguments, passes
from bt_kernels._library import OPS

BY_NAME = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


class Calls(TorchDispatchMode):
    """Records the registered ops that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bt_kernels":
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def learning(variant: Variant, visible: VisibleTokens, dtype: torch.dtype = torch.float32, seed: int = 0):
    inputs = variant.draw(visible, seed=seed)
    inputs = {name: None if t is None else t.to(dtype) for name, t in inputs.items()}
    for name in variant.differentiable:
        inputs[name].requires_grad_()
    return inputs


def recorded(variant: Variant, visible: VisibleTokens) -> list[tuple]:
    inputs = learning(variant, visible)
    with Calls() as calls:
        call(variant, inputs, visible, None).sum().backward()
    return calls.seen


def as_leaves(args: tuple, learn: bool) -> tuple:
    """Copies of recorded arguments; float tensors need gradients where ``learn``."""
    return tuple(
        a.detach().clone().requires_grad_(learn and a.is_floating_point()) if isinstance(a, Tensor) else a for a in args
    )


@pytest.mark.parametrize("form", ["tube70", "padded"])
@BY_NAME
def test_opcheck(variant, form):
    calls = recorded(variant, FORM[form].build())
    assert [func.overloadpacket.__name__ for func, _, _ in calls] == [variant.op, f"{variant.op}_backward"]
    for func, args, kwargs in calls:
        backward = func.overloadpacket.__name__.endswith("_backward")
        args = as_leaves(args, learn=False)
        if not backward:
            places = [OPS[variant.op].arguments.index(name) for name in variant.differentiable]
            for place in places:
                args[place].requires_grad_()
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("form", ["tube70", "windows", "padded", "one_frame"])
@BY_NAME
def test_compiles_whole(variant, form):
    """fullgraph refuses graph breaks: VisibleTokens goes in as it is, and backward is traced with forward."""
    visible = FORM[form].build()

    def step(inputs, visible):
        return variant.run(inputs, visible)

    check_same(variant, step, torch.compile(step, fullgraph=True, backend="aot_eager"), visible)
    torch.compiler.reset()


def check_same(variant: Variant, plain, compiled, visible: VisibleTokens, seed: int = 0) -> None:
    results = []
    for function in (plain, compiled):
        inputs = learning(variant, visible, seed=seed)
        out = function(inputs, visible)
        upstream = torch.randn(out.shape, generator=seeded(4))
        names = variant.differentiable
        results.append([out, *torch.autograd.grad(out, [inputs[name] for name in names], upstream)])
    for name, got, expected in zip(("", *variant.differentiable), results[1], results[0], strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        # aot_eager runs the very same op; inductor may fuse what stands around it.
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["tube", "random"])
@BY_NAME
def test_one_graph_serves_every_number_of_tokens(variant, kind):
    """With dynamic shapes, another number of visible tokens and videos compiles nothing new."""
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import
    from torch.fx.experimental import _config

    graphs = CompileCounterWithBackend("aot_eager")

    def step(inputs, visible):
        return variant.run(inputs, visible)

    compiled = torch.compile(step, fullgraph=True, backend=graphs, dynamic=True)
    first = 0
    # Duck shapes would bind sizes that are equal by chance in these small inputs.
    with _config.patch(use_duck_shape=False):
        for batch, ratio in ((2, 0.5), (3, 0.25), (4, 0.7)):
            visible = getattr(VisibleTokens, kind)(batch, 12, 4, ratio, seeded(batch))
            check_same(variant, step, compiled, visible, seed=batch)
            first = first or graphs.frame_count  # float arguments make the first trace start over
    assert 0 < graphs.frame_count == first
    torch.compiler.reset()


def test_building_the_tokens_compiles_with_the_op():
    """A training step draws its tubes inside the graph."""

    def step(backbone, branch, score):
        visible = VisibleTokens.tube(2, 8, 3, 0.5)
        return bt_kernels.gather_merge(backbone, branch, None, visible), visible.index * score

    backbone, branch = torch.randn(2, 3, 9, 4), torch.zeros(2, 13, 4)
    merged, index = torch.compile(step, fullgraph=True, backend="aot_eager")(backbone, branch, 1)
    plain = bt_kernels.gather_merge(backbone, branch, None, VisibleTokens(index, 8, 3, 3).validate())
    torch.testing.assert_close(merged, plain)
    torch.compiler.reset()


@pytest.mark.slow
def test_inductor_runs_a_branch_layer():
    """One step through all ops with inductor: gather, both attentions, merge, alignment; gradients equal eager."""
    visible = VisibleTokens.tube(2, 8, 3, 0.5, seeded(0))
    gather, merge = (VARIANT[name].draw(visible) for name in ("gather_embed", "gather_merge"))
    head = {k: t for k, t in VARIANT["alignment_loss"].draw(visible).items() if k not in ("branch", "target")}
    weight = torch.randn(8, 24, dtype=torch.float64, generator=seeded(1)) / 8**0.5

    def layer(weight, visible):
        z = bt_kernels.gather_embed(**gather, visible=visible)
        qkv = torch.nn.functional.gelu(z @ weight).unflatten(2, (3, 2, 4))
        patches = bt_kernels.temporal_attention(qkv[:, 1:], visible).flatten(2)
        z = z + bt_kernels.spatial_attention(qkv, visible).flatten(2)
        z = z + torch.nn.functional.pad(patches, (0, 0, 1, 0))
        z = bt_kernels.gather_merge(merge["backbone"], z, merge["gate"], visible)
        pooled = bt_kernels.pool_video_tokens(merge["backbone"], z, visible)
        return bt_kernels.alignment_loss(z, merge["backbone"], visible, **head) + pooled.square().mean()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        loss = function(leaf, visible)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    torch.compiler.reset()


@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "mixed"])
@BY_NAME
def test_autocast(variant, mixed, lower):
    """Attention and the MLP run in autocast's dtype, as matrix products do, unless they add onto a stream, which keeps
    its own; other ops on tokens of videos run in the widest of their inputs' dtypes, and the rest in that of the first
    input, as elementwise operators do."""
    visible = FORM["padded"].build()
    inputs = learning(variant, visible)
    given = dict(inputs)
    first = variant.differentiable[0]
    if mixed and len(inputs) > 1:
        given[first] = inputs[first].to(lower)
    with torch.autocast("cpu", lower):
        out = call(variant, given, visible, None)
    if variant.op in ("mlp", "linear_add"):
        expected = lower if given.get("stream") is None else given["stream"].dtype
    else:
        expected = lower if "attention" in variant.op or not variant.takes_visible and mixed else torch.float32
    assert out.dtype == expected
    upstream = torch.randn(out.shape, generator=seeded(4)).to(out.dtype)
    found = torch.autograd.grad(out, [inputs[name] for name in variant.differentiable], upstream)
    for name, gradient in zip(variant.differentiable, found, strict=True):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    plain = call(variant, inputs, visible, None)
    # bfloat16 keeps eight bits, float16 eleven: one rounding of the inputs and one of the result.
    torch.testing.assert_close(out.float(), plain, rtol=0, atol=0.03 * plain.abs().max().item())


@BY_NAME
def test_autocast_keeps_float64(variant):
    visible = FORM["padded"].build()
    inputs = variant.draw(visible)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(variant, inputs, visible, None)
    assert out.dtype == torch.float64


@BY_NAME
def test_dtype_mismatch_without_autocast_is_refused(variant):
    visible = FORM["padded"].build()
    inputs = variant.draw(visible)
    others = [name for name, t in inputs.items() if t is not None and name != "target"][1:]
    if not others or variant.op == "spatial_attention":
        pytest.skip("takes one float tensor")
    if not variant.takes_visible or variant.name in (
        "gather_merge-sum",
        "pool_video_tokens",
    ):  # the tower may have a dtype of its own
        pytest.skip("takes tensors of different dtypes")
    inputs[others[0]] = inputs[others[0]].float()
    with pytest.raises(TypeError, match=others[0]):
        call(variant, inputs, visible, None)


@BY_NAME
def test_traces_on_meta_tensors(variant):
    """Fake kernels give the shape and dtype of the result without values."""
    visible = FORM["tube70"].build()
    inputs = variant.draw(visible)
    expected = call(variant, inputs, visible, None)
    meta = {name: None if t is None else t.to("meta") for name, t in inputs.items()}
    got = call(variant, meta, visible.to("meta"), None)
    assert (got.device.type, got.shape, got.dtype) == ("meta", expected.shape, expected.dtype)


@BY_NAME
def test_a_second_derivative_is_refused_not_wrong(variant):
    """The backward ops have no derivative of their own; asking for one must not give zeros in silence."""
    visible = FORM["tube70"].build()
    inputs = learning(variant, visible, torch.float64)
    out = call(variant, inputs, visible, None)
    leaves = [inputs[name] for name in variant.differentiable]
    first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@BY_NAME
def test_no_kernel_waits_for_the_device(variant, backend, monkeypatch):
    """Neither forward nor backward reads a value on the host, in any form. A mode sees nothing inside a registered op,
    so the kernels are called past it; what Triton's interpreter does itself is left out."""
    op = OPS[variant.op]
    kernel = next((kernel for kernel in op.kernels if kernel.backend == backend), None)
    if kernel is None or (reason := kernel.why_not(torch.empty(0))):
        pytest.skip(reason if kernel else "not written for this op")
    for form in ("tube70", "padded", "empty_frame"):
        visible = FORM[form].build()
        inputs = {name: None if t is None else t.float() for name, t in variant.draw(visible).items()}
        runs = passes(kernel, op, flat_arguments(variant, inputs, visible), (True,) * len(op.differentiable))
        with HostSyncs() as syncs:
            monkeypatch.setattr(_triton, "around_launch", syncs.paused)
            for run in runs:
                run()
        assert syncs.calls and not syncs.seen, f"{variant.name} on {form}: {syncs.seen}"


@pytest.mark.gpu
@BY_NAME
def test_nothing_waits_on_a_gpu(variant):
    """CUDA itself says so: its debug mode raises where the host waits."""
    for form in ("tube70", "padded", "empty_frame"):
        visible = FORM[form].build().to("cuda")
        inputs = variant.draw(FORM[form].build())
        inputs = {name: None if t is None else t.to("cuda", torch.bfloat16) for name, t in inputs.items()}
        for name in variant.differentiable:
            inputs[name].requires_grad_()
        call(variant, inputs, visible, None).sum().backward()  # compiles, which may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(variant, inputs, visible, None).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
