"""The small stack, trained at 8 frames, is as right about longer videos as about those of 8 frames."""

from __future__ import annotations

import long_videos
import pytest
import torch
from test_chat import mini_is_there

from bt_adapter.chat.engine import VideoChat
from bt_adapter.eval.stack import load_stack

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))]
ASKED, FOUND = 2, 4  # clips of each of eight events that are asked about, and that are to be found
longer = pytest.mark.parametrize("longer", [(32,), pytest.param((16, 64, 128), marks=pytest.mark.full)], ids=str)


def is_worse(hits: torch.Tensor, than: torch.Tensor) -> bool:
    return bool(hits.sum() < than.sum()) and long_videos.sign_test(than, hits)["p"] < 0.05


@longer
def test_answers_about_longer_videos(longer):
    """Four sets of tokens a video, of which none was in tuning, lose most answers, so that the comparison can fail."""
    chat = VideoChat.mini()
    told = {}
    for frames in (8, *longer):
        told[frames] = long_videos.answered(chat, *long_videos.held_out(frames, ASKED))
        assert not is_worse(told[frames], told[8]), frames
    assert told[8].sum() >= 14
    assert is_worse(long_videos.answered(chat, *long_videos.held_out(32, ASKED), windows=4), told[8])


@longer
def test_retrieval_of_longer_videos(longer):
    """Rows of the time table that were never trained, as the published procedure reads them, lose most clips."""
    stack = load_stack("mini", None)
    assert stack.model.trained_steps == 8
    found = {}
    for frames in (8, *longer):
        found[frames] = long_videos.retrieved(stack, *long_videos.held_out(frames, FOUND))
        assert not is_worse(found[frames], found[8]), frames
    assert found[8].sum() >= 16
    assert is_worse(long_videos.retrieved(stack, *long_videos.held_out(32, FOUND), "published"), found[8])


def test_the_same_clips_are_composed_at_every_number_of_frames():
    short, labels = long_videos.held_out(8, 1)
    long, same = long_videos.held_out(15, 1)
    assert torch.equal(labels, same)
    assert torch.equal(short[:, [0, 7]], long[:, [0, 14]])
    torch.testing.assert_close(short, long[:, ::2], rtol=0, atol=1)
