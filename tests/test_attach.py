"""attach: an image chat model takes videos, and stills go on as before."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.chat.attach import attach, attached_branch, branch_enabled, detach
from bt_adapter.chat.families import family_of
from bt_adapter.chat.families.attachment import attachment_of

IMAGE_TOKEN = 60
PATCHES = 9  # 24 px in patches of 8
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


def make_chat(seed: int = 0, **vision) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    text = LlamaConfig(
        hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, eos_token_id=63, pad_token_id=62, bos_token_id=61,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION | vision),
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
    )
    return LlavaForConditionalGeneration(config).eval()


def make_branch(chat: LlavaForConditionalGeneration, depth: int = 3, moving: bool = True) -> BTAdapterVisionModel:
    """A branch on the chat's own tower (copied); moving: temporal fc drawn, so that order in time matters."""
    model = BTAdapterVisionModel.from_clip(chat.model.vision_tower, BTAdapterConfig(depth=depth)).eval()
    if moving:
        for layer in model.branch.temporal:
            torch.nn.init.normal_(layer.fc.weight, std=0.5)
        torch.nn.init.normal_(model.branch.time, std=1.0)
    return model


def ids(visual: int, batch: int = 1) -> torch.Tensor:
    return torch.tensor([[61, 5] + [IMAGE_TOKEN] * visual + [7, 8, 9]]).repeat(batch, 1)


@pytest.fixture
def chat() -> LlavaForConditionalGeneration:
    return make_chat()


@pytest.fixture
def videos() -> torch.Tensor:
    return torch.randn(2, 4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def test_video_becomes_projected_video_tokens(chat, videos):
    branch = make_branch(chat)
    expected = chat.model.multi_modal_projector(branch.video_tokens(videos))
    attach(chat, branch)
    features = chat.get_image_features(videos).pooler_output
    assert family_of(chat).video_length == PATCHES + 1
    assert torch.equal(torch.stack(list(features)), expected)

    # the language model sees exactly these in the place of the image tokens
    tokens = ids(PATCHES + 1, 2)
    embeds = chat.get_input_embeddings()(tokens)
    embeds[tokens == IMAGE_TOKEN] = expected.flatten(0, 1)
    with torch.no_grad():
        assert torch.equal(chat(input_ids=tokens, pixel_values=videos).logits, chat(inputs_embeds=embeds).logits)


def test_generate_works_unchanged(chat, videos):
    attach(chat, make_branch(chat))
    tokens = ids(PATCHES + 1, 2)
    new = chat.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=videos, max_new_tokens=5, do_sample=False
    )
    assert new.shape[0] == 2 and tokens.shape[1] < new.shape[1] <= tokens.shape[1] + 5

    whole = tokens  # the same greedily, one forward pass over everything a token
    with torch.no_grad():
        for _ in range(new.shape[1] - tokens.shape[1]):
            logits = chat(input_ids=whole, pixel_values=videos).logits[:, -1]
            whole = torch.cat([whole, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(new[0], whole[0])


@pytest.mark.parametrize("frames", [1, 3, 70])
def test_any_number_of_frames_gives_as_many_tokens(chat, frames):
    attach(chat, make_branch(chat))
    features = chat.get_image_features(torch.randn(1, frames, 3, 24, 24)).pooler_output
    assert features[0].shape == (PATCHES + 1, 40)


def test_stills_are_bit_equal_before_during_and_after(chat):
    stills = torch.randn(2, 3, 24, 24)
    tokens = ids(PATCHES, 2)

    def logits():
        with torch.no_grad():
            return chat(input_ids=tokens, pixel_values=stills).logits

    before = logits()
    attach(chat, make_branch(chat))
    during = logits()
    detach(chat)
    assert torch.equal(before, during) and torch.equal(before, logits())


def test_detach_restores_the_model(chat):
    names = set(chat.state_dict())
    attach(chat, make_branch(chat))
    assert any("bt_adapter" in name for name in chat.state_dict())
    detach(chat)
    detach(chat)
    assert set(chat.state_dict()) == names
    with pytest.raises(ValueError, match="attach"):
        attached_branch(chat)


def test_tower_is_shared_and_only_the_branch_is_added(chat):
    own = sum(p.numel() for p in chat.parameters())
    branch = make_branch(chat)
    attach(chat, branch)
    tower, theirs = attached_branch(chat).tower, chat.model.vision_tower
    assert tower.layers[0].fc1.weight is theirs.encoder.layers[0].mlp.fc1.weight
    assert {p.data_ptr() for p in tower.parameters()} <= {p.data_ptr() for p in theirs.parameters()}
    assert sum(p.numel() for p in chat.parameters()) == own + sum(p.numel() for p in branch.branch.parameters())
    chat.to(torch.float64)
    assert branch.branch.time.dtype == tower.position.dtype == torch.float64
    chat.get_image_features(torch.randn(1, 2, 3, 24, 24, dtype=torch.float64))


def test_order_in_time_matters_with_the_branch_alone(chat, videos):
    attach(chat, make_branch(chat))

    def tokens(pixels):
        return torch.stack(list(chat.get_image_features(pixels).pooler_output))

    forward, backward = tokens(videos), tokens(videos.flip(1))
    assert (forward - backward).abs().max() > 1e-3
    with branch_enabled(chat, False):
        # a mean over frames in another order: float32 rounding of four addends
        torch.testing.assert_close(tokens(videos), tokens(videos.flip(1)), rtol=1e-4, atol=1e-5)
    assert torch.equal(tokens(videos), forward)


def test_switched_off_is_the_mean_of_the_frames(chat, videos):
    attach(chat, make_branch(chat))
    with torch.no_grad():
        hidden = chat.model.vision_tower(videos.flatten(0, 1), output_hidden_states=True).hidden_states[-2]
        mean = hidden.unflatten(0, (2, 4)).mean(1)
        expected = chat.model.multi_modal_projector(torch.cat([mean[:, 1:], mean[:, :1]], 1))
        with branch_enabled(chat, False):
            found = torch.stack(list(chat.get_image_features(videos).pooler_output))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # two implementations of one attention


def test_switch_comes_back_after_an_error(chat, videos):
    attach(chat, make_branch(chat))
    with pytest.raises(RuntimeError), branch_enabled(chat, False):
        raise RuntimeError
    assert attachment_of(chat).enabled


def test_branch_from_a_folder_takes_the_chats_tower(chat, videos, tmp_path):
    branch = make_branch(chat)
    attach(chat, branch)
    expected = chat.get_image_features(videos).pooler_output[0]
    branch.save_pretrained(tmp_path / "branch")
    again = attach(make_chat(), tmp_path / "branch")  # same seed: the same chat model
    assert torch.equal(again.get_image_features(videos).pooler_output[0], expected)
    branch.save_pretrained(tmp_path / "whole", include_tower=True)
    again = attach(make_chat(), tmp_path / "whole")
    assert torch.equal(again.get_image_features(videos).pooler_output[0], expected)


def test_gradients_reach_the_branch_through_the_language_model(chat, videos):
    attach(chat, make_branch(chat))
    chat.requires_grad_(False)
    chat.model.bt_adapter.requires_grad_(True)
    tokens = ids(PATCHES + 1, 2)
    chat(input_ids=tokens, pixel_values=videos, labels=tokens).loss.backward()
    assert chat.model.bt_adapter.temporal[0].fc.weight.grad.abs().sum() > 0
    assert chat.model.vision_tower.embeddings.patch_embedding.weight.grad is None


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"hidden_size": 48}, "hidden_size 48 against 32"),
        ({"num_hidden_layers": 5}, "num_hidden_layers 5 against 4"),
        ({"image_size": 32}, "image_size 32 against 24"),
        ({"patch_size": 4}, "patch_size 4 against 8"),
        ({"hidden_act": "gelu"}, "hidden_act gelu against quick_gelu"),
    ],
)
def test_branch_of_another_shape_is_refused(chat, vision, message):
    other = make_branch(make_chat(**vision))
    with pytest.raises(ValueError, match=message):
        attach(chat, other)


def test_branch_of_another_clip_is_refused(chat):
    other = make_branch(make_chat(seed=1))
    with pytest.raises(ValueError, match="another CLIP"):
        attach(chat, other)
    attach(chat, make_branch(chat).to(torch.float16))  # rounding is no other CLIP


def test_other_refusals(chat, tmp_path):
    with pytest.raises(TypeError, match="LlavaForConditionalGeneration"):
        attach(chat.model, make_branch(chat))
    with pytest.raises(TypeError, match="branch"):
        attach(chat, 3)
    with pytest.raises(ValueError, match="depth 1"):
        attach(chat, make_branch(chat, depth=1))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        attach(chat, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        attach(chat, tmp_path)
    with pytest.raises(ValueError, match="attach"), branch_enabled(chat, False):
        pass
    branch = make_branch(chat)
    chat.config.vision_feature_layer = -1
    chat.model.config.vision_feature_layer = -1
    with pytest.raises(ValueError, match=r"after layers \[4\] of 4"):
        attach(chat, branch)


def test_generation_with_a_branch_fresh_from_training_mode(chat, videos):
    """The branch takes the chat model's mode: no stochastic depth in an evaluating model."""
    branch = make_branch(chat).train()
    with torch.no_grad():
        branch.branch.temporal[0].fc.weight.normal_()
    attach(chat.eval(), branch)
    assert not branch.branch.training
    chat.train()
    assert branch.branch.training and not branch.tower.training


def test_what_video_tokens_never_reach_is_frozen(chat, videos):
    attach(chat, make_branch(chat))
    tokens = ids(PATCHES + 1, 2)
    chat(input_ids=tokens, pixel_values=videos, labels=tokens).loss.backward()
    branch = chat.model.bt_adapter
    asked = {n for n, p in branch.named_parameters() if p.requires_grad}
    assert asked and asked == {n for n, p in branch.named_parameters() if p.grad is not None}


def test_detach_gives_the_tower_its_gradients_back(chat):
    before = [p.requires_grad for p in chat.model.vision_tower.parameters()]
    assert all(before)
    attach(chat, make_branch(chat))
    attach(chat, make_branch(chat))
    assert not any(p.requires_grad for p in chat.model.vision_tower.parameters())
    detach(chat)
    assert [p.requires_grad for p in chat.model.vision_tower.parameters()] == before


def test_saved_branch_of_another_clip_is_refused(chat, tmp_path):
    make_branch(make_chat(seed=1)).save_pretrained(tmp_path)
    with torch.no_grad():
        chat.model.vision_tower.embeddings.class_embedding.mul_(2)
    with pytest.raises(ValueError, match="another CLIP"):
        attach(chat, tmp_path)
