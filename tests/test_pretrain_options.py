"""Groups of clips that stay together, and rates and sizes of their own, in pretraining."""

from __future__ import annotations

import pytest
import torch
from pretraining import recipe, write_clips
from test_chat import mini_is_there

from bt_adapter import BTAdapterVisionModel
from bt_adapter.data.loading import TrainingClips, batches, shuffled
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.transforms import TrainTransform
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.pretrain.run import pretrain, start_model
from bt_adapter.text import load_clip

needs_mini = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    manifest = write_clips(tmp_path_factory.mktemp("clips"), 14)
    return read_clips(str(manifest), None)[0], manifest


def drawn(clips, group, batch, steps, seed=0):
    """The places in the list of each batch's clips."""
    data = TrainingClips(clips, 2, TrainTransform(48), seed, group)
    places = {clip.path: number for number, clip in enumerate(clips)}
    found = []
    read = data._read

    def remember(number, frames, seed):
        found.append(places[data._packed[number].path])
        return read(number, frames, seed)

    data._read = remember
    for _ in batches(data, batch, 0, 1, 0, steps, 0):
        pass
    return [found[start : start + batch] for start in range(0, len(found), batch)]


def test_clips_of_a_group_come_side_by_side_in_another_order_each_epoch(listed):
    clips, _ = listed
    rows = drawn(clips, 3, 6, 4)
    for row in rows:
        for start in (0, 3):
            first = row[start]
            assert first % 3 == 0 and row[start : start + 3] == [first, first + 1, first + 2]
    epochs = [sorted(rows[0] + rows[1]), sorted(rows[2] + rows[3])]
    assert epochs[0] == epochs[1] == list(range(12)), "each once an epoch; the last two are no whole group"
    assert rows[0] + rows[1] != rows[2] + rows[3]


def test_without_groups_the_order_is_as_it_was(listed):
    clips, _ = listed
    assert drawn(clips, 1, 7, 2)[1] == [shuffled(place, 14, 0, 0) for place in range(7, 14)]


@needs_mini
def test_groups_that_cannot_be_are_refused(listed, tmp_path):
    with pytest.raises(CommandError, match="--batch must be a multiple of processes times --accumulate times --group"):
        Recipe(data="x", batch=8, group=3).check(1)
    with pytest.raises(CommandError, match="--batch must be a multiple"):
        Recipe(data="x", batch=12, group=4, accumulate=2).check(1)
    manifest = write_clips(tmp_path / "clips", 12)
    manifest.write_text(manifest.read_text() + '{"video": "gone.mp4", "caption": "a thing"}\n')
    with pytest.raises(CommandError, match=r"--group 2 needs every listed clip(.|\n)*gone.mp4"):
        pretrain(recipe(data=str(manifest), out=tmp_path / "out", steps=1, group=2))


@needs_mini
def test_a_run_of_another_group_is_another_run_and_one_of_before_had_none(listed, tmp_path):
    _, manifest = listed
    asked = recipe(data=str(manifest), out=tmp_path / "out", steps=1, group=2)
    pretrain(asked)
    with pytest.raises(CommandError, match="another recipe: --group 1 against 2"):
        pretrain(recipe(data=str(manifest), out=tmp_path / "out", steps=1))
    before = recipe().to_dict()
    for name in ("group", "align_layer", "time_std", "lr_temporal", "lr_gates"):
        del before[name]
    assert recipe().differences(before) == []


@needs_mini
def test_rates_and_the_time_table_are_as_asked():
    clip = load_clip("mini")[0]
    usual, wide = (
        start_model(Recipe(depth=2, time_std=std), clip, None).branch.time.detach().std() for std in (0.02, 0.7)
    )
    assert usual.item() == pytest.approx(0.02, rel=0.1) and wide.item() == pytest.approx(0.7, rel=0.1)
    model = start_model(Recipe(depth=2), clip, None)
    rates = {g["name"]: g["lr"] for g in model.parameter_groups(1.0, 0.05, lr_temporal=3.0, lr_gates=0.5)}
    assert rates == {"branch": 10, "temporal": 3.0, "gates": 0.5}
    assert {g["name"]: g["lr"] for g in model.parameter_groups(1.0)} == {"branch": 10, "temporal": 100, "gates": 100}


@needs_mini
def test_the_run_uses_the_rates(listed, tmp_path):
    _, manifest = listed
    clip = load_clip("mini")[0]
    torch.manual_seed(0)
    begin = start_model(recipe(), clip, None).branch.state_dict()
    changes = {"lr": 1e-12, "lr_temporal": 1e-12, "lr_gates": 1e-3, "warmup": 0.0, "weight_decay": 0.0}
    folder = pretrain(recipe(data=str(manifest), out=tmp_path / "out", steps=2, **changes))
    found = BTAdapterVisionModel.from_pretrained(folder, clip=clip).branch.state_dict()
    moved = {name for name in found if (found[name] - begin[name]).abs().max() > 1e-6}
    assert moved == {"merge_gate", "output_gate"}
