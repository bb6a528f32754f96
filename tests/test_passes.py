"""Calls around torch's dispatcher and the passes without autograd: both compute what the registered ops do."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, VARIANT, VARIANTS, call, grads, seeded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bt_kernels
from bt_kernels import passes


class Counting(TorchDispatchMode):
    """Counts the registered ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "bt_kernels":
            self.ops.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Same(Tensor):
    """A subclass that adds nothing."""


def result_and_gradients(variant, inputs, visible) -> list[Tensor]:
    out = call(variant, inputs, visible, None)
    upstream = torch.randn(out.shape, generator=seeded(9), dtype=torch.float64).to(out.dtype)
    return [out, *grads(out, inputs, variant.differentiable, upstream).values()]


@pytest.mark.parametrize("form", ["tube70", "padded"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_an_eager_call_equals_the_registered_op(variant, form):
    visible = FORM[form].build()
    inputs = {name: None if t is None else t.float() for name, t in variant.draw(visible).items()}
    for name in variant.differentiable:
        inputs[name].requires_grad_()
    with Counting() as counting:
        expected = result_and_gradients(variant, inputs, visible)
    assert counting.ops == [variant.op, f"{variant.op}_backward"]
    for got, wanted in zip(result_and_gradients(variant, inputs, visible), expected, strict=True):
        assert torch.equal(got, wanted) and got.requires_grad == wanted.requires_grad


def test_an_eager_call_does_not_enter_the_dispatcher(monkeypatch):
    """Entering it costs more than a small kernel; see bench/host_time.py."""

    def fail(*args):
        raise AssertionError("the registered op was called")

    monkeypatch.setattr(torch.ops.bt_kernels, "gather_merge", fail)
    monkeypatch.setattr(torch.ops.bt_kernels, "gather_merge_backward", fail)
    variant, visible = VARIANT["gather_merge"], FORM["tube70"].build()
    inputs = {name: t.float() for name, t in variant.draw(visible).items()}
    inputs["branch"].requires_grad_()
    call(variant, inputs, visible, None).sum().backward()
    assert inputs["branch"].grad is not None
    inputs["backbone"] = inputs["backbone"].as_subclass(Same)  # may have rules of its own, which the dispatcher applies
    with pytest.raises(AssertionError, match="the registered op"):
        call(variant, inputs, visible, None)


class Attend(torch.autograd.Function):
    """Both attentions as one function, from their passes."""

    @staticmethod
    def forward(ctx, qkv, *visible):
        ctx.backend = passes.forced_backend()
        patches = passes.temporal_attention(qkv[:, 1:], visible, ctx.backend)
        out, lse, cls_out = passes.spatial_attention(qkv, None, visible, ctx.backend)
        ctx.sizes = visible[2:]
        ctx.save_for_backward(qkv, *visible[:2], out, lse, cls_out)
        return patches, out

    @staticmethod
    def backward(ctx, grad_patches, grad):
        qkv, index, counts, *results = ctx.saved_tensors
        visible = (index, counts, *ctx.sizes)
        found = passes.spatial_attention_backward(grad, qkv, None, visible, tuple(results), ctx.backend)
        found[:, 1:] += passes.temporal_attention_backward(grad_patches, qkv[:, 1:], visible, ctx.backend)
        return found, *[None] * 5


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("form", ["tube70", "padded"])
def test_passes_in_an_autograd_function(form, compiled):
    visible = FORM[form].build()
    qkv = VARIANT["spatial_attention"].draw(visible)["qkv"].requires_grad_()
    function = torch.compile(Attend.apply, fullgraph=True, backend="aot_eager") if compiled else Attend.apply
    got = function(qkv, *visible.as_arguments())
    expected = bt_kernels.temporal_attention(qkv[:, 1:], visible), bt_kernels.spatial_attention(qkv, visible)
    upstream = [torch.randn(each.shape, generator=seeded(3), dtype=torch.float64) for each in expected]
    gradient, wanted = (torch.autograd.grad(each, qkv, upstream)[0] for each in (got, expected))
    for one, other in zip((*got, gradient), (*expected, wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.compiler.reset()


def test_the_pass_of_gather_merge():
    variant, visible = VARIANT["gather_merge"], FORM["padded"].build()
    inputs = variant.draw(visible)
    arguments = (*inputs.values(), visible.as_arguments())
    out = passes.gather_merge(*arguments, None)
    assert torch.equal(out, call(variant, inputs, visible, None))
    upstream = torch.randn(out.shape, generator=seeded(3), dtype=torch.float64)
    for name in variant.differentiable:
        inputs[name].requires_grad_()
    expected = grads(call(variant, inputs, visible, None), inputs, variant.differentiable, upstream)
    with torch.no_grad():
        got = passes.gather_merge_backward(upstream, *arguments, (False, True, True), None)
    assert got[0].numel() == 0
    for one, name in zip(got[1:], ("branch", "gate"), strict=True):
        torch.testing.assert_close(one, expected[name], rtol=0, atol=1e-12)


def test_the_forced_backend_is_handed_on():
    assert passes.forced_backend() is None
    with bt_kernels.backend("reference"):
        assert passes.forced_backend() == "reference"
        assert passes.forced_backend("cpu") == "cpu"
