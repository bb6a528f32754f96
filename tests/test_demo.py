"""``bt-adapter demo``: the clips that come with it, the stored results, and the whole of it."""

from __future__ import annotations

import json

import pytest
from test_chat import mini_is_there

from bt_adapter import mini
from bt_adapter.chat.engine import read
from bt_adapter.commands import cli, demo
from bt_adapter.errors import CommandError

needs_mini = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


def test_the_demo_takes_as_many_clips_as_there_are(tmp_path, capsys):
    clips = demo.read_clips(mini.data_folder() / "clips", 9)
    for clip in clips:
        assert (
            clip.path.stat().st_size < 12_000 and clip.question and read(clip.path, 8).frames.shape[1:] == (3, 192, 192)
        )
    demo.copy_clips(clips[:2], tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [clip.path.name for clip in clips[:2]]
    with pytest.raises(CommandError, match="--clips is 10, but 9 clips"):
        demo.read_clips(mini.data_folder() / "clips", 10)
    assert cli.main(["demo", "--clips", "0"]) == 2


def test_the_demo_prints_stored_results(tmp_path, capsys):
    console = demo.make_console()
    demo.show_results(tmp_path / "results.json", console)
    assert "no stored results" in capsys.readouterr().out
    headline = {"columns": ["", "motion"], "rows": [["untuned", "0.50"], ["tuned", "0.98"]], "notes": ["Three seeds."]}
    (tmp_path / "results.json").write_text(json.dumps({"headline": headline}))
    demo.show_results(tmp_path / "results.json", console)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("motion", "untuned", "0.98", "Three seeds."))


@needs_mini
def test_the_demo_as_a_whole(tmp_path, capsys):
    assert cli.main(["demo", "--clips", "2", "--keep", str(tmp_path / "kept")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "branch off" in shown and "moving" in shown and "peak memory" in shown and "held-out clips" in shown
    assert len(list((tmp_path / "kept").iterdir())) == 2
