"""A run that is made longer when it is gone on with, and the options that stand in its folder from the beginning."""

from __future__ import annotations

import json
from dataclasses import replace

import pretraining
import pytest
import tuning
from test_chat import mini_is_there

from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe, from_yaml
from bt_adapter.pretrain.run import Run as PretrainRun
from bt_adapter.pretrain.run import pretrain
from bt_adapter.training.loop import rate
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.run import Run as TuneRun
from bt_adapter.tune.run import tune


def tuned(tmp_path):
    data = tuning.write_data(tmp_path / "clips", 8)
    wanted = tuning.recipe(data=str(data), out=tmp_path / "run", epochs=2.0, learn=("projector",), warmup=0.5)
    return wanted, lambda recipe: tune(recipe, tuning.make_video_chat()), TuneRecipe(), TuneRun


def pretrained(tmp_path):
    if why := mini_is_there():
        pytest.skip(str(why))
    data = pretraining.write_clips(tmp_path / "clips", 8)
    return (
        pretraining.recipe(data=str(data), out=tmp_path / "run", epochs=2.0, warmup=0.5),
        pretrain,
        Recipe(),
        PretrainRun,
    )


@pytest.mark.parametrize("make", [tuned, pretrained])
def test_a_run_can_be_made_longer_but_not_shorter(make, tmp_path, capsys, monkeypatch):
    """8 clips in batches of 4: two epochs are 4 steps, of which 2 warm up."""
    wanted, run, default, kind = make(tmp_path)
    step, seen = kind._step, []

    def watched(self, *arguments):
        if not seen:
            assert from_yaml(wanted.out / "recipe.yaml", default) == self.recipe  # before the first step
        seen.append(1)
        return step(self, *arguments)

    monkeypatch.setattr(kind, "_step", watched)
    run(wanted)
    assert len(seen) == 4
    first = rates(wanted)
    assert first == pytest.approx([wanted.lr * rate(step, 4, 2) for step in (1, 2, 3, 4)])
    with pytest.raises(CommandError, match="holds a run of 4 steps, but --epochs or --steps ask for 2"):
        run(replace(wanted, epochs=1.0))
    with pytest.raises(CommandError, match="another recipe: --warmup"):
        run(replace(wanted, warmup=0.1, epochs=4.0))
    capsys.readouterr()
    run(replace(wanted, epochs=4.0))
    said = " ".join(capsys.readouterr().err.split())
    assert "from 4 to 8 steps: after step 4 the rate follows the cosine of 8 steps" in said
    assert rates(wanted) == pytest.approx(first + [wanted.lr * rate(step, 8, 2) for step in (5, 6, 7, 8)])
    run(replace(wanted, epochs=0.1, steps=9))  # the other way to say how long
    assert len(rates(wanted)) == 9 and from_yaml(wanted.out / "recipe.yaml", default).steps == 9


def rates(wanted) -> list[float]:
    rows = [json.loads(line) for line in (wanted.out / "log.jsonl").read_text().splitlines()]
    return [row["lr"] if "lr" in row else row["lr_projector"] for row in rows]  # tuning logs the rate of each part


@pytest.mark.parametrize("make", [tuned, pretrained])
def test_the_written_recipe_begins_the_same_run(make, tmp_path):
    wanted, run, default, _ = make(tmp_path)
    run(replace(wanted, epochs=1.0, dtype="auto"))
    again = from_yaml(wanted.out / "recipe.yaml", default)
    assert again.dtype in ("float32", "bfloat16")
    run(replace(again, out=tmp_path / "again"))
    own = [(wanted.out / "log.jsonl").read_text(), (tmp_path / "again/log.jsonl").read_text()]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in own]
    assert losses[0] == losses[1]
