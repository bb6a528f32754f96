"""A branch never reads rows of its time table that it was not trained on, unless it is told to by name."""

from __future__ import annotations

import json
from contextlib import nullcontext

import chat_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import EVA, PATCHES, SIZES, make, shake, video

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel, attach, load_reference_checkpoint
from bt_adapter import to_reference_state_dict as to_reference
from bt_adapter.chat.attach import video_tokens as chat_video_tokens
from bt_adapter.model.time_steps import TimeSteps, average_frames, plan_steps
from bt_adapter.model.video_tokens import video_tokens_streamed
from bt_adapter.model.walk import tower_states
from bt_kernels import VisibleTokens

TRAINED = 3
ROWS = 8


def trained(model: BTAdapterVisionModel, steps: int | None = TRAINED, rest: float | None = float("nan")):
    """A model trained with ``steps`` time steps; the rows of its time table after them hold ``rest``."""
    model.trained_steps = steps
    if steps is not None and rest is not None:
        model.branch.time.data[steps:] = rest
    return model


# --- from frames to time steps


@given(st.integers(1, 400), st.integers(1, 64), st.sampled_from(["average", "interpolate"]))
def test_steps_are_balanced_and_at_most_the_trained_ones(frames, steps, long):
    plan = plan_steps(BTAdapterConfig(trained_steps=steps), frames, long)
    sizes = [stop - start for start, stop in zip(plan.edges, plan.edges[1:], strict=False)]
    assert plan.steps == min(frames, steps * (2 if long == "interpolate" else 1)) and plan.rows == steps
    assert sum(sizes) == frames and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("frames", "steps"),
    [(1, 1), (64, 64), (65, 33), (100, 50), (128, 64), (129, 43)],
)
def test_published_steps(frames, steps):
    for config in (BTAdapterConfig(trained_steps=8), BTAdapterConfig()):
        assert plan_steps(config, frames, "published") == TimeSteps(frames, steps, 64)
    with pytest.warns(UserWarning, match="trained_steps is None") if steps > 8 else nullcontext():
        assert plan_steps(BTAdapterConfig(), frames) == TimeSteps(frames, steps, 64)


def test_hundred_frames_of_a_tuned_branch_are_averaged_in_twos():
    assert plan_steps(BTAdapterConfig(trained_steps=50), 100).edges == list(range(0, 101, 2))


@pytest.mark.parametrize(
    ("frames", "steps", "means"),
    [(4, 4, [0, 1, 2, 3]), (4, 2, [0.5, 2.5]), (5, 3, [0.5, 2.5, 4]), (5, 2, [1, 3.5]), (3, 1, [1])],
)
def test_average_frames(frames, steps, means):
    x = torch.arange(float(frames)).view(1, frames, 1, 1)
    assert average_frames(x, steps).flatten().tolist() == means
    assert average_frames(x, frames) is x


@pytest.mark.parametrize("steps", [0, 9, -1, 2.5, "8"])
def test_trained_steps_are_rows_of_the_table(steps):
    with pytest.raises(ValueError, match=r"trained_steps must be None or in \[1, 8\]"):
        make().trained_steps = steps


# --- what reads the table


LONG = [TRAINED + 1, 8, 9, 20]


@pytest.mark.parametrize("config", [SIZES, EVA], ids=["clip", "eva"])
@pytest.mark.parametrize("frames", LONG)
@pytest.mark.parametrize("long", ["average", "interpolate", "published"])
def test_untrained_rows_are_read_by_name_alone(config, frames, long):
    """They hold NaN: whatever reads them shows it."""
    gates = {} if config is SIZES else {"merge_gate_slope": None, "output_gate_slope": None}
    model = trained(shake(make(config, depth=3, **gates)))
    pixels = video(frames)
    features = model._embed(pixels).detach()
    found = [
        model.video_tokens(pixels, long=long),
        model.video_tokens(features=features, long=long),
        model(pixels, long=long).video_embeds,
        video_tokens_streamed(model, pixels[0].split(3), frames, long=long),
    ]
    for tensor in found:
        assert tensor.isfinite().all() == (long != "published")
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(found[3], found[0][:1], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", chat_models.FAMILIES)
def test_every_chat_model_reads_trained_rows_alone(name):
    chat = chat_models.make_chat(name)
    attach(chat, trained(chat_models.make_branch(chat)))
    pixels = chat_models.videos(1, 7)
    assert chat_video_tokens(chat, pixels).isfinite().all()
    assert chat_video_tokens(chat, pixels, long="interpolate").isfinite().all()
    assert chat_video_tokens(chat, pixels, long="published").isnan().any()


@pytest.mark.parametrize("frames", [1, TRAINED])
def test_up_to_the_trained_frames_nothing_changes(frames):
    known, unknown = trained(shake(make(depth=3))), shake(make(depth=3))
    pixels = video(frames)
    for long in ("average", "interpolate", "published"):
        assert torch.equal(known.video_tokens(pixels, long=long), unknown.video_tokens(pixels))
        assert torch.equal(known(pixels, long=long).video_embeds, unknown(pixels).video_embeds)


def test_averaged_video_tokens_formula():
    """9 frames in 4 steps of 3, 2, 2, 2: means of the tower's states go into the branch, the rest sees all frames."""
    model = trained(shake(make(depth=3)), 4)
    pixels = video(9)
    groups = [range(0, 3), range(3, 5), range(5, 7), range(7, 9)]
    visible = VisibleTokens.all(2, PATCHES, 4)
    with torch.no_grad():
        x, z = model._embed(pixels), None
        first = model.first_branch_layer
        states = tower_states(model.tower, x, first, first + 2)
        for layer, x in enumerate(states):
            seen = torch.stack([x[:, list(group)].mean(1) for group in groups], 1)
            if z is None:
                z = model.branch.embed(seen, model.tower.position, visible)
            else:
                z = model.branch.merge(seen, z, visible)
            z = model.branch.run_layer(layer, z, visible, None)
        rows = z[:, 1:].unflatten(1, (PATCHES, 4)).mean(2)
        expected = torch.cat([(x[:, :, 1:].mean(1) + rows) / 2, (x[:, :, 0].mean(1) + z[:, 0])[:, None] / 2], 1)
        torch.testing.assert_close(model.video_tokens(pixels), expected, rtol=1e-5, atol=1e-5)


def test_embeddings_average_the_branchs_input_and_keep_every_frames_cls():
    """Frames that stand three times each: the branch sees them as once, every frame's own CLS counts."""
    model = trained(shake(make()))
    short = video(TRAINED)
    long = short.repeat_interleave(3, 1)
    once, thrice = model(short), model(long)
    assert thrice.frame_embeds.shape[1] == 3 * TRAINED and thrice.visible.frames == TRAINED
    torch.testing.assert_close(thrice.branch_tokens, once.branch_tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thrice.frame_embeds, once.frame_embeds.repeat_interleave(3, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(thrice.video_embeds, once.video_embeds, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError):  # its tokens are not those of the tower any more
        model.token_alignment(thrice)


def test_reference_windows_read_the_table_as_stored():
    model = trained(shake(make(depth=3)))
    assert model.video_tokens(video(TRAINED - 1), windows="reference").isfinite().all()
    assert model.video_tokens(video(8), windows="reference").isnan().any()
    with pytest.raises(ValueError, match="long must be 'published'"):
        model.video_tokens(video(8), windows="reference", long="interpolate")


def test_tokens_that_a_caller_chose_stay_within_trained_steps():
    model = trained(shake(make()), rest=0.0)
    with pytest.raises(ValueError, match="tokens of 4 frames, but the branch was trained with 3 time steps"):
        model(video(4), VisibleTokens.tube(2, PATCHES, 4, 0.5))
    counts = torch.tensor([3, 2])
    ragged = VisibleTokens.random(2, PATCHES, 4, 0.5, frame_counts=counts)
    assert model(video(4), ragged).video_embeds.isfinite().all()
    with pytest.raises(ValueError, match="tokens of 4 frames"):
        model(video(6), VisibleTokens.random(2, PATCHES, 6, 0.5, frame_counts=torch.tensor([2, 4])))
    model.trained_steps = 4
    assert model(video(4), VisibleTokens.tube(2, PATCHES, 4, 0.5)).video_embeds.isfinite().all()


def test_a_wrong_name_is_told():
    for call in (make().video_tokens, make()):
        with pytest.raises(ValueError, match="long must be 'average', 'interpolate' or 'published'"):
            call(video(4), long="stretch")


def test_unknown_steps_are_told_where_many_are_read():
    model = shake(make(depth=3, max_frames=16))
    model.video_tokens(video(8))  # within what published pretraining had
    with pytest.warns(UserWarning, match="all 16 rows of its time table are taken as trained, and 9 are read"):
        model.video_tokens(video(9))


# --- what is stored


def test_a_saved_branch_knows_its_steps(tmp_path):
    model = trained(shake(make()), rest=None)
    model.save_pretrained(tmp_path, include_tower=True)
    assert BTAdapterVisionModel.from_pretrained(tmp_path).trained_steps == TRAINED


@pytest.mark.parametrize(("rows", "assumed"), [(64, 8), (4, 4)])
def test_an_older_folder_is_taken_to_be_pretrained_at_8_frames(tmp_path, rows, assumed):
    model = shake(make(max_frames=rows))
    model.save_pretrained(tmp_path, include_tower=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["branch"]["trained_steps"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=f"{tmp_path.name} does not say .* {assumed} are assumed"):
        again = BTAdapterVisionModel.from_pretrained(tmp_path)
    assert again.trained_steps == assumed


def test_an_older_folder_is_told_when_it_is_attached(tmp_path):
    chat = chat_models.make_chat("llava")
    chat_models.make_branch(chat).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["branch"]["trained_steps"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match="8 are assumed"):
        attach(chat, tmp_path)


def test_published_files_are_told_by_their_kind():
    state = to_reference(make(max_frames=64, alignment_head=False))
    pretraining = {f"backbone.{name}": tensor for name, tensor in state.items()}
    assert load_reference_checkpoint(pretraining, SIZES).trained_steps == 8
    for frames, steps in ((8, 8), (16, 16), (64, 64), (100, 50)):
        assert load_reference_checkpoint(state, SIZES, trained_frames=frames).trained_steps == steps
        assert load_reference_checkpoint(pretraining, SIZES, trained_frames=frames).trained_steps == steps
    with pytest.warns(UserWarning, match=r"all 64 rows .* trained_frames="):
        assert load_reference_checkpoint(state, SIZES).trained_steps is None
    assert load_reference_checkpoint(state, SIZES, trained_steps=5).trained_steps == 5
    with pytest.raises(ValueError, match="give one of them"):
        load_reference_checkpoint(state, SIZES, trained_steps=5, trained_frames=5)
    for wrong in (0, -8, 2.5, "8"):
        with pytest.raises(ValueError, match="trained_frames must be a positive int"):
            load_reference_checkpoint(state, SIZES, trained_frames=wrong)


def test_a_published_tuning_file_was_trained_at_100_frames():
    chat = chat_models.make_chat("llava")
    whole = chat_models.make_branch(chat, depth=4, alignment_head=False)
    tuned = {name: t for name, t in to_reference(whole).items() if "btadapter" in name and "layers.3." not in name}
    assert load_reference_checkpoint(tuned, clip=chat.model.vision_tower).trained_steps == 50
