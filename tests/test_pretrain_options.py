"""Groups of clips that stay together, and rates and sizes of their own, in pretraining."""

from __future__ import annotations

import math
from dataclasses import replace

import processes
import pytest
import torch
import yaml
from pretraining import losses, recipe, write_clips
from test_chat import mini_is_there

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.data.loading import TrainingClips, batches, shuffled
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.shards import write_shards
from bt_adapter.data.transforms import TrainTransform
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe, from_yaml
from bt_adapter.pretrain.run import choose_temperature, pretrain, start_model
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.text import load_clip

needs_mini = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    manifest = write_clips(tmp_path_factory.mktemp("clips"), 14)
    return read_clips(str(manifest), None)[0], manifest


def drawn(clips, group, batch, steps, seed=0, rank=0, world=1):
    """The places in the list of each batch's clips; ``batch``: of one process."""
    data = TrainingClips(clips, 2, TrainTransform(48), seed, group)
    places = {clip.path: number for number, clip in enumerate(clips)}
    found = []
    read = data._read

    def remember(number, frames, seed):
        found.append(places[data._packed[number].path])
        return read(number, frames, seed)

    data._read = remember
    for _ in batches(data, batch, rank, world, 0, steps, 0):
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


def test_a_group_lies_on_one_process(listed):
    clips, _ = listed
    parts = [drawn(clips, 2, 4, 1, rank=rank, world=3)[0] for rank in range(3)]
    assert sum(parts, []) == drawn(clips, 2, 12, 1)[0]
    assert all(row[place] + 1 == row[place + 1] for row in parts for place in (0, 2))


def test_without_groups_the_order_is_as_it_was(listed):
    clips, _ = listed
    assert drawn(clips, 1, 7, 2)[1] == [shuffled(place, 14, 0, 0) for place in range(7, 14)]


@needs_mini
def test_groups_that_cannot_be_are_refused(listed, tmp_path):
    with pytest.raises(
        CommandError, match="--batch-size must be a multiple of processes times --accumulate times --group"
    ):
        Recipe(data="x", batch_size=8, group=3).check(1)
    with pytest.raises(CommandError, match="--batch-size must be a multiple"):
        Recipe(data="x", batch_size=12, group=4, accumulate=2).check(1)
    with pytest.raises(CommandError, match="--group 2 needs listed clips: those of --data synthetic"):
        Recipe(data="synthetic", steps=1, batch_size=4, group=2).check(1)
    manifest = write_clips(tmp_path / "clips", 12)
    manifest.write_text(manifest.read_text() + '{"video": "gone.mp4", "caption": "a thing"}\n')
    with pytest.raises(CommandError, match=r"--group 2 needs every listed clip(.|\n)*gone.mp4"):
        pretrain(recipe(data=str(manifest), out=tmp_path / "out", steps=1, group=2))


@needs_mini
def test_shards_that_lack_a_clip_of_their_list_are_refused(tmp_path):
    clips = read_clips(str(write_clips(tmp_path / "clips", 8, broken=(4,))), None)[0]
    write_shards(clips, tmp_path / "shards", per_shard=4)
    asked = recipe(data=str(tmp_path / "shards"), out=tmp_path / "out", steps=1)
    with pytest.raises(CommandError, match=r"--group 2 needs every listed clip(.|\n)*clip004.mp4"):
        pretrain(replace(asked, group=2))
    pretrain(asked)


@needs_mini
def test_clips_too_few_for_a_group_are_told(tmp_path, capsys):
    manifest = write_clips(tmp_path / "clips", 5)
    pretrain(recipe(data=str(manifest), out=tmp_path / "out", steps=1, group=2))
    assert "the last 1 clips of --data are too few for a group of 2 and are left out" in capsys.readouterr().err


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
def test_a_rate_of_gates_that_are_not_there_is_refused(listed, tmp_path):
    with pytest.raises(CommandError, match="--lr-gates is 0.1, but the branch has no gates"):
        pretrain(recipe(data=str(listed[1]), out=tmp_path / "out", steps=1, gates=False, lr_gates=0.1))


@needs_mini
def test_the_temperature_may_be_the_clips_own(listed, tmp_path, capsys):
    learned = math.exp(-load_clip("mini")[0].logit_scale.item())
    config = tmp_path / "recipe.yaml"
    config.write_text("temperature: clip\n")
    assert from_yaml(config, Recipe()).temperature == "clip"
    seen = {}
    for asked in ("clip", learned, 0.01):
        out = tmp_path / str(asked)
        pretrain(recipe(data=str(listed[1]), out=out, steps=1, temperature=asked))
        seen[asked] = losses(out)[0][1]
    assert seen["clip"] == seen[learned] != pytest.approx(seen[0.01], rel=0.1)
    assert yaml.safe_load((tmp_path / "clip" / "recipe.yaml").read_text())["temperature"] == "clip"
    assert f"the temperature is the one that the CLIP learned, {learned:.4g}" in capsys.readouterr().err
    with pytest.raises(CommandError, match="another recipe: --temperature 0.05 against clip"):
        pretrain(recipe(data=str(listed[1]), out=tmp_path / "clip", steps=1, temperature=0.05))


def test_a_temperature_that_is_none_is_refused():
    with pytest.raises(CommandError, match="--clip x has none: give a number"):
        choose_temperature(Recipe(clip="x", temperature="clip"), torch.nn.Linear(1, 1))
    for wrong, message in ((0.0, "above 0"), (math.nan, "a finite number"), ("own", "float .* or one of clip")):
        with pytest.raises(CommandError, match=f"--temperature must be .*{message}"):
            Recipe(data="x", temperature=wrong).check(1)


def run_steps(rank, world, asked):
    pretrain(asked)


@needs_mini
@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("changes", [{"mbta": 0.0}, {"align_layer": "chat"}, {"mbta": 0.0, "sharding": "fsdp2"}])
def test_processes_start_from_a_branch_whose_head_is_of_no_use(listed, tmp_path, changes):
    clip = load_clip("mini")[0]
    start = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2, max_frames=8, alignment_head=True))
    start.save_pretrained(tmp_path / "start")
    asked = recipe(data=str(listed[1]), out=tmp_path / "out", init=str(tmp_path / "start"), steps=2, **changes)
    processes.run(tmp_path / "processes", 2, run_steps, asked)
    pretrain(replace(asked, steps=3))
    found = BTAdapterVisionModel.from_pretrained(tmp_path / "out" / "branch", clip=clip).branch
    same = {name for name, p in start.branch.named_parameters() if torch.equal(found.get_parameter(name), p)}
    assert same >= {name for name, _ in start.branch.named_parameters() if name.startswith("alignment_head")}
    assert not any(name.startswith("spatial") for name in same), "all else learns"


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


@needs_mini
@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"products": "bt_kernels"}, "products='bt_kernels' needs the tower on a GPU"),
        ({"tower_attention": "flash-attn"}, "attention='flash-attn' needs the tower on a CUDA device"),
        ({"tower_graphs": True}, "graphs needs the tower on a CUDA device"),
    ],
)
def test_what_only_a_gpu_runs_is_refused_on_a_cpu(option, reason, tmp_path):
    asked = recipe(data="synthetic", steps=1, out=tmp_path / "out", **option)
    with pytest.raises(CommandError, match=f"--tower-graphs.* or --products: {reason}"):
        pretrain(asked)


def test_the_branch_computes_with_the_products_that_are_asked_for():
    model = BTAdapterVisionModel(TowerConfig(32, 64, 3, 2, 16, 4, 24), BTAdapterConfig(depth=1))
    model.products = "bt_kernels"
    assert model.branch.config.products == "bt_kernels" and "products" not in model.config.to_dict()
    with pytest.raises(ValueError, match="products must be 'torch' or 'bt_kernels'"):
        model.products = "cublas"
