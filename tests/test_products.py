"""The products ``linear_add`` and ``mlp``: several tiles, tensor descriptors, mixed dtypes, memory kept, Inf, NaN."""

from __future__ import annotations

import dense
import pytest
import torch
from test_row_ops import DEVICE, assert_near, drawn, stored_bytes, values_and_gradients

import bt_kernels
from bt_kernels import passes
from bt_kernels._library import OPS

CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    kernel = next(each for each in OPS["mlp"].kernels if each.backend == request.param)
    if reason := kernel.why_not(torch.empty(0, device=DEVICE)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def descriptors(monkeypatch):
    """Kernels and tile sizes of sm_90, in Triton's interpreter."""
    product = pytest.importorskip("bt_kernels._triton_product")
    triton = pytest.importorskip("bt_kernels._triton")
    if DEVICE == "cpu":
        for module in (product, triton):
            monkeypatch.setattr(module, "architecture", lambda device: 90)


def weights_of_mlp(width: int, hidden: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    sizes = ((hidden, width), (hidden,), (width, hidden), (width,))
    drawn_ = [drawn(*size, seed=10 + i).detach() / size[-1] ** (0.5 * (len(size) - 1)) for i, size in enumerate(sizes)]
    return [each.to(dtype).requires_grad_() for each in drawn_]


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_mlp_of_several_tiles_and_mixed_dtypes(backend, act):
    """140 rows and 136 and 72 columns are several tiles with edges; the stream is float32 beside bfloat16."""
    x = drawn(2, 70, 72, dtype=torch.bfloat16)
    weights = weights_of_mlp(72, 136, torch.bfloat16)
    stream, scale = drawn(2, 71, 72, seed=3), drawn(2, 70, seed=4).detach().abs()
    upstream = [drawn(2, 71, 72, seed=5).detach()]

    def run(x, *rest):
        return bt_kernels.mlp(x, *rest[:4], act, rest[4], scale, backend)

    got = values_and_gradients(run, [x, *weights, stream], upstream)
    assert [t.dtype for t in got] == [torch.float32, *[torch.bfloat16] * 5, torch.float32]
    assert_near(
        got, [x, *weights, stream],
        lambda x, *rest: dense.mlp(x, *rest[:4], act, rest[4], scale.cpu().double()),
        upstream, inherited=2 * torch.finfo(torch.bfloat16).eps,  # the activated hidden rows are rounded
    )  # fmt: skip


@pytest.mark.parametrize("width, hidden", [(72, 264), (7, 20)])
def test_descriptors_change_nothing(descriptors, width, hidden):
    """Rows that are no multiple of 16 bytes are read by pointers on sm_90 too."""
    if DEVICE != "cpu":
        pytest.skip("a GPU runs its own architecture's kernels in every test")
    x, stream = drawn(1, 130, width, dtype=torch.bfloat16), drawn(1, 130, width, seed=3)
    weights = weights_of_mlp(width, hidden, torch.bfloat16)
    upstream = [drawn(1, 130, width, seed=5).detach()]
    results = [
        values_and_gradients(
            lambda x, *rest, name=name: bt_kernels.mlp(x, *rest[:4], "gelu", rest[4], backend=name),
            [x, *weights, stream], upstream,
        )
        for name in ("triton", "reference")
    ]  # fmt: skip
    for got, expected in zip(*results, strict=True):
        size = expected.float().abs().max().item()
        torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=2 ** (-6) * size)


def test_float32_product_follows_torchs_setting(monkeypatch):
    product = pytest.importorskip("bt_kernels._triton_product")
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "ieee")):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert product._precision(torch.float32) == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_rows_without_update_stay_and_nothing_is_changed(backend):
    x, weight, stream = drawn(2, 5, 8), drawn(8, 8, seed=1), drawn(2, 7, 8, seed=2)
    before = stream.detach().clone()
    out = bt_kernels.linear_add(x, weight, None, stream, backend=backend)
    assert torch.equal(out[:, :2], stream[:, :2]) and torch.equal(stream, before)
    torch.testing.assert_close(out[:, 2:], stream[:, 2:] + x @ weight.t(), **CLOSE)


def test_inf_and_nan_spread_as_in_torch(backend):
    """To the rows that hold them alone, also from the last rows and columns, next to a tile's edge."""
    x, weight, stream = (t.detach() for t in (drawn(1, 66, 8), drawn(65, 8, seed=1), drawn(1, 66, 65, seed=2)))
    x[0, 3, 0], x[0, 65, 7], stream[0, 9, 64], weight[64] = torch.nan, torch.inf, -torch.inf, 0.0
    out = bt_kernels.linear_add(x, weight, None, stream, backend=backend)
    expected = stream + torch.nn.functional.linear(x, weight)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    torch.testing.assert_close(out, expected, equal_nan=True, **CLOSE)


def test_no_inner_width_is_a_product_of_nothing(backend):
    x, weight, stream = drawn(1, 3, 0), drawn(5, 0), drawn(1, 3, 5)
    assert torch.equal(bt_kernels.linear_add(x, weight, None, stream, backend=backend), stream)


def test_what_is_kept_for_backward():
    """Of an MLP its input and the argument of the activation; of a linear layer its input."""
    x, stream = drawn(2, 50, 64) * 1, drawn(2, 50, 64, seed=1) * 1
    weights = weights_of_mlp(64, 256)
    rows, hidden, row = 2 * 50 * 64 * 4, 2 * 50 * 256 * 4, 256 * 4
    kept = stored_bytes(lambda: bt_kernels.mlp(x, *weights, stream=stream), *weights)
    assert rows + hidden <= kept <= rows + hidden + 4 * row
    kept = stored_bytes(lambda: bt_kernels.linear_add(x, weights[0][:64], weights[3], stream), *weights)
    assert rows <= kept <= rows + 4 * row
    with torch.no_grad():
        assert stored_bytes(lambda: bt_kernels.mlp(x, *weights, stream=stream), *weights) == 0


def test_gradient_of_the_hidden_layer_alone(backend):
    """What a layer written by hand calls is what the op's own backward does."""
    x, weights = drawn(2, 9, 16), weights_of_mlp(16, 40)
    hidden = torch.nn.functional.linear(x, *weights[:2]).detach().requires_grad_()
    activated = bt_kernels.bias_gelu(hidden, None, "gelu", "reference")
    grad = drawn(2, 9, 16, seed=7).detach()
    (expected,) = torch.autograd.grad(torch.nn.functional.linear(activated, weights[2]), hidden, grad)
    with torch.no_grad():
        found = passes.mlp_hidden_grad(grad, weights[2], hidden, "gelu", backend)
    for got, right in zip(found, (expected, activated, expected.sum((0, 1))), strict=True):
        torch.testing.assert_close(got, right, **CLOSE)
