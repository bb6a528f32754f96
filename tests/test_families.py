"""Every image chat model a branch can be attached to: videos through its own way of seeing, stills as before."""

import pytest
import torch
from chat_models import (
    FAMILIES,
    IMAGE_TOKEN,
    LAYERS,
    PATCHES,
    QFORMERS,
    WIDTH,
    ids,
    make_branch,
    make_chat,
    question,
    stills,
    t5_config,
    videos,
)

from bt_adapter import BTAdapterVisionModel, load_reference_checkpoint, to_reference_state_dict
from bt_adapter.chat.attach import attach, attached_branch, branch_enabled, detach, video_tokens
from bt_adapter.chat.families import Visuals, family_of
from bt_adapter.chat.families.layers import video_tokens_of_layers
from bt_adapter.chat.families.pairing import check_shapes
from bt_adapter.towers.config import TowerConfig

PROJECTORS = ("llava", "llava_next", "vipllava")


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@torch.no_grad()
def answer(chat, tokens, rows=None, **inputs) -> torch.Tensor:
    """Logits after the prompts. rows: how many visuals there are."""
    return chat(input_ids=tokens, **inputs, **question(chat, rows or len(tokens))).logits


@torch.no_grad()
def spliced(chat, tokens, *features) -> torch.Tensor:
    """Logits with the features put by hand, one after the other, where the image tokens are."""
    family = family_of(chat)
    embeds = family.input_embeddings(tokens)
    embeds[tokens == IMAGE_TOKEN] = torch.cat([f.flatten(0, -2) for f in features])
    hidden = family.language_model(inputs_embeds=embeds).last_hidden_state
    return family.lm_head(hidden)


@torch.no_grad()
def projected(chat, pixels) -> torch.Tensor:
    family = family_of(chat)
    asked = question(chat, len(pixels)).get("qformer_input_ids")
    return family.project(video_tokens(chat, pixels), None if asked is None else {"input_ids": asked})


def test_stills_are_bit_equal_before_during_and_after(name):
    chat = make_chat(name)
    inputs, length = stills(name)
    tokens = ids(length, batch=2)

    def outputs():
        options = {"max_new_tokens": 3, "do_sample": False} | question(chat, 2)
        mask = torch.ones_like(tokens)
        return answer(chat, tokens, **inputs), chat.generate(input_ids=tokens, attention_mask=mask, **inputs, **options)

    before = outputs()
    attach(chat, make_branch(chat))
    during = outputs()
    detach(chat)
    after = outputs()
    for one, two, three in zip(before, during, after, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)


def test_counts_of_tokens_are_those_the_model_makes(name):
    chat = make_chat(name)
    family = family_of(chat)
    _, length = stills(name)
    assert family.image_length(24, 48) == length
    assert family.video_length == (5 if name in QFORMERS else PATCHES + 1)
    assert (family.image_size, family.patches, family.image_token_id) == (24, PATCHES, IMAGE_TOKEN)
    if name == "llava_next":
        with pytest.raises(ValueError, match="height and width"):
            family.image_length()


def test_videos_take_the_place_of_image_tokens(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    pixels = videos()
    tokens = ids(family_of(chat).video_length, batch=2)
    features = projected(chat, pixels)
    assert features.shape == (2, family_of(chat).video_length, WIDTH)
    found = answer(chat, tokens, pixel_values=pixels)
    torch.testing.assert_close(found, spliced(chat, tokens, features), rtol=1e-5, atol=1e-6)


def test_generate_takes_videos(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    pixels = videos()
    tokens = ids(family_of(chat).video_length, batch=2)
    new = chat.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels, max_new_tokens=4,
        do_sample=False, eos_token_id=None, **question(chat, 2),
    )  # fmt: skip
    whole = tokens
    for _ in range(4):  # the same greedily, one pass over everything a token
        whole = torch.cat([whole, answer(chat, whole, pixel_values=pixels)[:, -1:].argmax(-1)], 1)
    assert torch.equal(new[:, -4:], whole[:, -4:])


def test_order_in_time_matters_with_the_branch_alone(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    pixels = videos()
    tokens = ids(family_of(chat).video_length, batch=2)
    forward = answer(chat, tokens, pixel_values=pixels)
    scale = forward.abs().max()
    change = (forward - answer(chat, tokens, pixel_values=pixels.flip(1))).abs().max() / scale
    with branch_enabled(chat, False):
        off = answer(chat, tokens, pixel_values=pixels)
        rounding = (off - answer(chat, tokens, pixel_values=pixels.flip(1))).abs().max() / scale
    assert rounding < 1e-5 and change > 30 * rounding and change > 1e-5
    assert torch.equal(answer(chat, tokens, pixel_values=pixels), forward)


def test_every_video_of_a_prompt_is_spliced(name):
    """The published code splices each video into the text alone, so that only the last of a prompt stays."""
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    length = family_of(chat).video_length
    pixels, tokens = videos(), ids(length, length)
    found = answer(chat, tokens, 2, pixel_values=pixels)
    expected = spliced(chat, tokens, projected(chat, pixels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    other = torch.cat([videos(seed=5)[:1], pixels[1:]])  # another first video: the answer must hear of it
    assert (answer(chat, tokens, 2, pixel_values=other) - found)[:, -1].abs().max() > 1e-5


def test_stills_and_videos_of_any_length_in_one_call(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    family = family_of(chat)
    inputs, still = stills(name, 1)
    long, short = videos(1, 5)[0], videos(1, 2, seed=3)[0]
    sizes = [None, (24, 48), None] if name == "llava_next" else None
    visuals = Visuals([long, inputs["pixel_values"][0], short], sizes)
    asked = question(chat, 3)

    # one prompt with a video, then a still; another with a video alone, padded
    first, second = ids(family.video_length, still), ids(family.video_length)
    padding = torch.full((1, first.shape[1] - second.shape[1]), 62)
    tokens = torch.cat([first, torch.cat([padding, second], 1)])
    mask = (tokens != 62).long()
    found = answer_masked(chat, tokens, mask, visuals, asked)

    one = spliced(chat, first, projected(chat, long[None]), still_embeds(chat, inputs))
    two = spliced(chat, second, projected(chat, short[None]))
    torch.testing.assert_close(found[:1], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:, padding.shape[1] :], two, rtol=1e-4, atol=1e-5)

    new = chat.generate(
        input_ids=tokens, attention_mask=mask, pixel_values=visuals, max_new_tokens=1, do_sample=False, **asked
    )
    assert torch.equal(new[:, -1], found[:, -1].argmax(-1))


@torch.no_grad()
def answer_masked(chat, tokens, mask, visuals, asked) -> torch.Tensor:
    return chat(input_ids=tokens, attention_mask=mask, pixel_values=visuals, **asked).logits


@torch.no_grad()
def still_embeds(chat, inputs) -> torch.Tensor:
    features = chat.get_image_features(**inputs, **question(chat, 1)).pooler_output
    return torch.cat(list(features))


def test_gradients_reach_the_branch_and_nothing_waits_in_vain(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    tokens = ids(family_of(chat).video_length, batch=2)
    chat(input_ids=tokens, pixel_values=videos(), labels=tokens, **question(chat, 2)).loss.backward()
    branch = attached_branch(chat).branch
    asked = {n for n, p in branch.named_parameters() if p.requires_grad}
    assert asked and asked == {n for n, p in branch.named_parameters() if p.grad is not None}
    assert branch.temporal[0].fc.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in family_of(chat).vision_tower.parameters() if not p.requires_grad)
    assert any("bt_adapter" in n for n, _ in chat.named_parameters())


def test_tower_stays_shared_when_the_model_moves(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    before = video_tokens(chat, videos())
    chat.to(torch.float64)
    after = video_tokens(chat, videos().double())
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-4, atol=1e-4)
    mine = {p.data_ptr() for n, p in attached_branch(chat).tower.named_parameters() if n.startswith("layers.0.fc")}
    assert mine <= {p.data_ptr() for p in family_of(chat).vision_tower.parameters()}


def test_branch_saved_alone_takes_the_chats_tower(name, tmp_path):
    chat = make_chat(name)
    branch = make_branch(chat)
    expected = video_tokens(attach(chat, branch), videos())
    branch.save_pretrained(tmp_path)
    again = attach(make_chat(name), tmp_path)  # the same seed: the same chat model
    assert torch.equal(video_tokens(again, videos()), expected)
    assert len(attached_branch(again).tower.layers) == LAYERS - (name in QFORMERS)
    attached_branch(again).save_pretrained(tmp_path / "again")
    assert torch.equal(video_tokens(attach(make_chat(name), tmp_path / "again"), videos()), expected)
    if name in QFORMERS:
        with pytest.raises(ValueError, match="lacks its last layer"):
            attached_branch(again).save_pretrained(tmp_path / "whole", include_tower=True)
    else:
        attached_branch(again).save_pretrained(tmp_path / "whole", include_tower=True)
        assert torch.equal(video_tokens(attach(make_chat(name), tmp_path / "whole"), videos()), expected)


def test_nothing_is_changed_by_a_refusal(name, tmp_path):
    make_branch(make_chat(name, seed=1)).save_pretrained(tmp_path)
    chat = make_chat(name)
    family_of(chat).vision_tower.embeddings.class_embedding.data.mul_(2)
    with pytest.raises(ValueError, match=r"another CLIP \(norms of weights: "):
        attach(chat, tmp_path)
    assert all(p.requires_grad for p in family_of(chat).vision_tower.parameters())
    assert type(chat) is family_of(chat).model_class
    assert not any("bt_adapter" in n for n, _ in chat.named_parameters())


def test_branch_tuned_on_stored_features_is_attached(name):
    chat = make_chat(name)
    whole = make_branch(chat)
    expected = video_tokens(attach(chat, whole), videos())
    stored = BTAdapterVisionModel(whole.vision_config, whole.config, stored_features=True).eval()
    stored.branch.load_state_dict(whole.branch.state_dict(), strict=False)
    first = stored.first_branch_layer
    for mine, theirs in zip(stored.tower.layers, whole.tower.layers[first:], strict=False):
        mine.load_state_dict(theirs.state_dict())
    stored.tower.position.data.copy_(whole.tower.position)
    assert torch.equal(video_tokens(attach(make_chat(name), stored), videos()), expected)


def test_published_file_is_attached(name, tmp_path):
    chat = make_chat(name)
    gates = {"merge_gate_slope": None, "output_gate_slope": None} if name in QFORMERS else {}
    branch = make_branch(chat, **gates)
    config = branch.vision_config  # 4 heads, which a file of this width does not tell
    expected = video_tokens(attach(chat, branch), videos())
    torch.save(to_reference_state_dict(branch), tmp_path / "published.pth")
    loaded = load_reference_checkpoint(tmp_path / "published.pth", config)
    assert torch.equal(video_tokens(attach(make_chat(name), loaded), videos()), expected)
    with pytest.raises(ValueError, match="num_attention_heads 1 against 4"):
        attach(make_chat(name), tmp_path / "published.pth")


# Q-Formers


@pytest.mark.parametrize("name", QFORMERS)
def test_eva_tower_computes_what_the_chat_models_does(name):
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    pixels = videos()
    with torch.no_grad(), branch_enabled(chat, False):
        found = video_tokens(chat, pixels)
        states = detach(chat).vision_model(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
    mean = states[LAYERS - 1].unflatten(0, (2, 4)).mean(1)
    torch.testing.assert_close(found, torch.cat([mean[:, 1:], mean[:, :1]], 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QFORMERS)
def test_a_still_seen_as_a_video_of_one_frame_is_the_still(name):
    """With the branch off a video of one frame is its still: the same norm, the same Q-Former, the same tokens."""
    chat = make_chat(name)
    attach(chat, make_branch(chat))
    inputs, length = stills(name)
    tokens = ids(length, batch=2)
    with branch_enabled(chat, False):
        found = answer(chat, tokens, pixel_values=inputs["pixel_values"][:, None])
    torch.testing.assert_close(found, answer(chat, tokens, **inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QFORMERS)
def test_language_models_with_an_encoder_take_videos(name):
    chat = make_chat(name, text=t5_config())
    attach(chat, make_branch(chat))
    tokens = ids(family_of(chat).video_length, batch=2)

    def logits(pixels):
        with torch.no_grad():
            start = torch.full((2, 1), 62)
            return chat(input_ids=tokens, pixel_values=pixels, decoder_input_ids=start, **question(chat, 2)).logits

    assert (logits(videos()) - logits(videos().flip(1))).abs().max() > 0
    new = chat.generate(input_ids=tokens, pixel_values=videos(), max_new_tokens=3, **question(chat, 2))
    assert len(new) == 2
    with pytest.raises(ValueError, match="encoder"):
        _ = family_of(chat).language_model


def test_instructblip_needs_the_question():
    chat = make_chat("instructblip")
    attach(chat, make_branch(chat))
    with pytest.raises(ValueError, match="question"):
        family_of(chat).project(video_tokens(chat, videos()))


# true configurations


@pytest.mark.parametrize("name", FAMILIES)
def test_default_configurations_are_those_of_the_published_towers(name):
    """The Q-Former models' tower of 39 layers goes with a branch beside EVA-CLIP-g's 40."""
    with torch.device("meta"):
        chat = make_chat(name, true=True)
    family, layers = family_of(chat), {"vipllava": (23, 20, 17, 14, 6)}.get(name, (23,))
    if name in QFORMERS:
        config = TowerConfig.eva_clip_g(projection_dim=None)
        assert chat.config.vision_config.num_hidden_layers == 39 and family.video_length == 32
        layers = (39,)
    else:
        config = TowerConfig(1024, 4096, 24, 16, 336, 14)
        assert family.video_length == 577
    assert family.tower_config == config and family.feature_layers == layers
    check_shapes(config, 4, family)


# several layers


def test_one_layer_is_the_published_method():
    chat = make_chat("llava")
    model = attached_branch(attach(chat, make_branch(chat)))
    for frames in (4, 70, 131):
        pixels = videos(1, frames)
        assert torch.equal(video_tokens_of_layers(model, pixels, [LAYERS - 1]), model.video_tokens(pixels))
    off = video_tokens_of_layers(model, videos(), [LAYERS - 1], branch=False)
    assert torch.equal(off, model.frame_mean_tokens(videos()))


def test_layers_below_the_branch_are_frame_means():
    chat = make_chat("vipllava")
    model = attached_branch(attach(chat, make_branch(chat, depth=2)))  # beside layers 2 and 3; chat runs it beside 2
    pixels, steps = videos(), []
    found = video_tokens_of_layers(model, pixels, (3, 2, 1), progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i + 1, 4) for i in range(4)]  # three tower layers, one branch layer
    with torch.no_grad():
        states = chat.model.vision_tower(pixels.flatten(0, 1), output_hidden_states=True).hidden_states
    for i, layer in ((1, 2), (2, 1)):
        mean = states[layer].unflatten(0, (2, 4)).mean(1)
        expected = torch.cat([mean[:, 1:], mean[:, :1]], 1)
        torch.testing.assert_close(found[..., 32 * i : 32 * (i + 1)], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(found[..., :32], model.video_tokens(pixels))


def test_layers_beside_the_branch_carry_it():
    chat = make_chat("vipllava")
    model = attached_branch(attach(chat, make_branch(chat, depth=3)))  # beside layers 1 to 3
    forward = video_tokens_of_layers(model, videos(), (3, 2, 1))
    backward = video_tokens_of_layers(model, videos().flip(1), (3, 2, 1))
    moved = (forward - backward).abs().amax((0, 1)).unflatten(0, (3, 32)).amax(1)
    assert (moved[:2] > 1e-2).all() and moved[2] < 1e-5
    with pytest.raises(ValueError, match=r"\[0, 3\]"):
        video_tokens_of_layers(model, videos(), (4,))


# which branch goes with which tower


def test_what_stood_in_for_the_method_before_is_kept(name):
    """As accelerate's hooks do, which move inputs to where a module is."""
    chat = make_chat(name)
    family = family_of(chat)
    owner, method = (chat.vision_model, "forward") if family.has_qformer else (chat.model, "get_image_features")
    own, heard = getattr(owner, method), []

    def replaced(*args, **kwargs):
        heard.append(1)
        return own(*args, **kwargs)

    setattr(owner, method, replaced)
    attach(chat, make_branch(chat))
    inputs, length = stills(name)
    answer(chat, ids(length, batch=2), **inputs)
    assert heard
    detach(chat)
    assert owner.__dict__[method] is replaced
