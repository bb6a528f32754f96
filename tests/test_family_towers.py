"""Branches whose tower is another one, or of another resolution than the chat model's: what is taken, what refused."""

import pytest
import torch
from chat_models import FAMILIES, LAYERS, QFORMERS, make_branch, make_chat

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.chat.attach import attach, attached_branch, video_tokens
from bt_adapter.chat.families import family_of
from bt_adapter.chat.families.pairing import enlarge


def at_size(chat, size: int, change: float = 0.0) -> BTAdapterVisionModel:
    """A branch of another resolution: the same tower but for the position table, and a change of all else."""
    branch = make_branch(chat)
    family = family_of(chat)
    config = {**branch.vision_config.to_dict(), "image_size": size}
    other = BTAdapterVisionModel(config, BTAdapterConfig(depth=3)).eval()
    places = 1 + other.vision_config.patches
    state = {k: v + change * torch.randn_like(v) for k, v in branch.state_dict().items()}
    state["tower.position"] = enlarge(branch.tower.position, places)
    other.load_state_dict(state)
    assert family.image_size != size
    return other


@pytest.mark.parametrize("name", ["llava", "blip-2"])
def test_same_clip_at_another_resolution_is_taken_and_told(name):
    chat = make_chat(name, image_size=48)  # 36 patches
    small = make_chat(name)
    state = {n: p for n, p in family_of(small).vision_tower.state_dict().items() if "position" not in n}
    family_of(chat).vision_tower.load_state_dict(state, strict=False)
    table, theirs = family_of(chat).tower()[0]["position"], family_of(small).tower()[0]["position"]
    with torch.no_grad():
        smooth = torch.linspace(-1, 1, 10)[:, None] * torch.ones_like(theirs)
        theirs.copy_(smooth)
        table.copy_(enlarge(smooth, 37))
    branch = make_branch(small)
    with pytest.warns(UserWarning, match=r"same CLIP at another resolution \(trained at 24 px, used at 48\)"):
        attach(chat, branch)
    pixels = torch.randn(1, 2, 3, 48, 48)
    assert video_tokens(chat, pixels).shape == (1, 37, 32)
    assert torch.equal(attached_branch(chat).tower.position, table)


def test_another_clip_at_another_resolution_is_refused_unless_asked_for():
    chat = make_chat("llava", image_size=48)
    branch = make_branch(make_chat("llava"))
    with pytest.raises(ValueError, match=r"another CLIP.*image_size 24 against 48.*require_same_tower=False"):
        attach(chat, branch)
    assert "get_image_features" not in chat.model.__dict__
    with pytest.warns(UserWarning, match="another CLIP"):
        attach(chat, branch, require_same_tower=False)
    assert video_tokens(chat, torch.randn(1, 2, 3, 48, 48)).shape == (1, 37, 32)


def test_branch_alone_of_another_resolution_is_refused_unless_asked_for(tmp_path):
    make_branch(make_chat("llava")).save_pretrained(tmp_path)
    chat = make_chat("llava", image_size=48)
    with pytest.raises(ValueError, match=r"24 px.*48 px.*include_tower=True"):
        attach(chat, tmp_path)
    with pytest.warns(UserWarning, match="24 px"):
        attach(chat, tmp_path, require_same_tower=False)
    assert video_tokens(chat, torch.randn(1, 2, 3, 48, 48)).shape == (1, 37, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_branch_of_the_other_kind_of_tower_is_refused(name):
    other = make_branch(make_chat("llava" if name in QFORMERS else "blip-2"))
    with pytest.raises(ValueError, match=r"an? (EVA-)?CLIP tower, image_chat_model has an? (EVA-)?CLIP"):
        attach(make_chat(name), other)


@pytest.mark.parametrize("name", QFORMERS)
def test_branch_beside_as_many_layers_as_the_files_hold_is_refused(name):
    """A branch beside 39 layers would read layer 37, but the Q-Former reads layer 38."""
    chat = make_chat(name)
    other = make_branch(make_chat(name, num_hidden_layers=LAYERS - 2))
    with pytest.raises(ValueError, match=r"leave the last layer out\): num_hidden_layers 3 against 4"):
        attach(chat, other)


def test_models_that_do_not_read_the_last_layer_but_one_are_refused():
    chat = make_chat("vipllava")
    branch = make_branch(chat)
    chat.config.vision_feature_layers = [-1, -3, 1]
    with pytest.raises(ValueError, match=r"after layers \[4, 2, 1\] of 4"):
        attach(chat, branch)


def test_other_models_are_refused():
    with pytest.raises(TypeError, match=r"LlavaForConditionalGeneration.*InstructBlip.*but is Linear"):
        attach(torch.nn.Linear(1, 1), "nowhere")
