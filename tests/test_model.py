"""The model layer beyond the golden numbers: what a fresh branch is, what is frozen, how videos of any length go in."""

import pytest
import torch
import torch.nn.functional as F
from small_models import EVA, PATCHES, SIZES, make, shake, video
from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel, TowerConfig
from bt_adapter.model.losses import contrastive_loss
from bt_adapter.model.walk import run_lockstep, run_tower
from bt_adapter.towers.names import pack_qkv
from bt_kernels import VisibleTokens


@pytest.fixture(params=[SIZES, EVA], ids=["clip", "eva"])
def vision_config(request):
    return request.param


def test_closed_gates_leave_the_frozen_tower():
    """Output gate at 1 hands out the tower's CLS alone, whatever the branch holds: exactly, bit for bit."""
    model = shake(make())
    with torch.no_grad():
        model.branch.output_gate.fill_(1.0)  # sigmoid(1e4) = 1
        model.branch.merge_gate.fill_(1.0)
    pixels = video()
    frozen = model.image_embeds(pixels.flatten(0, 1)).unflatten(0, (2, 4))
    output = model(pixels)
    assert torch.equal(output.video_embeds, frozen.mean(1))
    assert torch.equal(output.frame_embeds, frozen)


def test_fresh_temporal_layers_change_nothing(vision_config):
    model = make(vision_config)
    before = model(video())
    with torch.no_grad():
        for layer in model.branch.temporal:  # anything but fc, which starts at zero
            for p in (*layer.norm.parameters(), *layer.attention.parameters()):
                p.add_(torch.randn_like(p))
    after = model(video())
    assert torch.equal(before.branch_tokens, after.branch_tokens)
    assert torch.equal(before.video_embeds, after.video_embeds)


def test_spatial_layers_start_as_the_towers(vision_config):
    model = make(vision_config)
    model.reset_spatial_layers()
    for i, layer in enumerate(model.branch.spatial):
        tower = pack_qkv(model.tower.layers[2 + i].state_dict(), "")
        assert all(torch.equal(value, tower[name]) for name, value in layer.state_dict().items())


def test_tower_is_the_hugging_face_one():
    torch.manual_seed(0)
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, hidden_act="quick_gelu")).eval()
    model = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2))
    images = video()[:, 0]
    with torch.no_grad():
        expected = clip(images, output_hidden_states=True)
        states = model.video_tokens(images[:, None])  # runs
        mean = model.frame_mean_tokens(images[:, None])
    assert states.shape == (2, PATCHES + 1, 32)
    torch.testing.assert_close(model.image_embeds(images), expected.image_embeds, rtol=1e-5, atol=1e-5)
    hidden = expected.hidden_states[-2]
    torch.testing.assert_close(mean, torch.cat([hidden[:, 1:], hidden[:, :1]], 1), rtol=1e-5, atol=1e-5)


def test_shared_tower_holds_the_same_memory():
    clip = CLIPVisionModel(CLIPVisionConfig(**SIZES))
    model = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2), share=True)
    theirs = {p.data_ptr() for p in clip.parameters()}
    assert {p.data_ptr() for p in model.tower.parameters()} == theirs
    with pytest.raises(ValueError, match="no projection"):
        model(video())


def test_tower_is_frozen_and_in_evaluation_mode_always():
    model = make().train().requires_grad_(True)
    assert model.branch.training and not model.tower.training
    assert not any(module.training for module in model.tower.modules())
    output = model(video(), VisibleTokens.tube(2, PATCHES, 4, 0.5))
    assert not output.backbone_tokens.requires_grad and output.branch_tokens.requires_grad
    losses = model.pretraining_losses(output, torch.randn(2, 24))
    sum(losses.values()).backward()
    assert all(p.grad is None for p in model.tower.parameters())
    without = [n for n, p in model.branch.named_parameters() if p.grad is None]
    assert without == []


def test_every_trained_parameter_is_in_one_group():
    model = make()
    groups = model.parameter_groups(lr=1.0)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.branch.parameters())
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model.branch.time)] == 10 and rates[id(model.branch.merge_gate)] == 100
    assert rates[id(model.branch.temporal[0].fc.weight)] == 100
    assert rates[id(model.branch.alignment_head[0].weight)] == 10


def test_stochastic_depth_drops_in_training_alone():
    model = shake(make(drop_path=0.5))
    pixels = video()
    assert torch.equal(model(pixels).video_embeds, model(pixels).video_embeds)
    model.train()
    torch.manual_seed(0)
    first = model(pixels).branch_tokens
    assert not torch.equal(first, model(pixels).branch_tokens)
    torch.manual_seed(0)
    assert torch.equal(first, model(pixels).branch_tokens)


@pytest.mark.parametrize("form", ["grid", "ragged"])
def test_stochastic_depth_is_exact_in_expectation(form):
    """Keeping everything at rate r equals scaling every residual by 1/(1-r): checked against a hand-made forward."""
    model = shake(make(depth=2, drop_path=0.5))
    pixels = video(4)
    if form == "grid":
        visible = VisibleTokens.tube(2, PATCHES, 4, 0.5)
    else:
        visible = VisibleTokens.random(2, PATCHES, 4, 0.5, frame_counts=torch.tensor([4, 2]))
    nothing = [torch.zeros(2 * visible.sequences), torch.zeros(2 * visible.steps)]
    dropped = model(pixels, visible, nothing).branch_tokens
    # layer 1 with both parts dropped: the temporal residual is fc's bias, the spatial one nothing, the MLP stays
    tokens = model._embed(pixels)
    tokens, z = run_lockstep(model, tokens, visible, 1)
    tokens = run_tower(model.tower, tokens, 3, 4)
    z = model.branch.merge(tokens, z, visible)
    z = torch.cat([z[:, :1], z[:, 1:] + model.branch.temporal[1].fc.bias], 1)
    z = z + model.branch.spatial[1].mlp(model.branch.spatial[1].norm2(z))
    real = torch.cat([torch.ones(2, 1, dtype=torch.bool), visible.index >= 0], 1)
    torch.testing.assert_close(dropped[real], z[real], rtol=1e-4, atol=1e-5)


def test_padding_frames_count_in_nothing():
    """A short video padded in a batch gives what it gives alone."""
    model = shake(make())
    pixels = video(4)
    counts = torch.tensor([4, 2])
    visible = VisibleTokens.random(2, PATCHES, 4, 0.0, frame_counts=counts)
    padded = pixels.clone()
    padded[1, 2:] = float("nan")
    both = model(padded, visible)
    for b, count in enumerate(counts.tolist()):
        alone = model(pixels[b : b + 1, :count], VisibleTokens.random(1, PATCHES, count, 0.0))
        torch.testing.assert_close(both.video_embeds[b], alone.video_embeds[0], rtol=1e-4, atol=1e-5)
        kept = both.branch_tokens[b, 1:][visible.index[b] >= 0]
        torch.testing.assert_close(kept, alone.branch_tokens[0, 1:], rtol=1e-4, atol=1e-5)
        text = torch.randn(2, 24, generator=torch.Generator().manual_seed(3))
        assert all(torch.isfinite(v) for v in model.pretraining_losses(both, text).values())


def test_ragged_with_everything_visible_is_the_grid():
    model = shake(make())
    grid = model(video())
    ragged = model(video(), VisibleTokens.random(2, PATCHES, 4, 0.0))
    torch.testing.assert_close(ragged.branch_tokens, grid.branch_tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 16, 17, 33])
def test_video_tokens_of_any_length(frames):
    model = shake(make())
    tokens = model.video_tokens(video(frames))
    assert tokens.shape == (2, PATCHES + 1, 32) and torch.isfinite(tokens).all()


def test_video_tokens_formula():
    """½(mean X + mean z) from the states themselves, T = 4, against the definition written with views."""
    model = shake(make(depth=3))
    pixels = video()
    with torch.no_grad():
        tokens, z = run_lockstep(model, model._embed(pixels), VisibleTokens.all(2, PATCHES, 4), 2)
        rows = z[:, 1:].unflatten(1, (PATCHES, 4)).mean(2)
        expected = torch.cat(
            [(tokens[:, :, 1:].mean(1) + rows) / 2, (tokens[:, :, 0].mean(1) + z[:, 0])[:, None] / 2], 1
        )
        torch.testing.assert_close(model.video_tokens(pixels), expected, rtol=1e-5, atol=1e-5)


def test_stored_features_equal_pixels():
    model = shake(make(depth=3))
    pixels = video()
    features = model.tower.embed(pixels.flatten(0, 1)).unflatten(0, (2, 4)).detach()
    expected = model.video_tokens(pixels)
    torch.testing.assert_close(model.video_tokens(features=features, start_layer=0), expected, rtol=1e-5, atol=1e-5)
    stored = model._embed(pixels)  # before layer L - d
    torch.testing.assert_close(model.video_tokens(features=stored), expected, rtol=1e-5, atol=1e-5)


def test_frame_order_matters_once_trained():
    model = shake(make())
    pixels = video(8)
    assert not torch.allclose(model.video_tokens(pixels), model.video_tokens(pixels.flip(1)), atol=1e-3)
    torch.testing.assert_close(
        model.frame_mean_tokens(pixels), model.frame_mean_tokens(pixels.flip(1)), rtol=1e-5, atol=1e-5
    )


def test_alignment_pairs_the_same_tokens():
    """With an alignment head that equals the tower's own and a branch that holds the tower's tokens, MBTA is 0."""
    model = make()
    tower = model.tower
    pixels = video()
    visible = VisibleTokens.tube(2, PATCHES, 4, 0.5)
    output = model(pixels, visible)
    places = visible.index
    rows = output.backbone_tokens[torch.arange(2)[:, None], places % 4, 1 + places // 4]
    target = F.linear(tower.final_norm(rows), tower.projection.weight)
    with torch.no_grad():
        linear, norm = model.branch.alignment_head
        linear.weight.zero_()
        linear.bias.zero_()
        norm.weight.zero_()
        norm.bias.copy_(target[0, 0])
    loss = model.pretraining_losses(output, torch.randn(2, 24))["mbta"]
    expected = 0.1 * (2 - 2 * F.cosine_similarity(target[0, 0].expand_as(target), target, dim=-1)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_contrastive_loss():
    v, t = torch.randn(5, 7), torch.randn(5, 7)
    logits = F.normalize(v, dim=1) @ F.normalize(t, dim=1).T / 0.05
    expected = -(logits.log_softmax(1).diagonal().mean() + logits.log_softmax(0).diagonal().mean())
    torch.testing.assert_close(contrastive_loss(v, t, 0.05), expected)
    with pytest.raises(ValueError, match="video and text"):
        contrastive_loss(v, t[:4], 0.05)


def test_contrastive_loss_keeps_its_precision_under_autocast():
    v, t = torch.randn(16, 24), torch.randn(16, 24)
    expected = contrastive_loss(v, t, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(contrastive_loss(v, t, 0.01), expected)


def test_bfloat16_model_runs():
    model = shake(make()).to(torch.bfloat16)
    assert model.video_tokens(video()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(shake(make())(video()).video_embeds).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(2, 3, 16, 16)), r"pixel_values must be \[B, T, 3, h, w\]"),
        (lambda m: m(torch.randn(2, 4, 1, 16, 16)), r"ending in \[3, 16, 16\]"),
        (lambda m: m(torch.randn(2, 4, 3, 20, 20)), r"shape is \[2, 4, 3, 20, 20\]"),
        (lambda m: m(torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8)), "float tensor"),
        (lambda m: m(torch.randn(2, 0, 3, 16, 16)), "at least one frame"),
        (lambda m: m(torch.randn(2, 4, 3, 16, 16, device="meta")), "must be on the model's cpu"),
        (lambda m: m("file.mp4"), "is str"),
        (lambda m: m(video(9), VisibleTokens.tube(2, PATCHES, 9, 0.5)), "9 frames.*time table for 8 time steps"),
        (lambda m: m(video(), VisibleTokens.all(3, 16, 4)), "visible is for 3 videos"),
        (lambda m: m(video(), torch.ones(2, 64, dtype=torch.bool)), "visible must be a VisibleTokens"),
        (lambda m: m.video_tokens(video(20), windows="reference"), "at most 16"),
        (lambda m: m.video_tokens(features=torch.randn(2, 0, 17, 32)), "at least one frame"),
        (lambda m: m.video_tokens(features=torch.randn(2, 4, 17, 32, device="meta")), "must be on the model's"),
        (lambda m: m.video_tokens(), "exactly one of"),
        (lambda m: m.video_tokens(video(), windows="half"), "windows must be"),
        (lambda m: m.video_tokens(video(), start_layer=1), "start_layer goes with features"),
        (lambda m: m.video_tokens(video(1), windows="reference"), "windows='reference'"),
        (lambda m: m.video_tokens(features=torch.randn(2, 4, 17, 30)), "features must be"),
        (
            lambda m: m.video_tokens(features=torch.randn(2, 4, 17, 32), start_layer=3),
            r"start_layer must lie in \[0, 2\]",
        ),
        (lambda m: m.image_embeds(video()), r"pixel_values must be \[n, 3, h, w\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(make())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be a positive int"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide"),
        ({"hidden_act": "relu"}, "hidden_act must be"),
        ({"model_type": "vit"}, "model_type must be"),
        ({"patch_size": None}, "lacks patch_size"),
        ({"image_size": (16, 20)}, "must be square"),
    ],
)
def test_bad_tower_config(change, message):
    with pytest.raises(ValueError, match=message):
        BTAdapterVisionModel({**SIZES, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 0}, "depth must be a positive int"),
        ({"depth": 5}, "depth must be at most"),
        ({"drop_path": 1.0}, "drop_path must lie in"),
        ({"recompute": "everything"}, "recompute must be"),
    ],
)
def test_bad_branch_config(change, message):
    with pytest.raises(ValueError, match=message):
        make(**change)


def test_published_sizes():
    """Trainable parameters of the published model: 71.45 M, 72.24 M with the alignment head (ViT-L/14, d = 4)."""
    config = {**SIZES, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 224, "patch_size": 14, "projection_dim": 768}  # fmt: skip
    with torch.device("meta"):
        model = BTAdapterVisionModel(config, BTAdapterConfig())
    count = sum(p.numel() for p in model.branch.parameters())
    head = sum(p.numel() for p in model.branch.alignment_head.parameters())
    assert round((count - head) / 1e6, 2) == 71.45
    assert round(count / 1e6, 2) == 72.24
    assert TowerConfig.eva_clip_g().patches == 256
