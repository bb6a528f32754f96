"""Every op and backend against dense attention and plain loops over all tokens (``dense.py``), values and gradients.

Tolerance: a kernel's error against float64 may be twice the reference's error in the same dtype (three times for
gradients) plus a floor of a few roundings; the reference's own error is bounded in roundings of its dtype.
"""

from __future__ import annotations

import itertools

import dense
import pytest
import torch
from op_cases import (
    FORM,
    FORMS,
    RUNS,
    VARIANT,
    VARIANTS,
    VISIBLE_RUNS,
    Form,
    call,
    grads,
    grid,
    interpreted,
    run_at,
    seeded,
)
from torch import Tensor

import bt_kernels
from bt_kernels import VisibleTokens
from bt_kernels._cases import Inputs, Variant, variants
from bt_kernels._library import OPS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Errors of the reference in units of the dtype's eps times the largest value. Forward rounds the result and at most
# two sums on the way. Gradients sum over all rows, and alignment's is what a difference of two nearly equal vectors
# leaves over.
REFERENCE_ROUNDINGS = {"forward": 4.0, "gradient": 16.0}
PRODUCTS = ("linear_add", "mlp")  # forward sums over hundreds of columns too
FLOOR_ROUNDINGS = 2.0
SOME_FORMS = ("tube70", "padded", "empty_frame")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Deterministic mode fills torch.empty with NaN, so that an output nobody wrote cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


def prepared(inputs: Inputs, dtype: torch.dtype, device: str, variant: Variant) -> Inputs:
    out = {name: None if t is None else t.detach().to(device, dtype, copy=True) for name, t in inputs.items()}
    for name in variant.differentiable:
        out[name].requires_grad_()
    return out


def upstream_like(out: Tensor, seed: int = 9) -> Tensor:
    draw = torch.randn(out.shape, generator=seeded(seed), dtype=torch.float64)
    return draw.to(out.device, out.dtype)


def exact(variant: Variant, inputs: Inputs, visible: VisibleTokens, upstream: Tensor) -> dict[str, Tensor]:
    """Result ("") and gradients by the dense definition, in float64, from the values the op was given."""
    wide = {name: None if t is None else t.detach().cpu().double() for name, t in inputs.items()}
    for name in variant.differentiable:
        wide[name].requires_grad_()
    out = variant.call(getattr(dense, variant.function), wide, visible.to("cpu"))
    return {"": out.detach(), **grads(out, wide, variant.differentiable, upstream.detach().cpu().double())}


def measured(variant, inputs, visible, backend, upstream) -> dict[str, Tensor]:
    out = call(variant, inputs, visible, backend)
    return {
        "": out.detach(),
        **grads(out, inputs, variant.differentiable, upstream.to(out.device, out.dtype)),
    }


def check(variant: Variant, inputs: Inputs, visible: VisibleTokens, backend: str, upstream: Tensor) -> None:
    """Compare one backend with the dense definition under the tolerance rule."""
    expected = exact(variant, inputs, visible, upstream)
    got = measured(variant, inputs, visible, backend, upstream)
    plain = got if backend == "reference" else measured(variant, inputs, visible, "reference", upstream)
    dtype = got[""].dtype
    eps = torch.finfo(dtype).eps
    largest_gradient = max((t.abs().max().item() for name, t in expected.items() if name and t.numel()), default=0.0)
    for name, value in expected.items():
        kind = "gradient" if name else "forward"
        assert got[name].shape == value.shape, f"{name or 'result'} has shape {list(got[name].shape)}"
        assert got[name].dtype == dtype
        if not value.numel():
            continue
        # A gradient that is zero in exact arithmetic is rounding noise of the others'.
        size = value.abs().max().item() or largest_gradient
        error = (got[name].cpu().double() - value).abs().max().item()
        if backend == "reference":
            sums = "gradient" if variant.op in PRODUCTS else kind
            bound = REFERENCE_ROUNDINGS[sums] * eps * size
        else:
            reference_error = (plain[name].cpu().double() - value).abs().max().item()
            bound = (3 if name else 2) * reference_error + FLOOR_ROUNDINGS * eps * size
        assert error <= bound, (
            f"{kind} {name}: error {error:.3g} over {bound:.3g}, {error / (eps * size):.2g} roundings"
        )


def dense_kept(run: int, form: int, dtype: int) -> bool:
    """Every run meets every form in one dtype, by turns; in Triton's interpreter options meet every third form."""
    slow, options = run_at(run)
    return (run + form) % len(DTYPES) == dtype and not (slow and options and (run + form) % 3)


@grid("variant, backend, device, form, dtype", RUNS, FORMS, DTYPES, kept=dense_kept)
def test_equals_dense(variant, backend, device, form, dtype):
    visible = form.build()
    inputs = prepared(variant.draw(visible, form.heads, form.width), dtype, device, variant)
    upstream = upstream_like(exact_shape(variant, inputs, visible)).to(dtype)
    check(variant, inputs, visible.to(device), backend, upstream)


def exact_shape(variant: Variant, inputs: Inputs, visible: VisibleTokens) -> Tensor:
    """An empty tensor of the op's result shape, as the API promises it."""
    batch, rows = visible.batch, 1 + visible.tokens
    if not variant.takes_visible:  # of residual_norm the sum and the normalised rows, joined
        return torch.empty(batch, rows * (1 + (variant.op == "residual_norm")), inputs["x"].shape[-1])
    if variant.op == "alignment_loss":
        return torch.empty(())
    if variant.op == "temporal_attention":
        return torch.empty(batch, visible.tokens, *inputs["qkv"].shape[3:])
    if variant.op == "spatial_attention":
        return torch.empty(batch, rows, *inputs["qkv"].shape[3:])
    if variant.op == "pool_video_tokens":
        return torch.empty(batch, visible.patches + 1, inputs["branch"].shape[-1])
    return torch.empty(batch, rows, inputs["backbone"].shape[-1])


def every_other(t: Tensor) -> Tensor:
    return torch.stack([t, t.new_full(t.shape, torch.nan)], -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t: Tensor) -> Tensor:
    padding = t.new_full((t.shape[0], 1, *t.shape[2:]), torch.nan) if t.ndim > 1 else t.new_full((1,), torch.nan)
    return torch.cat([padding, t, padding], 1)[:, 1:-1] if t.ndim > 1 else torch.cat([padding, t, padding])[1:-1]


def broadcast(t: Tensor) -> Tensor:
    """The first video's values in every video, at stride 0; tables stay."""
    return t[:1].expand_as(t) if t.ndim > 2 else t


LAYOUTS = (every_other, transposed, sliced, broadcast)


def strides_kept(run: int, layout: int, form: int) -> bool:
    """In Triton's interpreter every op meets every layout in one form, by turns, without options."""
    slow, options = run_at(run)
    return not slow or (not options and (run + layout) % len(SOME_FORMS) == form)


@grid("variant, backend, device, layout, form", RUNS, LAYOUTS, SOME_FORMS, kept=strides_kept)
def test_any_strides(variant, backend, device, layout, form):
    visible = FORM[form].build()
    inputs = prepared(variant.draw(visible), torch.float32, device, variant)
    inputs = {name: None if t is None else layout(t) for name, t in inputs.items()}
    upstream = upstream_like(exact_shape(variant, inputs, visible))
    check(variant, inputs, visible.to(device), backend, layout(upstream) if upstream.ndim else upstream)


def one_form_kept(run: int, form: int) -> bool:
    """In Triton's interpreter every run meets one of three forms, by turns."""
    slow, _ = run_at(run)
    return not slow or run % 3 == form


@grid("variant, backend, device, form", RUNS, SOME_FORMS, kept=one_form_kept)
def test_expanded_gradient(variant, backend, device, form):
    visible = FORM[form].build()
    inputs = prepared(variant.draw(visible), torch.float32, device, variant)
    shape = exact_shape(variant, inputs, visible).shape
    check(variant, inputs, visible.to(device), backend, torch.tensor(0.5).expand(shape))


@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_large_logits_stay_finite(variant, backend, device):
    visible = FORM["padded"].build()
    drawn = {name: None if t is None else t * 100 for name, t in variant.draw(visible).items()}
    inputs = prepared(drawn, torch.float32, device, variant)
    out = call(variant, inputs, visible.to(device), backend)
    assert out.isfinite().all()
    if "attention" in variant.op:
        expected = exact(variant, inputs, visible, torch.ones_like(out))[""]
        # Logits near 1e4 carry an absolute rounding error of 1e-3, which softmax passes on to the weights.
        assert (out.detach().cpu() - expected).abs().max() <= 5e-3 * expected.abs().max()


@pytest.mark.parametrize("form", ["tube70", "padded"])
@pytest.mark.parametrize("variant, backend, device", RUNS)
def test_batch_of_none(variant, backend, device, form):
    visible = FORM[form].build()
    counts = None if visible.frame_counts is None else visible.frame_counts[:0]
    none = VisibleTokens(visible.index[:0], visible.patches, visible.frames, visible.slots, counts).to(device)
    inputs = prepared(variant.draw(none), torch.float32, device, variant)
    out = call(variant, inputs, none, backend)
    assert out.shape == exact_shape(variant, inputs, none).shape
    found = grads(out, inputs, variant.differentiable, torch.ones_like(out))
    for name, gradient in found.items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any(), name
    if not out.ndim:
        assert out.item() == 0


def poisoned_rows(inputs: Inputs, visible: VisibleTokens) -> Inputs:
    """NaN at the padded rows of every row-wise input."""
    out = dict(inputs)
    for name, first in (("qkv", inputs.get("qkv") is not None), ("branch", inputs.get("branch") is not None)):
        if first:
            offset = inputs[name].shape[1] - visible.tokens  # 1 where a CLS row comes first
            out[name] = inputs[name].clone()
            out[name][:, offset:][visible.index < 0] = torch.nan
    return out


def poisoned_tower(inputs: Inputs, visible: VisibleTokens, op: str) -> Inputs:
    """NaN at the tower's tokens the op has no business reading: invisible places and padding frames."""
    out = dict(inputs)
    for name in {"backbone", "target"} & set(inputs):
        tower = inputs[name].clone()
        used = torch.zeros(tower.shape[:3], dtype=torch.bool)
        for b in range(visible.batch):
            frames = dense.real_frames(visible, b)
            used[b, :frames, 0] = name == "backbone"  # alignment reads no CLS
            if op == "pool_video_tokens":
                used[b, :frames] = True
            for place in (visible.target_index if name == "target" else visible.index)[b].tolist():
                if place >= 0:
                    used[b, place % visible.frames, 1 + place // visible.frames] = True
        tower[~used] = torch.nan
        out[name] = tower
    return out


def padded_upstream(out_shape: torch.Size, visible: VisibleTokens) -> Tensor:
    """A gradient with NaN at the padded rows, whose results are constants."""
    upstream = upstream_like(torch.empty(out_shape))
    if upstream.ndim and upstream.shape[1] in (visible.tokens, 1 + visible.tokens):
        upstream[:, upstream.shape[1] - visible.tokens :][visible.index < 0] = torch.nan
    return upstream


@grid(
    "variant, backend, device, form", VISIBLE_RUNS, ["padded", "padded_to_nothing", "empty_frame"], kept=one_form_kept
)
def test_padding_is_never_read(variant, backend, device, form):
    visible = FORM[form].build()
    assert (visible.index < 0).any()
    clean = variant.draw(visible)
    poisoned = poisoned_tower(poisoned_rows(clean, visible), visible, variant.op)
    assert any(t is not None and t.isnan().any() for t in poisoned.values())
    on_device = visible.to(device)
    shape = exact_shape(variant, clean, visible).shape
    upstream = padded_upstream(shape, visible)
    got = measured(variant, prepared(poisoned, torch.float32, device, variant), on_device, backend, upstream)
    same = prepared(clean, torch.float32, device, variant)
    expected = measured(variant, same, on_device, backend, upstream.nan_to_num(0.0))
    for name, value in expected.items():
        assert got[name].isfinite().all(), f"NaN reached {name or 'the result'}"
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    padded = visible.index < 0
    row_wise = [name for name in ("qkv", "branch") if name in got]
    for name in row_wise + ([""] if upstream.ndim and variant.op != "pool_video_tokens" else []):
        rows = got[name].cpu()[:, got[name].shape[1] - visible.tokens :]
        assert not rows[padded].any(), f"padded rows of {name or 'the result'} are not zero"


@pytest.mark.parametrize("form", ["tube70", "random50", "reference_mask"])
@pytest.mark.parametrize("name", ["gather_embed", "gather_merge", "alignment_loss"])
def test_invisible_tokens_are_never_read(name, form):
    variant, visible = VARIANT[name], FORM[form].build()
    clean = variant.draw(visible)
    poisoned = poisoned_tower(clean, visible, name)
    upstream = upstream_like(exact_shape(variant, clean, visible))
    got = measured(variant, prepared(poisoned, torch.float32, "cpu", variant), visible, None, upstream)
    for key, value in exact(variant, prepared(clean, torch.float32, "cpu", variant), visible, upstream).items():
        torch.testing.assert_close(got[key].double(), value, rtol=1e-5, atol=1e-5)


# Finite differences need float64 kernels, which only the reference and the CPU have.
DOUBLE_RUNS = [run for run in RUNS if run.values[1] in ("reference", "cpu")]
GRADCHECK_FORMS = (Form("tube", FORM["one_patch"].build), FORM["padded"], FORM["empty_frame"])


def gradcheck_kept(run: int, form: int) -> bool:
    """Every op meets every form; with options one of them, by turns."""
    variant = DOUBLE_RUNS[run].values[0]
    return variant.name == variant.op or run % len(GRADCHECK_FORMS) == form


@grid("variant, backend, device, form", DOUBLE_RUNS, GRADCHECK_FORMS, kept=gradcheck_kept)
def test_gradcheck(variant, backend, device, form):
    visible = form.build()
    inputs = prepared(variant.draw(visible, 1, 3), torch.float64, device, variant)
    names = [name for name in inputs if name in variant.differentiable]
    constant = {name: t for name, t in inputs.items() if name not in names}

    def function(*tensors):
        return call(variant, {**dict(zip(names, tensors, strict=True)), **constant}, visible.to(device), backend)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names])


@pytest.mark.parametrize("name", [variant.name for variant in VARIANTS])
def test_only_needed_gradients(name):
    """Each input alone may need a gradient; it is then the same as when all do."""
    variant, visible = VARIANT[name], FORM["tube70"].build()
    drawn = variant.draw(visible)
    every = prepared(drawn, torch.float64, "cpu", variant)
    out = call(variant, every, visible, None)
    upstream = upstream_like(out)
    expected = grads(out, every, variant.differentiable, upstream)
    for wanted in variant.differentiable:
        alone = {key: None if t is None else t.clone() for key, t in drawn.items()}
        alone[wanted].requires_grad_()
        out = call(variant, alone, visible, None)
        found = grads(out, alone, (wanted,), upstream)[wanted]
        torch.testing.assert_close(found, expected[wanted], rtol=0, atol=1e-12)
    constant = call(variant, drawn, visible, None)
    assert not constant.requires_grad


@pytest.mark.parametrize("name", ["alignment_loss", "alignment_loss-biased"])
def test_the_frozen_side_of_alignment_gets_no_gradient(name):
    variant, visible = VARIANT[name], FORM["tube70"].build()
    inputs = {key: None if t is None else t.requires_grad_() for key, t in variant.draw(visible).items()}
    call(variant, inputs, visible, None).backward()
    for key, tensor in inputs.items():
        if tensor is not None:
            assert (tensor.grad is not None and tensor.grad.any()) == (key in variant.differentiable), key


def test_frame_weight_gets_no_gradient():
    variant, visible = VARIANT["spatial_attention-weighted"], FORM["tube70"].build()
    inputs = {key: t.requires_grad_() for key, t in variant.draw(visible).items()}
    call(variant, inputs, visible, None).sum().backward()
    assert inputs["frame_weight"].grad is None and inputs["qkv"].grad is not None


@pytest.mark.parametrize("form", ["random50", "padded"])
def test_ragged_attention_is_attention_over_all_tokens_under_a_mask(form):
    """Ragged attention equals attention of all P·T tokens where invisible ones are masked, gathered at the rows."""
    visible = FORM[form].build()
    places = visible.patches * visible.frames
    everything = VisibleTokens.all(1, visible.patches, visible.frames)
    q, k, v = torch.randn(3, places, 2, 4, dtype=torch.float64, generator=seeded(0)).unbind(0)
    for b in range(visible.batch):
        shown = [place for place in visible.index[b].tolist() if place >= 0]
        patch = everything.index[0] // visible.frames
        seen = torch.zeros(places, dtype=torch.bool)
        seen[shown] = True
        mask = (patch[:, None] == patch) & seen
        expected = dense.masked_attention(q, k, v, mask)[shown]
        rows = torch.zeros(1, visible.tokens, 3, 2, 4, dtype=torch.float64)
        rows[0, : len(shown)] = torch.stack([q, k, v], 1)[shown]
        one = VisibleTokens(visible.index[b : b + 1], visible.patches, visible.frames)
        got = bt_kernels.temporal_attention(rows, one)[0, : len(shown)]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_full_visibility_reads_alike_as_grid_and_ragged():
    grid = VisibleTokens.all(2, 5, 4)
    ragged = VisibleTokens(grid.index, 5, 4)
    counted = VisibleTokens(grid.index, 5, 4, frame_counts=torch.tensor([4, 4]))
    for variant in VARIANTS:
        inputs = variant.draw(grid)
        expected = call(variant, inputs, grid, None)
        for same in (ragged, counted):
            torch.testing.assert_close(call(variant, inputs, same, None), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant, backend, device", VISIBLE_RUNS)
def test_padding_a_batch_changes_no_video(variant, backend, device):
    """A short video in a padded batch gives what it gives alone, at its own length."""
    if variant.op == "alignment_loss":
        pytest.skip("the loss is one number for the batch")
    frames, counts = 4, [2, 4]
    padded = VisibleTokens.random(2, 5, frames, 0.4, seeded(5), frame_counts=torch.tensor(counts))
    inputs = prepared(variant.draw(padded), torch.float64, device, variant)
    together = call(variant, inputs, padded.to(device), backend).detach().cpu()
    for b, count in enumerate(counts):
        shown = [(place // frames, place % frames) for place in padded.index[b].tolist() if place >= 0]
        alone = VisibleTokens(torch.tensor([[p * count + t for p, t in shown]]), 5, count).to(device)
        cut = {}
        for name, tensor in inputs.items():
            if tensor is None or name in ("cls_token", "pos", "time", "gate"):
                cut[name] = tensor
            elif name in ("backbone", "frame_weight"):
                cut[name] = tensor[b : b + 1, :count]
            else:
                cut[name] = tensor[b : b + 1, : tensor.shape[1] - padded.tokens + len(shown)]
        if variant.name == "spatial_attention-weighted":
            inputs["frame_weight"][b, count:] = 0
            together = call(variant, inputs, padded.to(device), backend).detach().cpu()
        single = call(variant, cut, alone, backend).detach().cpu()[0]
        torch.testing.assert_close(together[b][: len(single)], single, rtol=0, atol=1e-12)


def test_pooling_a_long_video():
    """The tower's mean runs over all its frames, also where the branch saw averaged pairs of them."""
    visible = VisibleTokens.all(2, 3, 4)
    backbone = torch.randn(2, 8, 4, 5, dtype=torch.float64, generator=seeded(0), requires_grad=True)
    branch = torch.randn(2, 13, 5, dtype=torch.float64, generator=seeded(1), requires_grad=True)
    inputs = {"backbone": backbone, "branch": branch}
    variant = VARIANT["pool_video_tokens"]
    upstream = upstream_like(torch.empty(2, 4, 5)).double()
    check(variant, inputs, visible, "reference", upstream)


@pytest.mark.parametrize("variant, backend, device", [run for run in RUNS if run.values[0].op == "temporal_attention"])
def test_more_sequences_than_a_launch_grid(variant, backend, device):
    """70,000 patches are more than the 65,535 blocks at which other libraries' attention fails."""
    if interpreted(backend, device):
        pytest.skip("Triton's interpreter has no launch grid, and would take a minute")
    visible = VisibleTokens.all(1, 70_000, 1, device=device)
    qkv = torch.randn(1, 70_000, 3, 1, 2, generator=seeded(0)).to(device).requires_grad_()
    out = call(variant, {"qkv": qkv}, visible, backend)
    torch.testing.assert_close(out, qkv[:, :, 2], rtol=0, atol=1e-6)  # a sequence of one attends to itself
    out.sum().backward()
    assert torch.equal(qkv.grad[:, :, 2], torch.ones_like(out))


def test_every_op_is_here():
    part = "mlp_hidden_grad"  # of mlp's backward
    assert {variant.op for variant in variants()} | {part} == set(OPS)
    assert {variant.function for variant in variants()} < set(bt_kernels.__all__)


def test_every_pair_is_compared_with_each_commit():
    """Of op with its options, backend, form and dtype; the whole grid is marked ``full``."""
    axes = ("variant", "backend", "form", "dtype")
    met = set()
    for run, form, dtype in itertools.product(range(len(RUNS)), range(len(FORMS)), range(len(DTYPES))):
        if dense_kept(run, form, dtype):
            variant, backend, _ = RUNS[run].values
            case = dict(zip(axes, (variant.name, backend, FORMS[form].name, DTYPES[dtype]), strict=True))
            met |= set(itertools.combinations(case.items(), 2))
    runs = {(("variant", run.values[0].name), ("backend", run.values[1])) for run in RUNS}
    values = {"backend": {backend for _, (_, backend) in runs}, "variant": {variant for (_, variant), _ in runs}}
    values |= {"form": {form.name for form in FORMS}, "dtype": set(DTYPES)}
    for one, other in itertools.combinations(axes, 2):
        pairs = {((one, a), (other, b)) for a in values[one] for b in values[other]}
        assert (runs if (one, other) == axes[:2] else pairs) <= met, (one, other)
