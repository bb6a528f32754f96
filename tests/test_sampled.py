"""A tuned folder and a pretrained branch say how they were sampled, which chat, answer and eval qa then do too."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pretraining
import pytest
import tuning
from test_chat import mini_is_there

from bt_adapter.chat.answer import about
from bt_adapter.chat.sampled import settle_sampling
from bt_adapter.chat.session import sampling_of
from bt_adapter.chat.settings import Answer, Chat
from bt_adapter.chat.watch import Sampling
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.run import pretrain
from bt_adapter.qa.settings import Qa
from bt_adapter.tune.run import tune


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    data = tuning.write_data(folder / "clips", 4)
    wanted = tuning.recipe(data=str(data), out=folder / "run", steps=1, frames=6, learn=("projector",), device="cpu")
    return tune(wanted, tuning.make_video_chat())


def chat(model, **options) -> Chat:
    return Chat(model=str(model), device="cpu", **options)


def test_a_tuned_folder_is_asked_as_it_was_tuned(tuned):
    assert json.loads((tuned / "tuned.json").read_text())["sampling"] == {
        "frames": 6, "repeat": True, "windows": 1, "long": "average",
    }  # fmt: skip
    for command in (
        chat(tuned),
        Answer(model=str(tuned), questions=Path("q"), videos=Path("v")),
        Qa(model=str(tuned), data=Path("d"), videos=Path("v")),
    ):
        assert sampling_of(command) == Sampling(6, None, True, 1, "average", True)
    _, notes = settle_sampling(chat(tuned))
    assert notes == [f"videos are sampled as {tuned} was trained: frames 6, repeat True, windows 1"]
    made = about(Answer(model=str(tuned), questions=Path("q"), videos=Path("v"), device="cpu"))
    assert (made["frames"], made["repeat"], made["windows"]) == (6, True, 1)


@pytest.mark.parametrize(
    ("options", "sampling", "noted"),
    [
        ({"frames": 6}, Sampling(6, None, True, 1), None),
        ({"frames": 8}, Sampling(8, None, True, None), "--frames 8 is another choice than .* was trained with: 6"),
        ({"fps": 1.0}, Sampling(6, 1.0, True, None), "--fps 1 is another choice than the 6 frames of"),
        ({"no_repeat": True}, Sampling(6, None, False, 1), "--repeat False is another choice"),
        ({"windows": 3}, Sampling(6, None, True, 3), "--windows 3 is another choice"),
        ({"long": "interpolate"}, Sampling(6, None, True, 1, "interpolate"), "--long interpolate is another choice"),
        ({"repeat": True, "windows": 1, "long": "average"}, Sampling(6, None, True, 1), None),
    ],
)
def test_what_is_given_goes_before_with_a_note(tuned, options, sampling, noted):
    command = chat(tuned, **options)
    assert sampling_of(command) == sampling
    notes = [note for note in settle_sampling(command)[1] if "another choice" in note]
    assert len(notes) == (noted is not None)
    assert noted is None or re.search(noted, notes[0])


def test_repeat_and_no_repeat_contradict(tuned):
    with pytest.raises(CommandError, match="--repeat and --no-repeat were both given"):
        sampling_of(chat(tuned, repeat=True, no_repeat=True))


def test_without_a_record_the_usual_holds(tmp_path, tuned):
    usual = {"frames": 8, "repeat": False, "windows": None, "long": "average", "branch": True}
    assert settle_sampling(chat("some/llava")) == (usual, [])
    (tmp_path / "tuned.json").write_text("{")
    assert sampling_of(chat(tmp_path)) == Sampling()
    old = json.loads((tuned / "tuned.json").read_text())
    del old["sampling"]
    (tmp_path / "tuned.json").write_text(json.dumps(old))
    assert sampling_of(chat(tmp_path)) == Sampling(6, None, True)


@pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))
def test_a_pretrained_branch_says_it_too(tmp_path, tuned):
    data = pretraining.write_clips(tmp_path / "clips", 4)
    wanted = pretraining.recipe(data=str(data), out=tmp_path / "run", steps=1, frames=5, ema=0.9)
    branch = pretrain(wanted)
    for folder in (branch, tmp_path / "run/ema", tmp_path / "run/checkpoints/00000001/branch"):
        found = json.loads((folder / "pretrained.json").read_text())
        assert found["sampling"] == {"frames": 5, "repeat": True} and found["recipe"]["frames"] == 5
        assert found["dtype"] == "float32" and found["dtype_chosen"] == "as asked for"
        assert sampling_of(chat("some/llava", branch=str(folder))) == Sampling(5, None, True)
    both = chat(tuned, branch=str(branch))
    assert sampling_of(both).frames == 6  # what came last counts
    assert sampling_of(replace(both, frames=7)).frames == 7
