"""Modules of bt_kernels.nn: results and gradients against dense attention, and what users of torch modules expect."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import dense
import pytest
import torch
import torch.nn.functional as F
from op_cases import FORM, FORMS, seeded
from torch import Tensor, nn

from bt_kernels import VisibleTokens
from bt_kernels.nn import DividedSpaceTimeBlock, SpatialAttention, TemporalAttention
from bt_kernels.nn.stochastic_depth import draw_scale, frame_weight_and_row_scale

DIM, HEADS = 12, 3
ATTENTIONS = {"temporal": TemporalAttention, "spatial": SpatialAttention}
BY_ATTENTION = pytest.mark.parametrize("kind", ATTENTIONS)
BY_FORM = pytest.mark.parametrize("form", [form.name for form in FORMS])
MODULES = {**ATTENTIONS, "block": DividedSpaceTimeBlock}
BY_MODULE = pytest.mark.parametrize("kind", MODULES)


def scattered(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` with every parameter drawn, so that no bias or zero start hides an error."""
    generator = seeded(seed)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return module


def build(kind: str, **settings) -> nn.Module:
    return scattered(MODULES[kind](DIM, HEADS, **settings))


def tokens_for(kind: str, visible: VisibleTokens, dtype: torch.dtype = torch.float64) -> Tensor:
    rows = visible.tokens + (kind != "temporal")
    return torch.randn(visible.batch, rows, DIM, generator=seeded(1), dtype=torch.float64).to(dtype)


def dense_attention(module: nn.Module, kind: str, tokens: Tensor, visible: VisibleTokens) -> Tensor:
    """The module by dense matrices: its projections around tests/dense.py."""
    qkv = F.linear(tokens, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, HEADS, -1))
    attend = dense.temporal_attention if kind == "temporal" else dense.spatial_attention
    return F.linear(attend(qkv, visible).flatten(2), module.out.weight, module.out.bias)


def assert_same_with_gradients(module: nn.Module, tokens: Tensor, first, second, tolerance: float = 1e-11) -> None:
    """``first(tokens)`` and ``second(tokens)`` agree, and so do their gradients in tokens and parameters."""
    leaves = [tokens.requires_grad_(), *module.parameters()]
    results = []
    for function in (first, second):
        out = function(tokens)
        weights = torch.randn(out.shape, generator=seeded(2), dtype=torch.float64).to(out.dtype)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@BY_FORM
@BY_ATTENTION
def test_attention_is_dense_attention(kind, form):
    visible = FORM[form].build()
    module = build(kind, dtype=torch.float64)
    assert_same_with_gradients(
        module,
        tokens_for(kind, visible),
        lambda x: module(x, visible),
        lambda x: dense_attention(module, kind, x, visible),
    )


@BY_MODULE
def test_frames_stand_for_all_tokens(kind):
    visible = VisibleTokens.all(2, 5, 4)
    module, tokens = build(kind), tokens_for(kind, visible, torch.float32)
    assert torch.equal(module(tokens, frames=4), module(tokens, visible))


@BY_ATTENTION
def test_equivalent_lines_of_the_docstring(kind):
    B, K, S, D, H, E = 2, 5, 4, DIM, HEADS, DIM // HEADS  # noqa: F841
    module = build(kind, dtype=torch.float64)
    tokens = tokens_for(kind, VisibleTokens.all(B, K, S))
    lines = ATTENTIONS[kind].__doc__.split("::\n\n", 1)[1].split("\n\n", 1)[0]
    names = {**locals(), "self": module, "rows": tokens, "torch": torch, "F": F}
    exec("\n".join(line.strip() for line in lines.splitlines()), names)
    torch.testing.assert_close(module(tokens, frames=S), names["out"], rtol=1e-11, atol=1e-11)


@BY_FORM
def test_block_is_its_parts(form):
    """The block's lines over dense attention, gradients included."""
    visible = FORM[form].build()
    block = build("block", dtype=torch.float64, activation="quick_gelu")

    def by_hand(tokens: Tensor) -> Tensor:
        cls, rows = tokens[:, :1], tokens[:, 1:]
        update = dense_attention(block.temporal_attention, "temporal", block.temporal_norm(rows), visible)
        tokens = torch.cat([cls, rows + block.temporal_fc(update)], 1)
        tokens = tokens + dense_attention(block.spatial_attention, "spatial", block.spatial_norm(tokens), visible)
        hidden = block.mlp.fc1(block.mlp_norm(tokens))
        return tokens + block.mlp.fc2(hidden * torch.sigmoid(1.702 * hidden))

    tokens = tokens_for("block", visible)
    assert_same_with_gradients(block, tokens, lambda x: block(x, visible), by_hand)


@pytest.mark.parametrize("form", ["tube70", "padded", "windows"])
def test_spatial_scale_is_the_scaled_result_of_each_frame(form):
    """The frames' results computed one by one, by showing the module one frame's scale at a time."""
    visible = FORM[form].build()
    module = build("spatial", dtype=torch.float64)
    tokens = tokens_for("spatial", visible)
    scale = draw_scale(0.5, visible.batch, visible.steps, tokens)
    scale[0] = 0  # a video whose every frame is dropped
    got = module(tokens, visible, scale=scale)

    one_by_one = []
    for step in range(visible.steps):
        alone = torch.zeros_like(scale)
        alone[:, step] = 1
        frame_weight, row_scale = frame_weight_and_row_scale(alone, visible)
        one_by_one.append(module(tokens, visible, scale=alone))
        weight = visible.step_weights(scale)[:, step]
        torch.testing.assert_close(row_scale[:, 0, 0], weight)
        assert torch.allclose(frame_weight.sum(1), (weight > 0).double())
    expected = sum(scale[:, step, None, None] * out for step, out in enumerate(one_by_one))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    assert not got[0].any()


def test_spatial_scale_of_ones_changes_nothing():
    visible = FORM["random50"].build()
    module, tokens = build("spatial", dtype=torch.float64), tokens_for("spatial", visible)
    ones = torch.ones(visible.batch, visible.steps, dtype=torch.float64)
    torch.testing.assert_close(module(tokens, visible, scale=ones), module(tokens, visible), rtol=1e-12, atol=1e-12)


def test_temporal_scale():
    visible = FORM["tube70"].build()
    module, tokens = build("temporal", dtype=torch.float64), tokens_for("temporal", visible)
    scale = torch.rand(visible.batch, visible.sequences, generator=seeded(5), dtype=torch.float64)
    expected = module(tokens, visible) * scale.repeat_interleave(visible.slots, 1)[:, :, None]
    torch.testing.assert_close(module(tokens, visible, scale=scale), expected)


def test_drop_path_keeps_the_mean():
    """Over many draws the spatial residual has the mean of evaluation, which draws nothing."""
    visible = VisibleTokens.all(1, 5, 4)
    block = build("block", drop_path=0.4, dtype=torch.float64)
    tokens = tokens_for("block", visible)
    expected = block.eval()(tokens, visible)
    assert torch.equal(expected, build("block", dtype=torch.float64)(tokens, visible))
    for part in ("temporal_fc", "mlp.fc2"):  # what is left is linear in its draws
        for parameter in block.get_submodule(part).parameters():
            parameter.data.zero_()
    expected = block.eval()(tokens, visible)
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = block.train()(tokens.expand(4000, -1, -1), frames=4)
    assert (drawn.mean(0, keepdim=True) - expected).abs().max() < 0.06 * (expected - tokens).abs().max()
    dropped = (drawn[:, 1:5] == tokens[:, 1:5]).all(2)  # the four frames of patch 0
    assert ((dropped.double().mean(0) - 0.4).abs() < 0.03).all()


@BY_MODULE
def test_state_dict_names(kind):
    attention = ["qkv.weight", "qkv.bias", "out.weight", "out.bias"]
    if kind != "block":
        assert list(build(kind).state_dict()) == attention
        assert list(build(kind, qkv_bias=False, out_bias=False).state_dict()) == ["qkv.weight", "out.weight"]
        return
    expected = {f"{part}_attention.{name}" for part in ("temporal", "spatial") for name in attention}
    expected |= {
        f"{layer}.{name}"
        for layer in ("temporal_norm", "temporal_fc", "spatial_norm", "mlp_norm", "mlp.fc1", "mlp.fc2")
        for name in ("weight", "bias")
    }
    assert set(build(kind).state_dict()) == expected
    without = build(kind, temporal_fc=False).state_dict()
    assert set(without) == {name for name in expected if not name.startswith("temporal_fc")}


def test_fresh_block_is_the_identity_in_time():
    """Frames that hold the same tokens stay the same, and each is what the spatial half alone makes of it."""
    block = DividedSpaceTimeBlock(DIM, HEADS).double()
    still = torch.randn(2, 1 + 5, DIM, generator=seeded(0), dtype=torch.float64)
    video = torch.cat([still[:, :1], still[:, 1:].repeat_interleave(4, 1)], 1)
    torch.testing.assert_close(block(video, frames=4)[:, 1::4], block(still, frames=1)[:, 1:])


@BY_MODULE
def test_copies_and_pickles(kind):
    visible = FORM["tube70"].build()
    module, tokens = build(kind), tokens_for(kind, visible, torch.float32)
    expected = module(tokens, visible)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(tokens, visible), expected)
    fresh = MODULES[kind](DIM, HEADS)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(tokens, visible), expected)


@BY_MODULE
def test_on_meta_then_drawn(kind):
    """Made without memory, given some, drawn: the same as made at once."""
    with torch.device("meta"):
        module = MODULES[kind](DIM, HEADS)
    assert all(p.is_meta for p in MODULES[kind](DIM, HEADS, device="meta").parameters())
    assert module(tokens_for(kind, FORM["tube70"].build()).float().to("meta"), frames=4).device.type == "meta"
    module = module.to_empty(device="cpu")
    for parameter in module.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    module.reset_parameters()
    expected = MODULES[kind](DIM, HEADS)
    torch.manual_seed(0)
    expected.reset_parameters()
    for name, parameter in module.state_dict().items():
        assert torch.equal(parameter, expected.state_dict()[name]), name
        assert parameter.isfinite().all() and parameter.std() < 0.03, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@BY_MODULE
def test_half_precisions(kind, dtype):
    visible = FORM["tube70"].build()
    module, tokens = build(kind).double(), tokens_for(kind, visible)
    expected = module(tokens, visible)
    got = module.to(dtype)(tokens.to(dtype), visible)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0.1, atol=0.06 * expected.abs().max().item())


@BY_MODULE
def test_autocast(kind):
    visible = FORM["tube70"].build()
    settings = {"drop_path": 0.3} if kind == "block" else {}
    module, tokens = build(kind, **settings).eval(), tokens_for(kind, visible, torch.float32).requires_grad_()
    expected = module(tokens, visible)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(tokens, visible)
        trained = module.train()(tokens, visible)
    torch.testing.assert_close(got.float(), expected, rtol=0.1, atol=0.06 * expected.abs().max().item())
    (got.float().sum() + trained.float().sum()).backward()
    assert tokens.grad.isfinite().all() and all(p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("how", ["visible", "frames", "ragged", "training"])
@BY_MODULE
def test_compiles_whole(kind, how):
    visible = FORM["padded" if how == "ragged" else "all"].build()
    settings = {"drop_path": 0.3} if kind == "block" and how == "training" else {}
    module, tokens = build(kind, **settings).train(), tokens_for(kind, visible, torch.float32).requires_grad_()
    keywords = {"frames": 4} if how in ("frames", "training") else {"visible": visible}
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for run in (module, compiled):
        torch.manual_seed(3)
        out = run(tokens, **keywords)
        results.append((out, *torch.autograd.grad(out.square().sum(), [tokens, *module.parameters()])))
    if not settings:  # a compiled draw need not be an eager one
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_gradient_checkpointing_draws_again():
    from torch.utils.checkpoint import checkpoint

    block = build("block", drop_path=0.5).train()
    tokens = tokens_for("block", FORM["all"].build(), torch.float32).requires_grad_()
    grads = []
    for run in (block, lambda *a, **k: checkpoint(block, *a, use_reentrant=False, **k)):
        torch.manual_seed(7)
        grads.append(torch.autograd.grad(run(tokens, frames=4).square().sum(), tokens)[0])
    torch.testing.assert_close(*grads)


def test_empty_batch():
    for kind in MODULES:
        tokens = torch.zeros(0, 20 + (kind != "temporal"), DIM, requires_grad=True)
        out = build(kind)(tokens, frames=4)
        assert out.shape == tokens.shape
        out.sum().backward()


def test_repr_says_the_sizes():
    assert "dim=12, heads=3" in repr(build("temporal"))
    text = repr(build("block", drop_path=0.1, activation="quick_gelu"))
    assert "dim=12, drop_path=0.1" in text and "quick_gelu" in text


@pytest.mark.parametrize(
    "build, error, words",
    [
        (lambda: TemporalAttention(12, 5), ValueError, ("heads", "12", "5")),
        (lambda: SpatialAttention(0, 1), ValueError, ("dim", "0")),
        (lambda: SpatialAttention(12.0, 1), TypeError, ("dim", "float")),
        (lambda: DividedSpaceTimeBlock(12, True), TypeError, ("heads", "bool")),
        (lambda: DividedSpaceTimeBlock(12, 3, drop_path=1.0), ValueError, ("drop_path", "[0, 1)", "1.0")),
        (lambda: DividedSpaceTimeBlock(12, 3, activation="swish"), ValueError, ("activation", "swish", "silu")),
        (lambda: DividedSpaceTimeBlock(12, 3, activation=3), TypeError, ("activation", "int")),
        (lambda: DividedSpaceTimeBlock(12, 3, mlp_ratio=0.01), ValueError, ("mlp_ratio", "0.01")),
    ],
)
def test_bad_settings(build, error, words):
    with pytest.raises(error) as raised:
        build()
    assert all(word in str(raised.value) for word in words), str(raised.value)


def _bad_calls(name: str, cls: int) -> list:
    rows = 20 + cls
    good = torch.zeros(2, rows, DIM)
    visible = VisibleTokens.all(2, 5, 4)
    return [
        ((good.tolist(),), {"frames": 4}, TypeError, (name, "list")),
        ((good[0],), {"frames": 4}, ValueError, (name, "3 dimensions", f"[{rows}, 12]")),
        ((good[..., :8],), {"frames": 4}, ValueError, (name, "12", f"[2, {rows}, 8]")),
        ((good.long(),), {"frames": 4}, TypeError, (name, "int64")),
        ((good.half(),), {"frames": 4}, TypeError, (name, "float16", "float32", "weight")),
        ((good,), {}, ValueError, ("visible", "frames")),
        ((good, visible), {"frames": 4}, ValueError, ("visible", "frames=4")),
        ((good,), {"frames": 3}, ValueError, (name, "frames=3", "20 rows")),
        ((good,), {"frames": 0}, ValueError, (name, "frames=0")),
        ((good,), {"frames": 4.0}, TypeError, ("frames", "float")),
        ((good[:, :cls],), {"frames": 4}, ValueError, (name, "0 rows")),
        ((good, VisibleTokens.all(2, 4, 4)), {}, ValueError, (name, f"[2, {rows}, 12]", str(16 + cls))),
        ((good, VisibleTokens.all(3, 5, 4)), {}, ValueError, ("visible", "3 videos", name)),
        ((good, "all"), {}, TypeError, ("visible", "str")),
    ]


@BY_MODULE
def test_bad_calls(kind):
    name, module = ("rows" if kind == "temporal" else "tokens"), build(kind)
    for args, keywords, error, words in _bad_calls(name, int(kind != "temporal")):
        with pytest.raises(error) as raised:
            module(*args, **keywords)
        assert all(word in str(raised.value) for word in words), str(raised.value)


@BY_ATTENTION
def test_bad_scale(kind):
    visible = VisibleTokens.all(2, 5, 4)
    module, tokens = build(kind), tokens_for(kind, visible, torch.float32)
    with pytest.raises(ValueError, match=r"scale.*\[2, 3\]"):
        module(tokens, visible, scale=torch.ones(2, 3))
    with pytest.raises(TypeError, match="scale.*int64"):
        module(tokens, visible, scale=torch.ones(2, 5 if kind == "temporal" else 4, dtype=torch.int64))


def test_import_needs_torch_alone():
    """``bt_kernels`` does not load the modules, and the modules load no other package."""
    code = (
        "import sys, bt_kernels; assert 'bt_kernels.nn' not in sys.modules; import bt_kernels.nn; "
        "assert not {'transformers', 'diffusers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
