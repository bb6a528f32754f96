"""Numbers and types that no recipe and no command takes, by option, Python or YAML: one clear error each."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Literal

import pytest
import yaml

from bt_adapter.commands import cli
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe, from_yaml
from bt_adapter.training.loop import rate, warm_steps
from bt_adapter.training.settings import check_numbers, converted, fits, types_of
from bt_adapter.tune.recipe import TuneRecipe

RECIPES = {"pretrain": Recipe(data="x.csv", batch_size=4), "tune": TuneRecipe(data="x.json")}
BAD_IN_BOTH = [
    ("lr", 0.0), ("lr", -1e-5), ("lr", math.nan), ("lr", math.inf), ("lr", "fast"), ("lr", True), ("lr", None),
    ("max_grad_norm", -1.0), ("max_grad_norm", math.nan), ("max_grad_norm", math.inf),
    ("beta1", 1.0), ("beta1", 2.0), ("beta2", -0.1), ("beta2", math.nan),
    ("eps", 0.0), ("eps", -1e-8), ("eps", math.inf), ("weight_decay", -0.01), ("weight_decay", math.nan),
    ("warmup", -0.1), ("warmup", 1.5), ("warmup", 2000), ("warmup", math.nan),
    ("epochs", 0.0), ("epochs", -1.0), ("epochs", math.inf), ("epochs", math.nan),
    ("steps", 0), ("steps", -5), ("steps", 2.5), ("steps", True), ("steps", "10"),
    ("frames", 0), ("frames", -8), ("frames", 8.5), ("batch_size", 0), ("batch_size", 2.0),
    ("accumulate", 0), ("seed", -1),
    ("workers", -1), ("workers", 1.5), ("prefetch", 0), ("tower_chunk", 0), ("keep_last", 0), ("save_steps", 0),
    ("save_minutes", -1.0), ("save_minutes", math.nan), ("max_skipped", -0.1), ("max_skipped", 1.1),
    ("dtype", "float64"), ("device", 3), ("data", ["a", "b"]), ("out", "somewhere"), ("tensorboard", "yes"),
]  # fmt: skip
BAD = {
    "pretrain": [
        ("mask_ratio", 1.0), ("mask_ratio", -0.1), ("mask_ratio", math.nan),
        ("temperature", 0.0), ("temperature", -1.0), ("temperature", math.inf), ("drop_path", 1.0), ("ema", 1.0),
        ("mbca", -0.1), ("mbta", math.nan), ("depth", 0),
        ("max_frames", 0), ("crop", (0.0, 1.0)), ("crop", (0.5, math.nan)), ("crop", (0.5,)), ("crop", 0.5),
        ("mask", "tubes"), ("gates", 1),
    ],
    "tune": [
        ("lora_r", 0), ("lora_r", -4), ("lora_r", 4.5), ("lora_alpha", 0.0),
        ("lora_alpha", math.nan), ("lora_alpha", math.inf),
        ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("lora_dropout", math.nan), ("lr_branch", -1.0),
        ("lr_lora", 0.0), ("lr_projector", math.inf), ("max_length", 0), ("head_chunk", 0), ("learn", ["lora"]),
        ("learn", ("tower",)),
    ],
}  # fmt: skip
CASES = [(kind, name, value) for kind in RECIPES for name, value in BAD_IN_BOTH + BAD[kind]]


@pytest.mark.parametrize(("kind", "name", "value"), CASES)
def test_what_a_recipe_does_not_take_is_one_error(kind, name, value):
    values = {field.name: getattr(RECIPES[kind], field.name) for field in fields(RECIPES[kind])}
    with pytest.raises(CommandError, match=f"--{name.replace('_', '-')} must ") as error:
        type(RECIPES[kind])(**values | {name: value}).check(1)
    number = isinstance(value, float | int) and not isinstance(value, bool)
    assert f"got {value}" in str(error.value) if number else "got" in str(error.value)


@pytest.mark.parametrize("kind", RECIPES)
def test_every_number_of_a_recipe_has_its_limits(kind):
    recipe = RECIPES[kind]
    numbers = (int, float, int | None, float | None, tuple[float, float], float | Literal["clip"])
    numeric = {name for name, kind in types_of(recipe).items() if kind in numbers}
    assert numeric == set(recipe.limits)
    if kind == "tune":
        recipe = TuneRecipe(data="x.json", branch="b", model="mini")
    recipe.check(1)  # the defaults themselves
    type(recipe)(**vars(recipe) | {"max_grad_norm": 0.0, "warmup": 0.0, "workers": 0, "save_minutes": math.inf}).check(
        1
    )


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize(
    "text",
    [
        "lr: .nan", "lr: -.inf", "lr: true", "lr: null", "lr: [1.0e-4]", "lr: {a: 1}", "lr: abc", "steps: .inf",
        "steps: 2.5", "batch_size: many", "max_grad_norm: -1", "beta1: 2", "eps: 0", "warmup: 3", "data: null",
        "data: 5", "data: [a.csv]", "out: 7", "tensorboard: 1", "dtype: double", "max-skipped: 2\nmax_skipped: 0.1",
        "nonsense: 1", "[1, 2]", "device: 2020-01-01",
    ],
)  # fmt: skip
def test_wrong_yaml_is_one_line_and_exit_2(kind, text, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    data = {"pretrain": "x.csv", "tune": "x.json"}[kind]
    file.write_text(text if "data" in text or text[0] == "[" else f"data: {data}\n{text}\n")
    code = cli.main([kind, "--config", str(file), "--out", str(tmp_path / "run")])
    said = capsys.readouterr().err.strip()
    assert code == 2 and len(said.splitlines()) == 1 and said.startswith("bt-adapter: --"), said
    assert not (tmp_path / "run").exists()


def test_yaml_values_become_the_fields_types(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("learn: lora\nlr: 2e-5\nlr-branch: 1\nsteps: 8.0\nout: somewhere\nvideos: null\nlora_r: 8\n")
    found = from_yaml(file, TuneRecipe())
    assert found == TuneRecipe(learn=("lora",), lr=2e-5, lr_branch=1.0, steps=8, out=Path("somewhere"), lora_r=8)
    assert isinstance(found.lr_branch, float) and isinstance(found.steps, int)
    found.check_values()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pretrain", "--batch", "8"), "--batch is called --batch-size now"),
        (("pretrain", "--data", "x", "--ratio=0.5"), "--ratio is called --mask-ratio now"),
        (("pretrain", "--grad_norm", "1"), "--grad-norm is called --max-grad-norm now"),
        (("tune", "--rank", "8"), "--rank is called --lora-r now"),
        (("tune", "--alpha", "8"), "--alpha is called --lora-alpha now"),
        (("tune", "--lora-layers", "q_proj"), "--lora-layers is called --target-modules now"),
        (("tune", "--context", "99"), "--context is called --max-length now"),
        (("tune", "--precision", "float32"), "--precision is called --dtype now"),
        (("chat", "--other-tower"), "--other-tower is called --no-require-same-tower now"),
        (("export", "m", "out", "--other-tower"), "--other-tower is called --no-require-same-tower now"),
        (("answer", "q", "--videos", "v", "--batch", "2"), "--batch is called --batch-size now"),
        (("eval", "qa", "--batch", "2"), "--batch is called --batch-size now"),
        (("eval", "retrieval", "--data", ".", "--precision", "float32"), "--precision is called --dtype now"),
        (("eval", "recognition", "--data", ".", "--batch", "2"), "--batch is called --batch-size now"),
    ],
)
def test_former_options_name_the_present_one(words, message, capsys):
    assert cli.main(list(words)) == 2
    assert capsys.readouterr().err.strip() == f"bt-adapter: {message}"


@pytest.mark.parametrize(("kind", "other"), [("pretrain", {}), ("tune", {"other_tower": True})])
def test_former_fields_of_yaml_name_the_present_one_but_stored_recipes_load(kind, other, tmp_path):
    wanted = RECIPES[kind] if kind == "pretrain" else TuneRecipe(data="x.json", require_same_tower=False)
    former = {now: before for before, now in wanted.renamed.items()}
    stored = {former.get(name, name): value for name, value in wanted.to_dict().items()} | other
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(stored))
    assert from_yaml(file, type(wanted)()) == wanted and wanted.differences(stored) == []
    for before, now in wanted.renamed.items():
        file.write_text(yaml.safe_dump({before: stored[before]}))
        with pytest.raises(CommandError, match=f"{before} is called {now} now"):
            from_yaml(file, type(wanted)())


@pytest.mark.parametrize("words", [("--config", "a", "--config=b"), ("--config",), ("--config=",)])
def test_one_configuration_file(words, capsys):
    assert cli.main(["tune", *words]) == 2
    assert "--config must be given once, with a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chat", "what ?", "--frames", "0"), "--frames must be 1 or more, got 0"),
        (("chat", "what ?", "--fps", "nan"), "--fps must be a finite number, above 0, got nan"),
        (("chat", "what ?", "--max-new-tokens", "-1"), "--max-new-tokens must be 1 or more, got -1"),
        (("answer", "q.jsonl", "--videos", "v", "--batch-size", "0"), "--batch-size must be 1 or more, got 0"),
        (("eval", "retrieval", "--data", ".", "--temperature", "nan"), "--temperature must be a finite number"),
        (("eval", "retrieval", "--data", ".", "--workers", "-2"), "--workers must be 0 or more, got -2"),
        (("eval", "qa", "--data", "d", "--videos", "v", "--judge-timeout", "inf"), "--judge-timeout must be a finite"),
        (("shards", "--data", "d", "--out", "o", "--max-skipped", "nan"), "--max-skipped must lie in [0, 1], got nan"),
        (("demo", "--clips", "0"), "--clips must be 1 or more, got 0"),
        (("pretrain", "--data", "synthetic", "--steps", "1", "--warmup", "2"), "a share of all steps, got 2.0"),
    ],
)
def test_commands_say_what_they_do_not_take(arguments, message, capsys):
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_intervals():
    class Numbers:
        low, high, both, none = 0.0, 1.0, (0.2, 0.4), None

    check_numbers(Numbers, {"low": "[0, 1)", "high": "(0, 1]", "both": "(0, 1)", "none": "(5, 6)"})
    for name, interval in (("low", "(0, 1)"), ("high", "[0, 1)"), ("both", "(0.3, 1)"), ("high", "(-inf, 0)")):
        with pytest.raises(CommandError, match=f"--{name} must "):
            check_numbers(Numbers, {name: interval})


def test_types():
    for value, kind in ((True, bool), (3, int), (3, float), (2.5, float), ("a", str), (None, str | None)):
        assert fits(value, kind)
    for value, kind in ((1, bool), (True, int), (3.0, int), ("3", float), (None, str), (("a", 1), tuple[str, ...])):
        assert not fits(value, kind)
    assert converted([0, "0.5"], tuple[float, float]) == (0.0, 0.5)
    assert converted("1e-3", float | None) == 1e-3 and converted(None, float | None) is None


def test_warm_up_is_a_share_of_the_run_and_its_peak_is_reached():
    for steps in (1, 2, 7, 100, 1000):
        for share in (0.0, 0.03, 0.07, 0.5, 1.0):
            warm = warm_steps(share, steps)
            factors = [rate(step, steps, warm) for step in range(1, steps + 1)]
            assert max(factors) == 1 and min(factors) >= 0
            assert warm == -(-round(share * 100) * steps // 100)
            assert factors[: warm or 1] == sorted(factors[: warm or 1])
    assert rate(1, 10, 0) == 1
