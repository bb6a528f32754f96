"""The ops on any rows, ``residual_norm`` and ``bias_gelu``: mixed dtypes, real widths, memory kept for backward."""

from __future__ import annotations

import dense
import pytest
import torch
from op_cases import seeded
from torch import Tensor

import bt_kernels
from bt_kernels._library import OPS
from bt_kernels._triton import interpreting

DEVICE = "cpu" if interpreting() or not torch.cuda.is_available() else "cuda"
# The stream's dtype, the update's, the LayerNorm's and the result's: float32 streams and weights beside products in
# bfloat16 (autocast), a stream in bfloat16 with float32 weights, and float16 beside a float32 stream.
MIXED = (
    (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.float32, torch.float16, torch.float16, torch.float32),
)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    kernel = next(each for each in OPS["bias_gelu"].kernels if each.backend == request.param)
    if reason := kernel.why_not(torch.empty(0, device=DEVICE)):
        pytest.skip(reason)
    return request.param


def drawn(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=seeded(seed), dtype=torch.float64).to(DEVICE, dtype).requires_grad_()


def values_and_gradients(function, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    given = [u.to(out.device, out.dtype) for u, out in zip(upstream, outs, strict=True)]
    return [out.detach() for out in outs] + list(torch.autograd.grad(outs, inputs, given))


def assert_near(got: list[Tensor], inputs: list[Tensor], exact, upstream: list[Tensor], inherited: float = 0) -> None:
    """Compare values and gradients with ``exact`` in float64, within some roundings of each tensor's own dtype.

    ``inherited`` is the relative error of a rounded tensor that all the others are computed from.
    """
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    expected = values_and_gradients(exact, wide, [u.cpu().double() for u in upstream])
    for place, (value, right) in enumerate(zip(got, expected, strict=True)):
        error = (value.cpu().double() - right).abs().max().item()
        roundings = 64 if value.dtype == torch.float32 else 4  # of float32: sums over rows
        bound = (roundings * torch.finfo(value.dtype).eps + inherited) * right.abs().max().item()
        assert error <= bound, f"tensor {place}: error {error:.3g} over {bound:.3g}"


@pytest.mark.parametrize("dtypes", MIXED, ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes))
def test_norm_of_mixed_dtypes(backend, dtypes):
    stream, product, weights, result = dtypes
    x, update = drawn(2, 9, 24, dtype=stream), drawn(2, 8, 24, dtype=product, seed=1)
    weight, bias = drawn(24, dtype=weights, seed=2), drawn(24, dtype=weights, seed=3)
    scale = drawn(2, 8, seed=4).detach().abs()
    upstream = [drawn(2, 9, 24, dtype=dtype, seed=5 + i).detach() for i, dtype in enumerate((stream, result))]

    def run(x, update, weight, bias):
        return bt_kernels.residual_norm(x, update, weight, bias, scale=scale, dtype=result, backend=backend)

    got = values_and_gradients(run, [x, update, weight, bias], upstream)
    assert [t.dtype for t in got] == [stream, result, stream, product, weights, weights]
    assert_near(
        got,
        [x, update, weight, bias],
        lambda x, update, weight, bias: dense.residual_norm(x, update, weight, bias, scale.cpu().double()),
        upstream,
        inherited=4 * torch.finfo(stream).eps,  # the sum is rounded before it is normalised, which float64 is not
    )


@pytest.mark.parametrize("width", [768, 1024, 1408, 7, 1])
def test_norm_of_real_and_odd_widths(backend, width):
    """Of rows that stand far from zero beside their deviation, where a variance from sums of squares would be lost."""
    x = (drawn(1, 5, width).detach() + 100).requires_grad_()
    inputs = [x, drawn(1, 5, width, seed=1), drawn(width, seed=2), drawn(width, seed=3)]
    upstream = [drawn(1, 5, width, seed=4).detach(), drawn(1, 5, width, seed=5).detach()]
    summed, normed, *gradients = values_and_gradients(
        lambda *tensors: bt_kernels.residual_norm(*tensors, backend=backend), inputs, upstream
    )
    wide = [summed.double().cpu(), *(t.detach().double().cpu() for t in inputs[2:])]
    wide = [t.requires_grad_() for t in wide]
    expected = dense.residual_norm(wide[0], None, *wide[1:])
    torch.testing.assert_close(summed, inputs[0].detach() + inputs[1].detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(normed.double().cpu(), expected[1].detach(), rtol=0, atol=2e-4)
    exact = torch.autograd.grad(expected, wide, [u.cpu().double() for u in upstream])
    for got, right in zip(gradients, (exact[0], *exact), strict=True):
        torch.testing.assert_close(got.double().cpu(), right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_activation_of_several_blocks_and_mixed_dtypes(backend, act):
    """600 columns are two blocks, 70 rows three partial sums; the bias is float32 beside rows in bfloat16."""
    x = (2 * drawn(2, 35, 600).detach()).bfloat16().requires_grad_()
    bias, upstream = drawn(600, seed=1), [drawn(2, 35, 600, dtype=torch.bfloat16, seed=2).detach()]
    got = values_and_gradients(lambda x, bias: bt_kernels.bias_gelu(x, bias, act, backend), [x, bias], upstream)
    assert [t.dtype for t in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert_near(got, [x, bias], lambda x, bias: dense.bias_gelu(x, bias, act), upstream)


def test_activation_of_far_values(backend):
    """What is far below zero gives zero and what is far above itself, with slopes 0 and 1: no overflow, no NaN."""
    for act in ("quick_gelu", "gelu", "gelu_pytorch_tanh"):
        x = torch.tensor([-1e4, -60.0, 60.0, 1e4], device=DEVICE).requires_grad_()
        out = bt_kernels.bias_gelu(x, None, act, backend)
        torch.testing.assert_close(out.cpu(), torch.tensor([0.0, 0.0, 60.0, 1e4]))
        (slope,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(slope.cpu(), torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_shapes_of_activation():
    """Any number of leading dimensions, one row, no rows; the same as of flat rows."""
    x, bias = drawn(2, 3, 5, 8), drawn(8, seed=1)
    expected = bt_kernels.bias_gelu(x.flatten(0, 2), bias)
    torch.testing.assert_close(bt_kernels.bias_gelu(x, bias).flatten(0, 2), expected)
    torch.testing.assert_close(bt_kernels.bias_gelu(x[0, 0, 0], bias), expected[0])
    assert bt_kernels.bias_gelu(x[:0], bias).shape == (0, 3, 5, 8)
    gradients = torch.autograd.grad(bt_kernels.bias_gelu(x[0, 0, 0], bias).sum(), [x, bias])
    torch.testing.assert_close(gradients[0][0, 0, 0], gradients[1])


def test_rows_without_update_stay_as_they_are(backend):
    x, update = drawn(2, 6, 16), drawn(2, 5, 16, seed=1)
    weight, bias = drawn(16, seed=2), drawn(16, seed=3)
    summed, normed = bt_kernels.residual_norm(x, update, weight, bias, backend=backend)
    assert torch.equal(summed[:, 0], x[:, 0])
    torch.testing.assert_close(normed[:, :1], bt_kernels.residual_norm(x[:, :1], None, weight, bias)[1])
    same, _ = bt_kernels.residual_norm(x, None, weight, bias, backend=backend)
    assert same is x


def test_gradients_of_sum_or_of_norm_alone(backend):
    """A sum that only adds hands its gradient on as it is; with the norm's alone it adds nothing."""
    inputs = [drawn(2, 5, 16), drawn(2, 5, 16, seed=1), drawn(16, seed=2), drawn(16, seed=3)]
    upstream = drawn(2, 5, 16, seed=4).detach()
    summed, normed = bt_kernels.residual_norm(*inputs, backend=backend)
    of_sum = torch.autograd.grad(summed, inputs, upstream, retain_graph=True)
    assert torch.equal(of_sum[0], upstream) and torch.equal(of_sum[1], upstream)
    assert not of_sum[2].any() and not of_sum[3].any()
    of_norm = torch.autograd.grad(normed, inputs, upstream, retain_graph=True)
    of_both = torch.autograd.grad([summed, normed], inputs, [upstream, upstream])
    torch.testing.assert_close(of_both[0], of_norm[0] + upstream)
    torch.testing.assert_close(of_both[2:], of_norm[2:])


def test_backward_op_adds_the_streams_gradient_without_update(backend):
    """A layer written by hand calls the backward op: its LayerNorm's input takes the stream's gradient in one pass."""
    x, weight, bias = (t.detach() for t in (drawn(2, 5, 16), drawn(16, seed=2), drawn(16, seed=3)))
    of_stream, of_normed = drawn(2, 5, 16, seed=4).detach(), drawn(2, 5, 16, seed=5).detach()
    arguments = (x, None, None, weight, bias, 1e-5, None)
    empty, _, mean, rstd = torch.ops.bt_kernels.residual_norm(*arguments, backend)
    run = torch.ops.bt_kernels.residual_norm_backward
    needs = [True, False, True, True]
    together, _, *of_weights = run(of_stream, of_normed, *arguments, empty, mean, rstd, needs, backend)
    alone, _, *same = run(None, of_normed, *arguments, empty, mean, rstd, needs, backend)
    torch.testing.assert_close(together, alone + of_stream)
    torch.testing.assert_close(of_weights, same)


def stored_bytes(function, *leaves: Tensor) -> int:
    """Bytes that autograd keeps for backward of a call, apart from the leaves' own memory."""
    known = {t.untyped_storage().data_ptr() for t in leaves}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


def test_what_is_kept_for_backward():
    """Of a sum: the sum, two numbers of each row, and a row each for the shapes of x and update. Of an activation:
    nothing but its input."""
    weight, bias = drawn(64, seed=2), drawn(64, seed=3)
    x, update = drawn(2, 50, 64) * 1, drawn(2, 50, 64, seed=1) * 1
    rows, row = 2 * 50 * 64 * 4, 64 * 4
    kept = stored_bytes(lambda: bt_kernels.residual_norm(x, update, weight, bias), weight, bias)
    assert kept <= rows + 2 * 2 * 50 * 4 + 2 * row
    kept = stored_bytes(lambda: bt_kernels.residual_norm(x, None, weight, bias), weight, bias)
    assert rows <= kept <= rows + 2 * 2 * 50 * 4
    assert stored_bytes(lambda: bt_kernels.bias_gelu(x, bias), x, bias) == 0


def test_one_gradient_serves_stream_and_update(monkeypatch):
    """Where both have one dtype and every row has an update, their gradients are equal and computed once."""
    asked = []
    kernel = next(each for each in OPS["residual_norm"].kernels if each.backend == "reference")

    def backward(*args, original=kernel.backward):
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setitem(kernel.__dict__, "backward", backward)
    x, update = drawn(2, 5, 16) * 1, drawn(2, 5, 16, seed=1) * 1
    weight, bias = drawn(16, seed=2), drawn(16, seed=3)
    for first, wanted in ((x, update), (x, update[:, 1:]), (x.detach(), update)):
        out = torch.cat(bt_kernels.residual_norm(first, wanted, weight, bias, backend="reference"), 1)
        leaves = [t for t in (first, wanted) if t.requires_grad]
        gradients = torch.autograd.grad(out.square().sum(), leaves)
        if wanted is update:
            torch.testing.assert_close(gradients[-1], gradients[0], rtol=0, atol=0)
    assert [needs[:2] for needs in asked] == [(True, False), (True, True), (True, False)]
