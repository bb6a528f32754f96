"""Video chat models as Hugging Face models: saved, loaded by name, batched, generated from, trained."""

import pytest
import torch
from chat_models import FAMILIES, IMAGE_TOKEN, WIDTH, ids, make_branch, make_chat, question, stills, videos
from transformers import AutoModelForImageTextToText

from bt_adapter.chat.families import family_of
from bt_adapter.native import NATIVE_CLASSES

VIDEO_TOKEN = 70  # beyond the 64 rows of the table of embeddings
QFORMERS = ("blip-2", "instructblip")


def make_native(name: str, seed: int = 0, **fields):
    """A video chat model of random weights, and the image chat model of the very same ones."""
    chat = make_chat(name, seed)
    branch = make_branch(chat, alignment_head=False)
    values = chat.config.to_dict()
    values = {key: value for key, value in values.items() if key not in ("model_type", "architectures")}
    about = {"branch": branch.config.to_dict(), "layers": len(branch.branch.temporal)}
    native_class = NATIVE_CLASSES[name]
    config = native_class.config_class(**values, bt_adapter=about, video_token_index=VIDEO_TOKEN, **fields)
    model = native_class(config).eval()
    family_of(model).home.bt_adapter.load_state_dict(branch.branch.state_dict())
    found = model.load_state_dict(chat.state_dict(), strict=False)
    assert not found.unexpected_keys and all("bt_adapter" in key for key in found.missing_keys)
    return model, chat


def prompts(model, batch: int = 1, count: int = 1) -> torch.Tensor:
    """Prompts about so many videos each."""
    tokens = ids(*[family_of(model).video_length] * count, batch=batch)
    return tokens.masked_fill(tokens == IMAGE_TOKEN, VIDEO_TOKEN)


def generated(model, tokens, rows: int | None = None, **inputs) -> torch.Tensor:
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None} | inputs
    return model.generate(
        input_ids=tokens, attention_mask=(tokens != 62).long(), **options, **question(model, rows or len(tokens))
    )


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@torch.no_grad()
def test_stills_are_answered_bit_for_bit_as_by_the_image_model(name):
    model, chat = make_native(name)
    inputs, length = stills(name)
    tokens = ids(length, batch=2)
    asked = question(chat, 2)
    expected = chat(input_ids=tokens, **inputs, **asked).logits
    assert torch.equal(model(input_ids=tokens, **inputs, **asked).logits, expected)
    assert torch.equal(generated(model, tokens, **inputs), generated(chat, tokens, **inputs))


@torch.no_grad()
def test_a_video_is_spliced_where_its_token_stands(name):
    model, _ = make_native(name)
    pixels, tokens, asked = videos(), prompts(model, 2), question(model, 2)
    features = model.get_video_features(pixels, **asked).pooler_output
    assert [list(rows.shape) for rows in features] == [[family_of(model).video_length, WIDTH]] * 2
    embeds = model.get_input_embeddings()(tokens.clamp(max=63))
    embeds[tokens == VIDEO_TOKEN] = torch.cat(features)
    expected = family_of(model).lm_head(family_of(model).language_model(inputs_embeds=embeds).last_hidden_state)
    found = model(input_ids=tokens, pixel_values_videos=pixels, **asked).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_saved_and_loaded_by_the_auto_class_it_answers_token_for_token(name, tmp_path):
    model, _ = make_native(name)
    tokens, pixels = prompts(model, 2), videos()
    expected = generated(model, tokens, pixel_values_videos=pixels)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is type(model) and not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert torch.equal(generated(again, tokens, pixel_values_videos=pixels), expected)
    half = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="cpu")
    assert family_of(half).home.bt_adapter.time.dtype == torch.bfloat16
    generated(half, tokens, pixel_values_videos=pixels.bfloat16())


def test_a_batch_is_answered_as_its_rows_alone(name):
    """Two videos of different length, a still, a prompt with both, and text alone, padded on the left."""
    model, _ = make_native(name)
    inputs, still = stills(name, 2)
    long, short = videos(1, 5)[0], videos(1, 2, seed=3)[0]
    length = family_of(model).video_length
    both = ids(length, still)
    both[0, 2 : 2 + length] = VIDEO_TOKEN
    rows = [prompts(model), ids(still), ids(), both, prompts(model)]
    own = [[long], [], [], [short], [short]]
    pictures = [[], [0], [], [1], []]

    def arguments(which):
        clips = [clip for row in which for clip in own[row]]
        places = [place for row in which for place in pictures[row]]
        chosen = {key: value[places] for key, value in inputs.items()} if places else {}
        most = max((len(clip) for clip in clips), default=0)
        if not clips:
            return chosen
        padded = torch.stack([torch.cat([c, torch.full((most - len(c), *c.shape[1:]), 9.0)]) for c in clips])
        counts = torch.tensor([len(clip) for clip in clips])
        return chosen | {"pixel_values_videos": padded, "video_frame_counts": counts}

    most = max(row.shape[1] for row in rows)
    tokens = torch.cat([torch.nn.functional.pad(row, (most - row.shape[1], 0), value=62) for row in rows])
    found = generated(model, tokens, **arguments(range(5)))
    for number, row in enumerate(rows):
        alone = generated(model, row, **arguments([number]))
        assert torch.equal(found[number, -4:], alone[0, -4:]), f"row {number}"


def test_beams_samples_and_several_sequences_of_prompts_with_two_videos(name):
    """transformers repeats rows of pixel_values for beams, which are not rows of prompts where these have two."""
    model, _ = make_native(name)
    tokens, pixels = prompts(model, 2, count=2), videos(4)
    beams = generated(model, tokens, 4, pixel_values_videos=pixels, num_beams=3, num_return_sequences=2)
    assert len(beams) == 4
    for row in range(2):
        alone = generated(
            model, tokens[row : row + 1], 2, pixel_values_videos=pixels[2 * row : 2 * row + 2], num_beams=3,
            num_return_sequences=2,
        )  # fmt: skip
        assert torch.equal(beams[2 * row : 2 * row + 2], alone)
    torch.manual_seed(0)
    drawn = generated(model, tokens, 4, pixel_values_videos=pixels, do_sample=True, num_return_sequences=3)
    assert len(drawn) == 6 and torch.equal(drawn[:3, : tokens.shape[1]], tokens[:1].expand(3, -1))


def test_static_cache_and_repetition_penalty_take_videos(name):
    model, _ = make_native(name)
    tokens, pixels = prompts(model, 2), videos()
    expected = generated(model, tokens, pixel_values_videos=pixels)
    if name != "blip-2":  # OPT has no static cache
        options = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(generated(model, tokens, pixel_values_videos=pixels, **options), expected)
    # the video's token is no word of the vocabulary: scores are not read by it
    generated(model, tokens, pixel_values_videos=pixels, repetition_penalty=1.3)


@torch.no_grad()
def test_branch_is_switched_per_call_and_by_configuration(name, tmp_path):
    model, _ = make_native(name)
    tokens, pixels, asked = prompts(model, 2), videos(), question(model, 2)

    def logits(chat, **options):
        return chat(input_ids=tokens, pixel_values_videos=pixels, **asked, **options).logits

    on, off = logits(model), logits(model, use_branch=False)
    assert not torch.equal(on, off)
    backwards = model(input_ids=tokens, pixel_values_videos=pixels.flip(1), use_branch=False, **asked).logits
    torch.testing.assert_close(off, backwards, rtol=1e-4, atol=1e-5)  # the mean of frames knows no order
    model.config.use_branch = False
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), off)
    torch.testing.assert_close(logits(again, use_branch=True), on)
    assert not torch.allclose(on, off)


def test_gradients_reach_the_branch_and_the_loss_leaves_placeholders_out(name):
    model, _ = make_native(name)
    model.requires_grad_(True)
    tokens, asked = prompts(model, 2), question(model, 2)
    loss = model(input_ids=tokens, pixel_values_videos=videos(), labels=tokens, **asked).loss
    masked = tokens.masked_fill(tokens == VIDEO_TOKEN, -100)
    assert torch.equal(loss, model(input_ids=tokens, pixel_values_videos=videos(), labels=masked, **asked).loss)
    loss.backward()
    branch = family_of(model).home.bt_adapter
    assert branch.temporal[0].fc.weight.grad.abs().sum() > 0


def test_places_that_do_not_fit_are_counted(name):
    model, _ = make_native(name)
    tokens = prompts(model, 1)
    length = family_of(model).video_length
    with pytest.raises(ValueError, match=f"have {length} video tokens, but the 2 videos take {2 * length}"):
        model(input_ids=tokens, pixel_values_videos=videos(2), **question(model, 2))
    with pytest.raises(ValueError, match=f"have {length} video tokens, but pixel_values_videos is None"):
        generated(model, tokens)
    with pytest.raises(ValueError, match="input_ids must be given"):
        model(inputs_embeds=torch.zeros(1, 4, WIDTH), pixel_values_videos=videos(1), **question(model, 1))
    with pytest.raises(ValueError, match=r"pixel_values_videos\[0\] must be frames"):
        model(input_ids=tokens, pixel_values_videos=videos(1)[0], **question(model, 1))
    with pytest.raises(ValueError, match=r"video_frame_counts\[0\] must lie in 1..4, but is 5"):
        counts = torch.tensor([5])
        model(input_ids=tokens, pixel_values_videos=videos(1), video_frame_counts=counts, **question(model, 1))


def test_a_configuration_without_a_branch_is_refused(name):
    config_class = NATIVE_CLASSES[name].config_class
    with pytest.raises(ValueError, match="bt_adapter must be given"):
        config_class().branch_config()
    with pytest.raises(ValueError, match="bt_adapter must be a dict"):
        config_class(bt_adapter={"deep": 4})
    with pytest.raises(ValueError, match="depth must be a positive int"):
        config_class(bt_adapter={"branch": {"depth": 0}})
