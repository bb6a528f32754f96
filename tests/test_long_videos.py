"""The mini stack, trained at 8 frames, is as right about longer videos as about those of 8 frames."""

from __future__ import annotations

import long_videos
import pytest
import torch
from test_chat import mini_is_there

from bt_adapter.mini.retrieval import mcnemar

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))]
ASKED, FOUND = 2, 4  # clips of each of nine motions that are asked about, and that are to be found
longer = pytest.mark.parametrize("longer", [(32,), pytest.param((16, 64, 128), marks=pytest.mark.full)], ids=str)


@pytest.fixture(scope="module")
def stack():
    from bt_adapter.mini.answers import load_system

    chat, prompts, _ = load_system("tuned")
    return chat, prompts


@longer
def test_answers_about_longer_videos(stack, longer):
    """Untrained rows lose most answers, so that the comparison can fail."""
    told = {}
    for frames in (8, *longer):
        shown, labels = long_videos.held_out(frames, ASKED)
        told[frames] = long_videos.answered(*stack, shown, labels)
        assert told[frames].sum() >= told[8].sum() or mcnemar(told[8], told[frames]) > 0.05, frames
    assert told[8].sum() >= 16
    shown, labels = long_videos.held_out(32, ASKED)
    published = long_videos.answered(*stack, shown, labels, "published")
    assert published.sum() < told[8].sum() and mcnemar(told[8], published) < 0.05


@longer
def test_retrieval_of_longer_videos(longer):
    from bt_adapter.mini.pretrain import load_branch_model

    model, texts = load_branch_model("pretrained"), long_videos.captions()
    assert model.trained_steps == 8
    found = {}
    for frames in (8, *longer):
        shown, labels = long_videos.held_out(frames, FOUND)
        found[frames] = long_videos.retrieved(model, texts, shown, labels)
        assert found[frames].sum() >= found[8].sum() or mcnemar(found[8], found[frames]) > 0.05, frames
    assert found[8].sum() >= 27
    shown, labels = long_videos.held_out(32, FOUND)
    published = long_videos.retrieved(model, texts, shown, labels, "published")
    assert published.sum() < found[8].sum() and mcnemar(found[8], published) < 0.05


def test_the_same_clips_are_composed_at_every_number_of_frames():
    short, labels = long_videos.held_out(8, 1)
    long, same = long_videos.held_out(15, 1)
    assert torch.equal(labels, same)
    assert torch.equal(short[:, [0, 7]], long[:, [0, 14]])
    torch.testing.assert_close(short, long[:, ::2], rtol=0, atol=1)
