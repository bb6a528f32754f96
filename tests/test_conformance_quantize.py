"""quantize_rows, which has no gradient, on every backend: nearest numbers of float8, and the reference's bits."""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, Form, call, runs, seeded
from torch import Tensor
from torch.library import opcheck

import bt_kernels
from bt_kernels._cases import variants
from bt_kernels._dispatch import BackendUnavailable

FLOAT8 = torch.float8_e4m3fn
VARIANT = next(each for each in variants() if each.op == "quantize_rows")
RUNS = runs([VARIANT])
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NUMBERS = torch.arange(256, dtype=torch.uint8).view(FLOAT8).double()
NUMBERS = NUMBERS[NUMBERS.isfinite()]
FORMS = (
    *(FORM[name] for name in ("tube70", "padded", "heads64", "heads88", "odd_width")),
    Form("wide", FORM["one_token"].build, 2, 640),
)


def bits(values: Tensor) -> Tensor:
    """The bits of float8 numbers; of each NaN the same."""
    return torch.where(values.float().isnan(), 0x7F, values.view(torch.uint8))


def quantised(rows: Tensor, backend: str | None) -> tuple[Tensor, Tensor]:
    """Quantise; skip the test where the backend cannot run, and compare all bits with the reference's."""
    values, scale = call(VARIANT, {"rows": rows}, FORM["all"].build(), backend)
    exact, its_scale = bt_kernels.quantize_rows(rows.cpu(), "reference")
    assert values.shape == rows.shape and values.dtype == FLOAT8 and values.is_contiguous()
    assert scale.shape == (len(rows), 1) and scale.dtype == torch.float32
    assert torch.equal(bits(values.cpu()), bits(exact))
    torch.testing.assert_close(scale.cpu(), its_scale, rtol=0, atol=0, equal_nan=True)
    return values.cpu(), scale.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_equals_dense(variant, backend, device, form, dtype):
    """Every value is the number of float8 nearest to its quotient, found in the list of all of them."""
    rows = variant.draw(form.build(), form.heads, form.width)["rows"].to(device, dtype)
    rows = rows * torch.logspace(-4, 3, len(rows), device=device, dtype=dtype)[:, None]
    values, scale = quantised(rows, backend)
    exact = rows.cpu().double()
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest / 448, rtol=3e-7, atol=0)
    quotient = exact / scale.double()
    nearest = (quotient[..., None] - NUMBERS).abs().amin(-1)
    assert ((quotient - values.double()).abs() <= nearest + 1e-6 * quotient.abs()).all()


@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_rows_that_are_not_finite_or_nothing(variant, backend, device):
    rows = torch.randn(8, 40, generator=seeded(0))
    rows[0] = 0.0
    rows[1, 3] = torch.nan
    rows[2, 3] = torch.inf
    rows[3, 3], rows[3, 4] = -torch.inf, torch.nan
    rows[4] *= 1e-14  # below the least scale
    rows[5] = torch.finfo(torch.float32).max
    rows[6] = -0.0
    values, scale = quantised(rows.to(device), backend)
    values = values.float()
    assert not values[[0, 6]].any() and (scale[[0, 6]] > 0).all()
    assert values[[1, 3]].isnan().all() and scale[[1, 3]].isnan().all()
    assert values[2, 3].isnan() and not values[2, [0, 1, 2, *range(4, 40)]].any()
    assert values[4].abs().max() < 448 and (values[5] == 448).all()
    assert values[7].abs().max() == 448


@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_ties_and_the_ends_of_the_range(variant, backend, device):
    """A row whose scale is 1: halves between two numbers go to the even one, and what is tiny to 0."""
    rows = torch.tensor([[448.0, -448.0, 17.0, 19.0, 1.0625, 1.1875, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 2.0**-12]])
    values, scale = quantised(rows.to(device), backend)
    assert scale.item() == pytest.approx(1, rel=1e-6)
    expected = [448.0, -448.0, 16.0, 20.0, 1.0, 1.25, 2.0**-9, 0.0, 2.0**-8, 0.0]
    if scale.item() == 1:
        assert values[0].float().tolist() == expected


@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_any_strides(variant, backend, device):
    rows = torch.randn(12, 34, generator=seeded(1)).to(device)
    for view in (rows[:, ::2], rows.t(), rows[1:, 3:], rows[:1].expand(5, -1), rows[:, :1], rows[:0]):
        quantised(view, backend)


def test_real_widths_and_what_is_too_wide():
    for width in (1024, 4096, 1408, 6144):
        quantised(torch.randn(3, width, generator=seeded(2)).bfloat16(), "triton")
    with pytest.raises(BackendUnavailable, match="wider than 65536 elements"):
        bt_kernels.quantize_rows(torch.ones(1, 65537), "triton")
    assert bt_kernels.quantize_rows(torch.ones(1, 65537))[0].float().eq(448).all()


def test_results_have_no_gradient_and_no_autocast():
    rows = torch.randn(3, 16, generator=seeded(3), requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        values, scale = bt_kernels.quantize_rows(rows)
    assert not values.requires_grad and not scale.requires_grad
    for got, expected in zip((values, scale), bt_kernels.quantize_rows(rows.detach()), strict=True):
        assert torch.equal(got.float(), expected.float())


def test_registered_op():
    opcheck(torch.ops.bt_kernels.quantize_rows, (torch.randn(3, 16), "reference"))


@pytest.mark.parametrize("backend, traced", [(None, False), ("reference", True)], ids=["definition", "op"])
def test_compiled(backend, traced):
    """A compiler sees the definition, which it can fuse; with a backend named it sees the op."""
    from torch._dynamo.testing import CompileCounterWithBackend

    rows, counter = torch.randn(3, 16, generator=seeded(4)), CompileCounterWithBackend("eager")
    values, scale = torch.compile(bt_kernels.quantize_rows, backend=counter, fullgraph=True)(rows, backend)
    assert ("bt_kernels" in str(counter.graphs[0].graph)) is traced
    expected = bt_kernels.quantize_rows(rows)
    assert torch.equal(values.float(), expected[0].float()) and torch.equal(scale, expected[1])
    torch.compiler.reset()


@pytest.mark.parametrize(
    "rows, error, message",
    [
        (None, TypeError, r"rows must be a tensor \[n, I\], but is NoneType"),
        (torch.ones(2, 3, dtype=torch.int32), TypeError, "rows must be a floating-point tensor"),
        (torch.ones(3), ValueError, r"rows must have 2 dimensions \[n, I\], but its shape is \[3\]"),
        (torch.ones(3, 0), ValueError, r"rows must have at least one column \[n, I\], but its shape is \[3, 0\]"),
    ],
)
def test_bad_input(rows, error, message):
    with pytest.raises(error, match=message):
        bt_kernels.quantize_rows(rows)
