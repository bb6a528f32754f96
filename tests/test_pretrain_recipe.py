"""What a pretraining run may be asked for, and what it may start from."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pretraining import recipe
from test_chat import mini_is_there

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.commands import cli
from bt_adapter.errors import CommandError
from bt_adapter.model.published import to_reference_state_dict
from bt_adapter.pretrain.recipe import Recipe, from_yaml
from bt_adapter.pretrain.run import pretrain, start_model
from bt_adapter.towers.text import load_clip
from bt_adapter.training.loop import rate

pytestmark = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A branch of two layers and eight places in time, as a folder and as published files; without a head: bare."""
    folder = tmp_path_factory.mktemp("start")
    clip = load_clip("mini")[0]
    for name, head in (("folder", True), ("bare", False)):
        model = BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2, max_frames=8, alignment_head=head))
        model.save_pretrained(folder / name)
        if head:
            tensors = to_reference_state_dict(model)
    torch.save(tensors, folder / "whole.pth")
    own = ("btadapter", "balance", "extra_proj")
    torch.save({name: t for name, t in tensors.items() if name.startswith(own)}, folder / "branch.pth")
    torch.save({n: t * 2 for n, t in tensors.items()}, folder / "other.pth")
    torch.save({"blocks.0.x": torch.ones(1), "btadapter_S.0.x": torch.ones(1)}, folder / "eva.pth")
    return folder


@pytest.mark.parametrize("name", ["folder", "whole.pth", "branch.pth"])
def test_a_run_starts_from_a_branch(start, name):
    clip = load_clip("mini")[0]
    model = start_model(Recipe(init=str(start / name), frames=4), clip, None)
    assert model.config.depth == 2 and model.config.max_frames == 8 and model.branch.alignment_head is not None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("eva.pth", {}, "--init .*eva.pth .*EVA"),
        ("other.pth", {}, "--init .*other.pth .*another CLIP"),
        ("gone", {}, "--init .*gone"),
        ("bare", {}, "--init .*bare has no alignment head.* --mbta"),
        ("folder", {"depth": 3}, "--depth is 3, but --init .* has 2"),
        ("folder", {"gates": False}, "--gates is False, but --init .* has True"),
        ("whole.pth", {"gates": False}, "--gates is False, but --init .* has True"),
        ("folder", {"max_frames": 32}, "--max-frames is 32, but --init .* has 8"),
        ("folder", {"time_std": 0.7}, "--time-std is 0.7, but --init .* has 0.02"),
        ("folder", {"drop_path": 0.5}, "--drop-path is 0.5, but --init .* has 0.1"),
        ("folder", {"frames": 9}, "--frames must be at most 8, as --init"),
    ],
)
def test_a_branch_to_start_from_that_does_not_fit(start, name, changes, message):
    with pytest.raises(CommandError, match=message):
        start_model(Recipe(init=str(start / name), **{"frames": 4} | changes), load_clip("mini")[0], None)


def test_yaml_gives_defaults_and_the_command_line_goes_before(tmp_path, monkeypatch):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "data: synthetic\nsteps: 3\nlr: 2e-5\nmax-frames: 16\ncrop: [0.5, 1]\nout: somewhere\ngates: false\n"
    )
    assert from_yaml(file, Recipe()) == Recipe(
        data="synthetic", steps=3, lr=2e-5, max_frames=16, crop=(0.5, 1.0), out=Path("somewhere"), gates=False
    )
    seen = []
    monkeypatch.setattr(cli.pretrain, "run", lambda recipe: seen.append(recipe) or 0)
    monkeypatch.setitem(cli.RUN, Recipe, cli.pretrain)
    assert cli.main(["pretrain", "--config", str(file), "--lr", "1e-3"]) == 0
    assert seen[0].lr == 1e-3 and seen[0].max_frames == 16 and seen[0].steps == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: 1", "unknown nonsense"),
        ("- a list", "fields and values"),
        ("batch_size: many", "batch_size is 'many', expected int"),
        ("batch_size: 2.5", "batch_size is 2.5"),
        ("gates: 3", "true or false"),
        ("mask: tubes", "mask is 'tubes'"),
        ("a: [", "--config"),
    ],
)
def test_wrong_yaml_is_one_error(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(CommandError, match=message):
        from_yaml(file, Recipe())


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        ({"data": ""}, 1, "--data is missing"),
        ({"data": "synthetic"}, 1, "--steps"),
        ({"data": "x.csv", "batch_size": 6}, 4, "multiple of processes"),
        ({"data": "x.csv", "mask_ratio": 1.0}, 1, "--mask-ratio"),
        ({"data": "x.csv", "frames": 9}, 1, "--max-frames"),
        ({"data": "x.csv", "lr": 0.0}, 1, "--lr"),
        *(
            ({"data": "x.csv", name: value}, 1, f"--{name.replace('_', '-')} must ")
            for name, value in [
                ("steps", 0),
                ("steps", -3),
                ("max_grad_norm", -1.0),
                ("lr", math.nan),
                ("lr", math.inf),
                ("epochs", math.nan),
                ("workers", -1),
                ("prefetch", 0),
                ("crop", (0.0, 1.0)),
                ("crop", (0.9, 0.5)),
                ("beta1", 1.5),
                ("eps", -1.0),
                ("weight_decay", -1.0),
                ("max_skipped", 1.1),
                ("mbta", -0.1),
                ("save_steps", 0),
                ("warmup", math.nan),
            ]
        ),
    ],
)
def test_values_that_cannot_be(changes, world, message):
    with pytest.raises(CommandError, match=message):
        recipe(**changes).check(world)


def test_a_clip_that_is_none_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CommandError, match="--clip .*"):
        pretrain(recipe(data="synthetic", steps=1, clip=str(tmp_path), out=tmp_path / "run"))


def test_learning_rate():
    factors = [rate(step, 20, 5) for step in range(1, 21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in zip(factors[4:], factors[5:], strict=False)) and factors[-1] == pytest.approx(
        0, abs=1e-9
    )
