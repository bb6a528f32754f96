"""Ops that read the tower's tokens in a dtype of their own: a tower in 16 bits beside a branch in float32."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, VARIANT
from torch.library import opcheck

import bt_kernels
from bt_kernels import passes
from bt_kernels._cases import flat_arguments
from bt_kernels._library import OPS

BACKENDS = ("reference", "cpu", "triton")
NAMES = ("gather_embed", "gather_merge", "gather_merge-sum", "pool_video_tokens", "alignment_loss")
TOWER = {"alignment_loss": "target"}
forms = pytest.mark.parametrize("form", ["tube70", "padded"])
names = pytest.mark.parametrize("name", NAMES)


def inputs_of(name, visible, tower):
    """Inputs in float32, the tower's tokens rounded to bfloat16 and then in the dtype ``tower``."""
    inputs = {key: None if t is None else t.float() for key, t in VARIANT[name].draw(visible).items()}
    key = TOWER.get(name, "backbone")
    inputs[key] = inputs[key].bfloat16().to(tower)
    for each in VARIANT[name].differentiable:
        inputs[each].requires_grad_()
    return inputs


def run(name, inputs, visible, backend):
    variant = VARIANT[name]
    out = variant.run(inputs, visible, backend)
    upstream = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    learning = [inputs[each] for each in variant.differentiable]
    return out.detach(), torch.autograd.grad(out, learning, upstream)


def skip_unavailable(name, backend):
    if backend not in [kernel.backend for kernel in OPS[VARIANT[name].op].kernels]:
        pytest.skip(f"{VARIANT[name].op} has no {backend} kernel")


@pytest.mark.parametrize("backend", BACKENDS)
@forms
@names
def test_the_result_is_that_of_the_tower_in_float32(name, form, backend):
    """Only the gradient of the tower is rounded to its dtype."""
    skip_unavailable(name, backend)
    visible = FORM[form].build()
    narrow, wide = (inputs_of(name, visible, dtype) for dtype in (torch.bfloat16, torch.float32))
    out, gradients = run(name, narrow, visible, backend)
    expected, of_wide = run(name, wide, visible, "reference")
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=2e-5, atol=2e-5)
    for key, found, exact in zip(VARIANT[name].differentiable, gradients, of_wide, strict=True):
        assert found.dtype == narrow[key].dtype, key
        close = {"rtol": 1e-2, "atol": 1e-2} if found.dtype == torch.bfloat16 else {"rtol": 2e-4, "atol": 2e-5}
        torch.testing.assert_close(found.float(), exact, **close, msg=lambda m, key=key: f"{key}: {m}")


@names
def test_the_registered_op_is_consistent(name):
    visible = FORM["tube70"].build()
    arguments = flat_arguments(VARIANT[name], inputs_of(name, visible, torch.bfloat16), visible)
    opcheck(getattr(torch.ops.bt_kernels, VARIANT[name].op), (*arguments, "reference"))


@names
def test_autocast_does_not_convert_the_tower(name, monkeypatch):
    """It would write the whole state, of which the ops read the visible rows."""
    visible = FORM["tube70"].build()
    inputs = inputs_of(name, visible, torch.bfloat16)
    expected = VARIANT[name].run(inputs, visible, "reference")
    seen = []
    op = OPS[VARIANT[name].op]
    kernel = next(each for each in op.kernels if each.backend == "reference")
    original = kernel.forward
    monkeypatch.setitem(kernel.__dict__, "forward", lambda *args: seen.append(args) or original(*args))
    with torch.autocast("cpu", torch.bfloat16):
        out = VARIANT[name].run(inputs, visible, "reference")
    given = dict(zip(op.arguments, seen[0], strict=True))
    assert given[TOWER.get(name, "backbone")].dtype == torch.bfloat16
    others = [t for key, t in given.items() if isinstance(t, torch.Tensor) and key != TOWER.get(name, "backbone")]
    assert {t.dtype for t in others if t.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(out, expected)


def test_alignments_products_take_autocasts_dtype_on_a_gpu():
    from bt_kernels.ops.alignment_loss import chunks

    branch = torch.empty(2, 3, 4, device="meta")
    assert chunks._operand_dtype(branch, torch.bfloat16) == torch.bfloat16
    assert chunks._operand_dtype(branch, None) == torch.float32
    assert chunks._operand_dtype(branch.bfloat16(), None) == torch.bfloat16
    assert chunks._operand_dtype(torch.empty(2, 3, 4).bfloat16(), torch.bfloat16) == torch.float32


def test_a_merge_as_a_pass_takes_a_narrow_tower():
    visible = FORM["tube70"].build()
    inputs = inputs_of("gather_merge", visible, torch.bfloat16)
    with torch.no_grad():
        out = passes.gather_merge(*inputs.values(), visible.as_arguments(), None)
    torch.testing.assert_close(out, bt_kernels.gather_merge(*inputs.values(), visible))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_alignment_keeps_neither_state_for_its_backward(backend):
    """The forward computes the gradients: the last states of tower and branch, the largest inputs, may be freed."""
    visible = FORM["tube70"].build()
    inputs, kept = inputs_of("alignment_loss", visible, torch.float32), []
    states = {inputs[name].untyped_storage().data_ptr() for name in ("branch", "target")}
    pack = lambda tensor: kept.append(tensor.untyped_storage().data_ptr()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = VARIANT["alignment_loss"].run(inputs, visible, backend)
    assert kept and not states & set(kept)
    loss.backward()
    assert inputs["branch"].grad.any()
