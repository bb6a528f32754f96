"""Pretraining at a number of frames drawn anew for each step, and what both trainings record of their time steps."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from pretraining import losses, recipe, write_clips
from test_chat import mini_is_there
from tuning import make_video_chat, write_data
from tuning import recipe as tuning_recipe

from bt_adapter.chat.attach import attached_branch
from bt_adapter.commands import cli
from bt_adapter.data.loading import SyntheticClips
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.frames import FrameRange
from bt_adapter.pretrain.recipe import Recipe, from_yaml
from bt_adapter.pretrain.run import pretrain
from bt_adapter.pretrain.step import Pretraining, draw_visible
from bt_adapter.tune.run import tune

needs_mini = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


def test_a_range_is_drawn_from_seed_and_step_alone():
    drawn = [FrameRange.of("8..16").draw(3, step) for step in range(400)]
    assert set(drawn) == set(range(8, 17)) and drawn == [FrameRange(8, 16).draw(3, step) for step in range(400)]
    assert drawn != [FrameRange(8, 16).draw(4, step) for step in range(400)]
    for count in range(8, 17):  # each of the nine about as often
        assert 20 <= drawn.count(count) <= 75
    assert {FrameRange.of(8).draw(0, step) for step in range(20)} == {8} == {FrameRange.of("8").least}


@pytest.mark.parametrize("frames", [0, -4, "0..8", "16..8", "8-16", "8..", "..8", "8.5", "", "8...16", "a..b", True])
def test_what_is_no_range_is_told(frames):
    with pytest.raises(CommandError, match="--frames must be"):
        recipe(data="synthetic", steps=1, frames=frames).check(1)


def test_a_range_fits_into_the_time_table():
    with pytest.raises(CommandError, match="--frames must be at most --max-frames 8, got 4..9"):
        recipe(data="synthetic", steps=1, frames="4..9").check(1)
    recipe(data="synthetic", steps=1, frames="4..8").check(1)


def test_a_range_is_written_on_the_command_line_and_in_a_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(cli.RUN, Recipe, type("Run", (), {"run": staticmethod(lambda r: seen.append(r) or 0)}))
    assert cli.main(["pretrain", "--data", "synthetic", "--steps", "1", "--frames", "8..16"]) == 0
    assert cli.main(["pretrain", "--data", "synthetic", "--steps", "1", "--frames", "12"]) == 0
    assert [r.frame_range for r in seen] == [FrameRange(8, 16), FrameRange(12, 12)] and seen[1].frames == 12
    for written, frames in (("8..16", "8..16"), ("12", 12)):
        (tmp_path / "run.yaml").write_text(f"frames: {written}\n")
        assert from_yaml(tmp_path / "run.yaml", Recipe()).frames == frames


def test_all_processes_show_the_same_number_of_frames():
    wanted = recipe(data="synthetic", steps=9, frames="2..8", batch_size=4)
    for step in range(1, 10):
        seen = [draw_visible(wanted, 36, step, rank, 2, torch.device("cpu")).frames for rank in range(2)]
        assert seen == [wanted.frames_of(step - 1)] * 2


def test_noise_of_one_number_of_frames_is_as_it_was():
    ranged = SyntheticClips(4, 16, 0, Recipe(frames=4).frames_of).draw(2, 1, 4).frames
    assert torch.equal(ranged, SyntheticClips(4, 16, 0).draw(2, 1, 4).frames)


@needs_mini
def test_a_run_over_a_range_goes_on_where_it_stopped_and_records_its_end(tmp_path, monkeypatch):
    manifest = write_clips(tmp_path / "clips", 8)
    forward, seen = Pretraining.forward, []

    def watched(self, frames, visible, align=True):
        seen.append(frames.shape[1])
        assert visible.frames == frames.shape[1]
        return forward(self, frames, visible, align)

    monkeypatch.setattr(Pretraining, "forward", watched)
    whole = recipe(data=str(manifest), frames="2..5", steps=4, seed=1, out=tmp_path / "whole", save_steps=2)
    folder = pretrain(whole)
    assert seen == [whole.frames_of(step) for step in range(4)] and len(set(seen)) > 1
    assert json.loads((folder / "config.json").read_text())["branch"]["trained_steps"] == 5
    state = tmp_path / "whole" / "checkpoints"
    for later in sorted(path for path in state.iterdir() if path.is_dir())[1:]:
        for path in sorted(later.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        later.rmdir()
    before = losses(tmp_path / "whole")
    seen.clear()
    pretrain(whole)
    assert seen == [whole.frames_of(step) for step in (2, 3)]
    assert losses(tmp_path / "whole")[-2:] == before[-2:]


@pytest.mark.parametrize(("long", "steps"), [("average", 3), ("interpolate", 3), ("published", 4)])
def test_tuning_records_the_rows_it_trained(tmp_path, long, steps):
    """A branch trained with 3 steps, tuned at 4 frames: the rows after the recorded ones have not moved."""
    chat = make_video_chat()
    model = attached_branch(chat.model)
    model.trained_steps = 3
    before = model.branch.time.detach().clone()
    wanted = tuning_recipe(
        data=str(write_data(tmp_path / "clips", 2)), out=tmp_path / "out", steps=1, batch_size=2, long=long
    )
    folder = tune(replace(wanted, learn=("branch",)), chat)
    assert json.loads((folder / "branch/config.json").read_text())["branch"]["trained_steps"] == steps
    moved = (model.branch.time != before).any(1)
    assert moved[:steps].all() and not moved[steps:].any()
