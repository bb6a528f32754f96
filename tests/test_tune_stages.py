"""Stages of tuning: on stills without a branch, then on clips with one, and a control whose branch never runs."""

from __future__ import annotations

import json

import pytest
import torch
from test_whole_model import QUESTION, write_stand
from tuning import recipe, write_still

from bt_adapter.chat.attach import attach, attached_branch, video_tokens
from bt_adapter.chat.engine import VideoChat, read
from bt_adapter.commands import cli
from bt_adapter.errors import CommandError
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.run import tune


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """An image chat model, a branch, questions about stills (stills/) and about clips (clips/)."""
    folder = write_stand(tmp_path_factory.mktemp("stand"), "llava")
    (folder / "stills").mkdir()
    rows = []
    for number in range(4):
        write_still(folder / f"stills/{number}.png")
        said = [("human", "<image> what colour ?"), ("gpt", ("red .", "blue .")[number % 2])]
        row = {"image": f"{number}.png", "conversations": [{"from": who, "value": text} for who, text in said]}
        rows.append(json.dumps(row))
    (folder / "stills/stills.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def image(stand):
    """The stage of stills: no branch is named anywhere."""
    return tune(asked(stand, "image", "stills/stills.jsonl", branch=None, learn=("projector", "lora")))


def asked(stand, out, data, **changes):
    options = {"model": str(stand / "chat"), "branch": str(stand / "branch"), "learn": ("projector", "branch", "lora")}
    return recipe(data=str(stand / data), out=stand / out, steps=3, lr=0.02, batch_size=2, **{**options, **changes})


def tokens_of(chat, stand, branch=None):
    return chat.encode(read(stand / "clips/clip0.mp4", 4, repeat=True), branch)


def test_a_stage_of_stills_needs_no_branch_and_is_a_base_for_clips(stand, image):
    about = json.loads((image / "tuned.json").read_text())
    assert about["parts"] == ["projector", "lora"] and about["branch"] == {"source": None, "fingerprint": None}
    assert not (stand / "image/model").exists()
    with pytest.raises(ValueError, match="needs a branch.*--no-branch"):
        VideoChat.load(image)
    plain = VideoChat.load(image, use_branch=False)
    with pytest.raises(ValueError, match="this chat model has no branch"):
        tokens_of(plain, stand, branch=True)
    with pytest.raises(ValueError, match="no branch to save"):
        plain.save(stand / "never")

    untuned = VideoChat.load(image, stand / "branch")
    assert torch.equal(tokens_of(untuned, stand, branch=False), tokens_of(plain, stand))
    assert not torch.allclose(tokens_of(untuned, stand), tokens_of(plain, stand))

    tuned = tune(asked(stand, "tuned", "clips/data.json", model=str(image)))
    chat, base = VideoChat.load(tuned), VideoChat.load(image, stand / "branch")
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    first = VideoChat.load(stand / "chat", stand / "branch").model.get_parameter(weight)
    moved = [(one.get_parameter(weight) - first).norm().item() for one in (base.model, chat.model)]
    assert moved[0] > 0 and moved[1] > 0 and moved[0] != pytest.approx(moved[1], rel=1e-3), "adapters of both are in"
    assert attached_branch(chat.model).branch.is_absent is False


def test_the_control_reads_the_mean_of_the_frames_in_tuning_and_after_it(stand, image):
    control = asked(stand, "control", "clips/data.json", model=str(image), branch=None, use_branch=False,
                    learn=("projector", "lora"))  # fmt: skip
    tuned = tune(control)
    chat = VideoChat.load(tuned)
    assert attached_branch(chat.model).branch.is_absent and not chat.model.config.use_branch
    assert tokens_of(chat, stand).shape == tokens_of(chat, stand, branch=False).shape
    options = ["chat", "--model", str(tuned), "--video", str(stand / "clips/clip0.mp4"), QUESTION, "--dtype", "float32"]
    assert cli.main(options) == 0


def test_a_control_beside_a_branch_never_runs_it(stand, monkeypatch):
    from bt_adapter.model.adapter import BTAdapterVisionModel

    monkeypatch.setattr(BTAdapterVisionModel, "video_tokens", lambda *args, **options: pytest.fail("the branch ran"))
    changes = {"use_branch": False, "learn": ("projector",)}
    tuned = tune(asked(stand, "beside", "clips/data.json", **changes))
    chat = VideoChat.load(tuned)
    assert torch.equal(tokens_of(chat, stand), tokens_of(chat, stand, branch=False))
    assert json.loads((stand / "beside/model/config.json").read_text())["use_branch"] is False
    assert torch.equal(tokens_of(VideoChat.load(stand / "beside/model"), stand), tokens_of(chat, stand))


def test_what_cannot_be_is_refused(stand):
    with pytest.raises(CommandError, match="--no-use-branch: a branch that does not run cannot learn"):
        TuneRecipe(data="x", use_branch=False).check(1)
    with pytest.raises(CommandError, match="--features holds what the branch reads"):
        TuneRecipe(data="x", use_branch=False, learn=("projector",), features=stand).check(1)
    with pytest.raises(CommandError, match="needs a branch"):  # clips are in the data
        tune(asked(stand, "no", "clips/data.json", branch=None, learn=("projector",)))


def test_attach_takes_none_for_the_mean_of_the_frames(stand):
    from transformers import AutoModelForImageTextToText

    model = attach(AutoModelForImageTextToText.from_pretrained(stand / "chat"), None)
    side = model.config.vision_config.image_size
    pixels = torch.randn(1, 3, 3, side, side)
    wanted = attached_branch(model).frame_mean_tokens(pixels)
    assert torch.equal(video_tokens(model, pixels), wanted)
    with pytest.raises(ValueError, match="this chat model has no branch"):
        video_tokens(model, pixels, branch=True)


def test_going_on_from_a_control_needs_a_branch_or_goes_on_without(stand, image):
    off = {"branch": None, "use_branch": False, "learn": ("projector", "lora")}
    control = tune(asked(stand, "control-first", "clips/data.json", model=str(image), **off))
    with pytest.raises(CommandError, match="tuned without a branch: give --branch FOLDER, or --no-use-branch"):
        tune(asked(stand, "control-no", "clips/data.json", model=str(control), branch=None, learn=("projector",)))
    again = tune(asked(stand, "control-again", "clips/data.json", model=str(control), **off))
    assert attached_branch(VideoChat.load(again).model).branch.is_absent
    onward = tune(asked(stand, "control-onward", "clips/data.json", model=str(control)))
    chat = VideoChat.load(onward)
    assert not torch.equal(tokens_of(chat, stand), tokens_of(chat, stand, branch=False))


def test_a_branch_that_is_named_takes_the_place_of_the_tuned_one(stand):
    tuned = tune(asked(stand, "replaced", "clips/data.json", learn=("branch",)))
    time = [attached_branch(VideoChat.load(*given).model).branch.time for given in (
        (tuned,), (tuned, stand / "branch"), (stand / "chat", stand / "branch"))]  # fmt: skip
    assert torch.equal(time[1], time[2]) and not torch.equal(time[0], time[2])
