"""Whatever replaces or wraps a module of the branch or of its own tower is heeded, though fused layers read weights."""

from __future__ import annotations

import copy

import pytest
import torch
from small_models import EVA, SIZES, make, shake, video
from torch import nn
from torch.nn.utils import parametrize

from bt_adapter import BTAdapterVisionModel
from bt_adapter.model.fused import layer as fused_layer
from bt_kernels import VisibleTokens
from bt_kernels.plain import is_plain, why_not_all_plain, why_not_plain

configs = pytest.mark.parametrize("config", [SIZES, EVA], ids=["clip", "eva"])


def double_model(config=SIZES, **fields) -> BTAdapterVisionModel:
    return shake(make(config, depth=3, drop_path=0.4, **fields)).double()


def pixels() -> torch.Tensor:
    return video().double()


def twice(module, args, output):
    return 2 * output


def doubled(layer: nn.Module) -> None:
    """Make a layer's own weights give twice its output."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(2)


LEAVES = (
    "branch.temporal.1.norm", "branch.temporal.1.fc", "branch.temporal.1.attention.out_proj", "branch.spatial.1.norm1",
    "branch.spatial.1.attention.out_proj", "branch.spatial.1.norm2", "branch.spatial.1.fc1", "branch.spatial.2.fc2",
    "tower.layers.1.norm1", "tower.layers.2.attention.out_proj", "tower.layers.3.fc1", "tower.final_norm",
    "tower.projection", "tower.patch_embedding",
)  # fmt: skip


@pytest.mark.parametrize("drawn", [False, True], ids=["", "drop"])
@configs
@pytest.mark.parametrize("name", LEAVES)
def test_a_hook_on_a_layer_acts_as_the_same_change_of_its_weights(name, config, drawn):
    hooked, changed = double_model(config), double_model(config)
    recorded = None
    if drawn:
        generator = torch.Generator().manual_seed(1)
        counts = (2 * 16, 2 * 4) * 2
        recorded = [torch.randint(0, 2, (count,), generator=generator).double() for count in counts]
    before = hooked(pixels(), None, recorded).video_embeds
    handle = hooked.get_submodule(name).register_forward_hook(twice)
    doubled(changed.get_submodule(name))
    found, expected = hooked(pixels(), None, recorded).video_embeds, changed(pixels(), None, recorded).video_embeds
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (found - before).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(hooked(pixels(), None, recorded).video_embeds, before)


CONTAINERS = ("branch", "branch.temporal.1", "branch.spatial.0", "branch.temporal.0.attention", "tower.layers.3",
              "tower.layers.0.attention", "branch.alignment_head")  # fmt: skip


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_hooks_of_every_kind_and_level_run(name, kind):
    model = double_model()
    calls = []
    getattr(model.get_submodule(name), kind)(lambda *_: calls.append(1))
    images = pixels()
    if "backward" in kind:
        images.requires_grad_()
    text = torch.randn(2, 24, dtype=torch.float64)
    sum(model.pretraining_losses(model(images), text).values()).backward()
    assert len(calls) == 1


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_called_layers_have_the_gradients_of_fused_ones(recompute):
    plain, hooked = double_model(recompute=recompute), double_model(recompute=recompute)
    for layer in (*hooked.branch.temporal, hooked.branch.spatial[1], hooked.branch.alignment_head[0]):
        layer.register_forward_hook(lambda module, args, output: None)
    text = torch.randn(2, 24, dtype=torch.float64)
    visible = VisibleTokens.tube(2, 16, 4, 0.5, generator=torch.Generator().manual_seed(0))
    for model in (plain, hooked):
        sum(model.pretraining_losses(model(pixels(), visible), text).values()).backward()
    for (name, mine), theirs in zip(plain.branch.named_parameters(), hooked.branch.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_plain_layers_are_still_fused(monkeypatch):
    ran = []
    own = fused_layer._Layer.apply
    monkeypatch.setattr(fused_layer._Layer, "apply", lambda *args: ran.append(1) or own(*args))
    model = double_model()
    model(pixels())
    assert len(ran) == 3
    model.branch.temporal[2].fc.register_forward_pre_hook(lambda *_: None)
    model(pixels())
    assert len(ran) == 5  # the layer with the hook alone is called


def test_hooks_on_all_modules_run():
    model, names = double_model(), []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__)):
        model(pixels())
    assert {"TemporalLayer", "SpatialLayer", "PackedAttention", "TowerLayer", "ClipAttention"} <= set(names)


@pytest.mark.parametrize(
    "layers",
    [r".*branch.*\.(fc|fc1|fc2|out_proj)", r".*tower\.layers.*(q_proj|v_proj|fc2)", r".*head\.0"],
    ids=["branch", "tower", "alignment head"],
)
def test_adapters_act_as_if_merged_and_learn(layers):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(double_model(), peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    model = wrapped.get_base_model()
    text = torch.randn(2, 24, dtype=torch.float64)

    def loss():
        return sum(model.pretraining_losses(model(pixels()), text).values())

    live = loss()
    live.backward()
    adapters = {name: p for name, p in wrapped.named_parameters() if "lora_" in name}
    assert adapters and all(p.grad is not None and p.grad.any() for p in adapters.values())
    with wrapped.disable_adapter():
        off = loss()
    merged = wrapped.merge_and_unload()
    whole = sum(merged.pretraining_losses(merged(pixels()), text).values())
    torch.testing.assert_close(live, whole, rtol=1e-9, atol=1e-9)
    assert abs(live - off) > 1e-4


def test_parametrised_weights_are_heeded():
    class Negative(nn.Module):
        def forward(self, weight):
            return -weight

    found, expected = double_model(), double_model()
    for owner, name in (
        (found.branch.spatial[0].fc1, "weight"), (found.branch.temporal[1].attention, "qkv_weight"),
        (found.tower.layers[1].fc2, "weight"), (found.branch, "time"), (found.branch, "merge_gate"),
    ):  # fmt: skip
        parametrize.register_parametrization(owner, name, Negative())
    with torch.no_grad():
        for owner, name in (
            (expected.branch.spatial[0].fc1, "weight"), (expected.branch.temporal[1].attention, "qkv_weight"),
            (expected.tower.layers[1].fc2, "weight"), (expected.branch, "time"), (expected.branch, "merge_gate"),
        ):  # fmt: skip
            getattr(owner, name).neg_()
    torch.testing.assert_close(found(pixels()).video_embeds, expected(pixels()).video_embeds, rtol=1e-9, atol=1e-9)
    torch.nn.utils.parametrizations.weight_norm(found.branch.spatial[0].fc2)
    torch.testing.assert_close(found(pixels()).video_embeds, expected(pixels()).video_embeds, rtol=1e-9, atol=1e-9)
    found(pixels()).video_embeds.sum().backward()
    assert found.branch.spatial[0].fc2.parametrizations.weight.original0.grad is not None


def test_replaced_layers_are_heeded():
    class Shifted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    model = double_model()
    before = model(pixels()).video_embeds
    for parent, name in ((model.branch.spatial[0], "fc2"), (model.tower.layers[0], "fc2")):
        old = getattr(parent, name)
        new = Shifted(old.in_features, old.out_features).double()
        new.load_state_dict(old.state_dict())
        setattr(parent, name, new)
        after = model(pixels()).video_embeds
        assert (after - before).abs().max() > 1e-3
        before = after
    # without a bias, which the fused layers take for granted
    own = model.branch.temporal[1].fc
    model.branch.temporal[1].fc = nn.Linear(32, 32, bias=False).double()
    with torch.no_grad():
        model.branch.temporal[1].fc.weight.copy_(own.weight)
        own.bias.zero_()
    after = model(pixels()).video_embeds
    model.branch.temporal[1].fc = own
    torch.testing.assert_close(after, model(pixels()).video_embeds, rtol=1e-9, atol=1e-9)


@configs
def test_pixels_that_ask_for_a_gradient_get_one(config):
    model = double_model(config)
    model.tower.chunk = 3
    images = pixels().requires_grad_()
    weights = torch.randn(2, 17, 32, dtype=torch.float64)
    for encode in (model.video_tokens, model.frame_mean_tokens):
        (model_loss := (encode(images) * weights).sum()).backward()
        step = torch.randn_like(images)
        step *= 1e-6 / step.norm()
        with torch.no_grad():
            change = ((encode(images + step) - encode(images - step)) * weights).sum() / 2
        assert model_loss.requires_grad
        torch.testing.assert_close((images.grad * step).sum(), change, rtol=1e-5, atol=1e-12)
        images.grad = None
    still = pixels()[:, 0].requires_grad_()
    model.image_embeds(still).sum().backward()
    assert still.grad.any()
    assert not model.video_tokens(pixels()).isnan().any() and not model.frame_mean_tokens(pixels()).requires_grad


def test_spatial_layers_are_copied_from_plain_layers_alone():
    model = double_model()
    parametrize.register_parametrization(model.tower.layers[2].fc1, "weight", nn.Identity())
    with pytest.raises(ValueError, match=r"spatial layer 1.*tower: fc1 is a .*ParametrizedLinear"):
        model.reset_spatial_layers()


def test_what_is_plain():
    layer = nn.Linear(2, 3)
    assert is_plain(layer) and is_plain(copy.deepcopy(layer)) and is_plain(layer.requires_grad_(False))
    layer.forward = lambda x: x
    assert why_not_plain(layer) == "has another forward than its class"
    assert (
        "Bilinear" in why_not_plain(nn.Bilinear(2, 2, 2))
        and why_not_plain(nn.Bilinear(2, 2, 2), (nn.Bilinear,)) is None
    )
    assert "meta" in why_not_plain(nn.Linear(2, 3, device="meta"))
    inside = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    assert why_not_all_plain(inside, (nn.Sequential,)) is None and "Sequential" in why_not_all_plain(inside)
    inside[1].register_full_backward_pre_hook(lambda *_: None)
    assert why_not_all_plain(inside, (nn.Sequential,)) == "1 has hooks"

    class Coded(torch.Tensor):
        pass

    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Coded))
    assert why_not_plain(layer) == "has a weight that is a Coded"
