"""Inf, NaN and wrong counts of frames: they spoil only what depends on them.

The measure of attention is one call of PyTorch's scaled_dot_product_attention for each temporal sequence of a head.
"""

from __future__ import annotations

import dense
import pytest
import torch
import torch.nn.functional as F
from op_cases import FORM, RUNS, Form, call, grid, interpreted, seeded
from torch import Tensor

from bt_kernels import VisibleTokens

INF, NAN = float("inf"), float("nan")
TEMPORAL = [run for run in RUNS if run.values[0].op == "temporal_attention"]
# Several sequences in each tile; the last form's queries are taken a few at a time.
LONG_RAGGED = Form("long_ragged", lambda: VisibleTokens.random(1, 3, 20, 0.4, seeded(1)), heads=1, width=16)
POISONED = (FORM["tube70"], FORM["padded"], FORM["windows"], FORM["heads88"], LONG_RAGGED)
POISONS = (("v", INF), ("v", NAN), ("k", INF), ("k", NAN), ("q", -INF), ("q", NAN), ("grad", INF), ("grad", NAN))


def sequences(visible: VisibleTokens, video: int) -> dict[int, list[int]]:
    """The rows of each temporal sequence of a video."""
    found: dict[int, list[int]] = {}
    for n, row in enumerate(dense.rows(visible, video)):
        if row is not None:
            found.setdefault(row[1], []).append(n)
    return found


def by_sdpa(qkv: Tensor, visible: VisibleTokens, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Result and gradient, a call for each sequence of each head; zeros at padding rows."""
    out, gradient = torch.zeros_like(qkv[:, :, 0]), torch.zeros_like(qkv)
    for b in range(visible.batch):
        for rows in sequences(visible, b).values():
            for h in range(qkv.shape[3]):
                part = qkv[b, rows, :, h].clone().requires_grad_()  # [S, 3, E]
                one = F.scaled_dot_product_attention(*part.unbind(1))
                out[b, rows, h] = one.detach()
                gradient[b, rows, :, h] = torch.autograd.grad(one, part, upstream[b, rows, h])[0]
    return out, gradient


def poisoned_kept(run: int, form: int, poison: int) -> bool:
    """In Triton's interpreter every form meets two poisons, by turns; each is met."""
    _, backend, device = TEMPORAL[run].values
    return not interpreted(backend, device) or (form + poison) % 4 == 0


@grid("variant, backend, device, form, poison", TEMPORAL, POISONED, POISONS, kept=poisoned_kept)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_a_sequence_that_is_not_finite_spoils_no_other(variant, backend, device, form, poison):
    visible = form.build()
    name, value = poison
    qkv = variant.draw(visible, form.heads, form.width)["qkv"].float()
    upstream = torch.randn(qkv[:, :, 0].shape, generator=seeded(9))
    rows = list(sequences(visible, 0).values())
    spoilt = rows[len(rows) // 2]
    target = upstream if name == "grad" else qkv[:, :, "qkv".index(name)]
    target[0, spoilt[-1], 0, 1] = value
    expected = by_sdpa(qkv, visible, upstream)
    given = qkv.to(device).requires_grad_()
    out = call(variant, {"qkv": given}, visible.to(device), backend)
    (gradient,) = torch.autograd.grad(out, given, upstream.to(device))
    for got, wanted in zip((out.detach().cpu(), gradient.cpu()), expected, strict=True):
        inside = torch.zeros(got.shape, dtype=torch.bool)
        inside[0, spoilt, ..., 0, :] = True  # of the first head
        assert got[~inside].isfinite().all()
        torch.testing.assert_close(got[~inside], wanted[~inside], rtol=1e-5, atol=1e-5)
        if not wanted.isfinite().all():  # and nothing hides it
            assert not got[inside].isfinite().all()
    # The result is spoilt where SDPA's is; where all scores of a query are -Inf, SDPA gives zeros and others NaN.
    assert not out.detach().cpu()[~expected[0].isfinite()].isfinite().any()
    assert name != "grad" or out.isfinite().all()


COUNTED = [run for run in RUNS if run.values[0].op != "alignment_loss"]  # which reads no counts


@pytest.mark.parametrize("variant, backend, device", COUNTED)
def test_wrong_frame_counts_read_nothing_outside(variant, backend, device):
    """More frames than there are count as all of them, fewer than none as none; or the op refuses them."""
    frames = 3
    index = torch.tensor([[0, 1, 4, 5, 8], [-1] * 5])
    right = VisibleTokens(index, 4, frames, None, torch.tensor([frames, 0]))
    wrong = VisibleTokens(index, 4, frames, None, torch.tensor([frames + 5, -2]), check=False)
    inputs = {name: None if t is None else t.float().to(device) for name, t in variant.draw(right).items()}
    if "backbone" in inputs:  # frames behind the tensor's end are NaN
        tower = inputs["backbone"]
        inputs["backbone"] = torch.cat([tower, torch.full_like(tower, NAN), torch.full_like(tower, NAN)], 1)[:, :frames]
    leaves = [inputs[name].requires_grad_() for name in variant.differentiable]

    def values_and_gradients(visible: VisibleTokens) -> list[Tensor]:
        out = call(variant, inputs, visible.to(device), backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    expected = values_and_gradients(right)
    try:
        got = values_and_gradients(wrong)
    except RuntimeError as error:
        assert backend == "cpu" and "frame_counts" in str(error)
        return
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
