"""MBCA and MBTA at the layer that chat reads: what they compare, and that pretraining obeys the option."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pretraining import losses, recipe, write_clips
from test_chat import mini_is_there

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.run import pretrain
from bt_adapter.towers.text import load_clip
from bt_kernels import VisibleTokens

TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8, "projection_dim": 12,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = BTAdapterVisionModel(TOWER, BTAdapterConfig(depth=3, drop_path=0.0, alignment_head=False))
    for parameter in model.branch.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("fused", [True, False])
def test_the_mean_is_that_of_the_tokens_that_chat_reads(model, fused):
    model.branch.config = BTAdapterConfig(depth=3, drop_path=0.0, alignment_head=False, fused=fused)
    pixels = torch.randn(2, 4, 3, 16, 16)
    output = model(pixels, align_layer="chat")
    wanted = model.video_tokens(pixels)[:, :-1].mean(1)
    torch.testing.assert_close(output.chat.mean, wanted, rtol=1e-4, atol=1e-5)
    embeds = model.tower.project(model.tower.final_norm(wanted))
    torch.testing.assert_close(model.branch_embeds(output), embeds, rtol=1e-4, atol=1e-5)


def test_the_distance_is_that_of_the_visible_tokens(model):
    pixels, states = torch.randn(2, 4, 3, 16, 16), []
    visible = VisibleTokens.tube(2, 4, 4, 0.5, torch.Generator().manual_seed(3))
    run = model.branch.run_layer

    def record(layer, z, *others):
        states.append(run(layer, z, *others))
        return states[-1]

    model.branch.run_layer = record
    output = model(pixels, visible, align_layer="chat")
    with torch.no_grad():
        tower = model.tower.run(pixels.flatten(0, 1), 3).unflatten(0, (2, 4))  # after layer L-2
    patch, frame = visible.index // 4, visible.index % 4
    rows = tower[torch.arange(2)[:, None], frame, 1 + patch]
    wanted = 2 - 2 * F.cosine_similarity(states[1][:, 1:], rows, dim=-1).mean()
    torch.testing.assert_close(output.chat.distance, wanted, rtol=1e-4, atol=1e-5)


def test_all_that_chat_runs_learns_from_it(model):
    output = model.train()(torch.randn(2, 4, 3, 16, 16), align_layer="chat")
    found = model.pretraining_losses(output, torch.randn(2, 12))
    assert set(found) == {"vtc", "mbca", "mbta"}
    (found["mbca"] + found["mbta"]).backward()
    with_gradient = {
        name.split(".")[1] for name, p in model.branch.named_parameters() if p.grad is not None and "." in name
    }
    assert with_gradient == {"0", "1"}, "branch layers 0 to d-2 learn from it, and the last one does not"
    assert all(p.grad is None for p in model.tower.parameters())


def test_without_it_nothing_is_compared(model):
    assert model(torch.randn(1, 2, 3, 16, 16)).chat is None
    with pytest.raises(ValueError, match="align_layer must be 'last' or 'chat', but is 'first'"):
        model(torch.randn(1, 2, 3, 16, 16), align_layer="first")
    shallow = BTAdapterVisionModel(TOWER, BTAdapterConfig(depth=1))
    with pytest.raises(ValueError, match="needs a branch of depth 2 or more"):
        shallow(torch.randn(1, 2, 3, 16, 16), align_layer="chat")


@pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))
def test_a_run_obeys_it_whole_and_in_parts(tmp_path):
    manifest = str(write_clips(tmp_path / "clips"))
    runs = {}
    for name, changes in {"chat": {}, "parts": {"accumulate": 2}, "last": {"align_layer": "last"}}.items():
        asked = recipe(data=manifest, out=tmp_path / name, steps=2, **{"align_layer": "chat", **changes})
        folder = pretrain(asked)
        runs[name] = losses(tmp_path / name)
        saved = BTAdapterVisionModel.from_pretrained(folder, clip=load_clip("mini")[0])
        assert (saved.branch.alignment_head is not None) == (name == "last")
    assert runs["chat"][0][2:] != pytest.approx(runs["last"][0][2:], rel=1e-3)
    assert [row[1:] for row in runs["parts"]] == [pytest.approx(row[1:], rel=2e-3) for row in runs["chat"]]
    with pytest.raises(CommandError, match="--align-layer chat needs --depth 2"):
        pretrain(recipe(data=manifest, out=tmp_path / "no", steps=1, align_layer="chat", depth=1))
