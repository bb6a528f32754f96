"""The branch's fused layers (``bt_adapter.model.fused``) against the plain ones: results, gradients, bytes kept."""

from __future__ import annotations

import pytest
import torch
from small_models import EVA, PATCHES, SIZES, make, shake, video

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.model.fused import layer
from bt_adapter.towers import rows
from bt_kernels import VisibleTokens, backend

POLICIES = ("none", "mlp", "layer")
policies = pytest.mark.parametrize("recompute", POLICIES)


@pytest.fixture(params=["torch", "kernels", "products"])
def row_ops(request, monkeypatch):
    """Sums, LayerNorms and activations by torch's operators, as on a CPU, or by the row ops, as on a GPU.

    "products" are those of bt_kernels, which add or activate themselves.
    """
    if request.param != "torch":
        monkeypatch.setattr(rows, "has_kernels", lambda x: True)
    if request.param == "products":
        monkeypatch.setattr(layer, "find_kernels", lambda x, products: rows.find_kernels(x, "bt_kernels"))


def with_config(model: BTAdapterVisionModel, **changes) -> BTAdapterVisionModel:
    """The same weights in another configuration."""
    other = make(model.vision_config, **{**model.config.to_dict(), **changes})
    other.load_state_dict(model.state_dict())
    return other.to(model.tower.dtype)


def visible_tokens(form: str, frames: int = 4) -> VisibleTokens:
    if form == "tube":
        return VisibleTokens.tube(2, PATCHES, frames, 0.5, generator=torch.Generator().manual_seed(0))
    if form == "padded":
        return VisibleTokens.random(2, PATCHES, frames, 0.5, frame_counts=torch.tensor([frames, frames // 2]))
    return VisibleTokens.all(2, PATCHES, frames)


def draws(model: BTAdapterVisionModel, visible: VisibleTokens) -> list[torch.Tensor]:
    """Every rate but the first layer's is above 0: some kept, some dropped."""
    generator = torch.Generator().manual_seed(7)
    counts = [visible.sequences, visible.steps] * (model.config.depth - 1)
    return [torch.randint(0, 2, (2 * count,), generator=generator).float() for count in counts]


def step(model, visible, recorded=None, frames=4, dtype=torch.float64, temperature=0.01):
    """Losses and gradients of a pretraining step."""
    text = torch.randn(2, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    model.zero_grad()
    output = model(video(frames).to(dtype), visible, recorded)
    losses = model.pretraining_losses(output, text, temperature=temperature)
    sum(losses.values()).backward()
    return output, losses, {name: p.grad for name, p in model.branch.named_parameters()}


def check_same(actual, expected, tolerance):
    for mine, plain in zip(actual[0].branch_tokens, expected[0].branch_tokens, strict=True):
        torch.testing.assert_close(mine, plain, rtol=tolerance, atol=tolerance)
    assert actual[2].keys() == expected[2].keys()
    for name, plain in expected[2].items():
        largest = plain.abs().max().item()
        error = (actual[2][name] - plain).abs().max().item()
        assert error <= tolerance * max(largest, 1e-3), f"{name}: {error:.1e} of {largest:.1e}"


@pytest.mark.parametrize("drop", [False, True], ids=["", "drop"])
@pytest.mark.parametrize("form", ["tube", "all", "padded"])
@pytest.mark.parametrize("config", [SIZES, EVA], ids=["clip", "eva"])
@policies
def test_equals_the_plain_layers(config, form, drop, recompute, row_ops):
    model = shake(make(config, depth=3, drop_path=0.4)).double()
    visible = visible_tokens(form)
    recorded = draws(model, visible) if drop else None
    expected = step(with_config(model, fused=False), visible, recorded)
    actual = step(with_config(model, recompute=recompute), visible, recorded)
    check_same(actual, expected, 1e-9)


@pytest.mark.parametrize("change", [{"merge_gate_slope": None}, {"drop_block": True}], ids=["no gate", "drop block"])
def test_equals_the_plain_layers_in_other_configurations(change):
    model = shake(make(EVA, depth=3, drop_path=0.4, **change)).double().train()
    expected, actual = with_config(model, fused=False).train(), with_config(model, recompute="layer").train()
    visible = visible_tokens("tube")
    results = []
    for each in (actual, expected):
        torch.manual_seed(0)
        results.append(step(each, visible))
    check_same(*results, 1e-9)


@pytest.mark.parametrize("frames", [1, 8])
def test_one_product_of_out_and_fc_pays_from_the_width_on(frames):
    """2 videos of 16 patches: 32 rows of width 32 at one frame already, 16 at half of them."""
    model = shake(make(depth=2)).double()
    for visible in (visible_tokens("all", frames), visible_tokens("tube", frames)):
        expected = step(with_config(model, fused=False), visible, frames=frames)
        check_same(step(model, visible, frames=frames), expected, 1e-9)


# At the temperature of training the gradients of a loss near 0 multiply every rounding of the embeddings.
ROUNDED = {"dtype": torch.float32, "temperature": 0.2}


@policies
def test_under_autocast(recompute, row_ops):
    model = shake(make(depth=3))
    visible = visible_tokens("tube")
    exact = step(with_config(model, fused=False), visible, **ROUNDED)[2]
    errors = []
    for change in ({"fused": False}, {"recompute": recompute}):
        with torch.autocast("cpu", torch.bfloat16):
            output, losses, gradients = step(with_config(model, **change), visible, **ROUNDED)
        assert output.branch_tokens.dtype == torch.float32
        assert all(loss.dtype == torch.float32 for loss in losses.values())
        assert all(g.dtype == torch.float32 for g in gradients.values())
        errors.append(sum(float((gradients[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact))
    plain, fused = errors
    assert 0 < fused <= 1.5 * plain


@policies
def test_stochastic_depth_under_autocast(recompute, row_ops):
    model = shake(make(depth=3, drop_path=0.5)).train()
    visible = visible_tokens("tube")

    def gradients(dtype=torch.bfloat16, **change):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return step(with_config(model, **change), visible, **ROUNDED)[2]

    exact = gradients(torch.float32, fused=False)
    errors = []
    for change in ({"fused": False}, {"recompute": recompute}):
        found = gradients(**change)
        errors.append(sum(float((found[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact))
    plain, fused = errors
    assert 0 < fused <= 1.5 * plain


@policies
def test_weights_in_bfloat16(recompute):
    model = shake(make(depth=2, recompute=recompute)).bfloat16()
    _, _, gradients = step(model, visible_tokens("tube"), dtype=torch.bfloat16)
    assert all(g.dtype == torch.bfloat16 and torch.isfinite(g).all() for g in gradients.values())


@policies
def test_frozen_parts_get_no_gradient(recompute):
    model = shake(make(depth=2, recompute=recompute))
    frozen = [p for name, p in model.branch.named_parameters() if "attention" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    output = model(video(), visible_tokens("tube"))
    output.branch_tokens.sum().backward()
    assert all(p.grad is None for p in frozen)
    assert model.branch.spatial[0].fc1.weight.grad is not None


def saved_bytes(model, visible, frames) -> int:
    """Bytes kept for backward by the branch alone: unique storages, parameters excluded."""
    branch = model.branch
    own = {p.untyped_storage().data_ptr() for p in branch.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    config = model.vision_config
    states = torch.randn(1, frames, 1 + config.patches, config.hidden_size)
    position = torch.randn(1 + config.patches, config.hidden_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        z = branch.embed(states, position, visible)
        for layer in range(model.config.depth):
            if layer:
                z = branch.merge(states, z, visible)
            z = branch.run_layer(layer, z, visible, None)
    return sum(kept.values())


VIT_L = {**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4,
         "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}  # fmt: skip
REFERENCE = 305_034_332  # bytes the published code keeps: ViT-L/14, depth 4, 8 frames, tube masks of 0.7, one clip


@pytest.fixture(scope="module")
def large() -> BTAdapterVisionModel:
    model = BTAdapterVisionModel(VIT_L, BTAdapterConfig(), stored_features=False)
    model.tower.layers = None  # the branch alone
    return model


@pytest.mark.parametrize(("recompute", "limit"), [("none", 0.55), ("mlp", 0.45), ("layer", 25e6 / REFERENCE)])
def test_bytes_kept(large, recompute, limit):
    large.recompute = recompute
    kept = saved_bytes(large, VisibleTokens.tube(1, 256, 8, 0.7), 8)
    assert kept <= limit * REFERENCE


@pytest.mark.parametrize(("recompute", "limit"), [("none", 0.50), ("mlp", 0.36), ("layer", 0.065)])
def test_bytes_kept_of_all_tokens_of_sixteen_frames(large, recompute, limit):
    large.recompute = recompute
    assert saved_bytes(large, VisibleTokens.all(1, 256, 16), 16) <= limit * 2_218_966_880


@policies
def test_compiles_whole(recompute):
    """One layer under ``torch.compile``, without a graph break, forward and backward."""
    model = shake(make(depth=2, recompute=recompute)).double()
    visible = visible_tokens("tube")
    z = torch.randn(2, 1 + visible.index.shape[1], 32, dtype=torch.float64)

    def run(z):
        return model.branch.run_layer(1, z, visible, None)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        leaf = z.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append([out, leaf.grad, *[p.grad for p in model.branch.spatial[1].parameters()]])
    torch.compiler.reset()
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-9)


def test_products_of_bt_kernels_are_refused_where_only_torch_runs():
    model = make(depth=2, products="bt_kernels")
    with pytest.raises(ValueError, match="products='bt_kernels' needs a GPU.* are on cpu"):
        model(video(4), visible_tokens("tube"))
    with pytest.raises(ValueError, match="products must be 'torch' or 'bt_kernels', but is 'cublas'"):
        BTAdapterConfig(products="cublas")
    with pytest.raises(ValueError, match="products must be 'torch' if fused is False"):
        BTAdapterConfig(products="bt_kernels", fused=False)
    assert "products" not in model.config.to_dict()


def test_row_ops_leave_out_backends_that_they_have_no_kernels_for():
    assert rows.has_kernels(torch.empty(1, device="meta")) and not rows.has_kernels(torch.empty(1))
    for name, expected in (("triton", True), ("reference", True), ("cpu", False), ("cuda", False)):
        with backend(name):
            assert rows.has_kernels(torch.empty(1, device="meta")) is expected, name
