"""The dtype of a computation that nobody chose: bfloat16 only where it is faster, and the reason is told."""

from __future__ import annotations

import json

import pytest
import torch
from pretraining import recipe, write_clips
from test_chat import mini_is_there

from bt_adapter.model import dtypes
from bt_adapter.model.dtypes import choose_dtype, measure_speedups
from bt_adapter.pretrain.run import pretrain

EMULATED, FAST = (1.0, 30.0), (1.0, 0.4)


@pytest.fixture
def measured(monkeypatch):
    """Give the three products these times in float32 and bfloat16; returns the layouts that were measured."""

    def give(*times):
        left, seen = iter(times), []

        def seconds(product):
            x, w, g = torch.randn(5, 3), torch.randn(4, 3), torch.randn(5, 4)
            (layout,) = (
                name for name, wanted in {"forward": (5, 4), "input": (5, 3), "weight": (4, 3)}.items()
                if _shape(product, x, w, g) == wanted
            )  # fmt: skip
            seen.append(layout)
            return next(left)

        monkeypatch.setattr(dtypes, "_seconds", seconds)
        dtypes._for_cpu.cache_clear()
        return seen

    yield give
    dtypes._for_cpu.cache_clear()


def _shape(product, x, w, g):
    return tuple(product(x, w, g).shape)


@pytest.mark.parametrize(
    ("times", "name", "layouts"),
    [
        ((FAST, FAST, FAST), "bfloat16", 3),
        ((EMULATED,), "float32", 1),
        ((FAST, EMULATED), "float32", 2),  # oneDNN's forward product is quick, torch's own for gradients is not
        ((FAST, FAST, EMULATED), "float32", 3),
        (((1.0, 0.95), FAST, FAST), "float32", 1),  # as quick is no reason to be less exact
    ],
)
def test_bfloat16_on_a_cpu_must_be_faster_forward_and_backward(measured, times, name, layouts):
    seen = measured(*times)
    chosen = choose_dtype("auto", "cpu")
    assert chosen.name == name and chosen.dtype == getattr(torch, name)
    assert seen == ["forward", "input", "weight"][:layouts]
    assert str(chosen).startswith(f"computing in {name}: measured on this CPU") and "forward" in chosen.why


def test_what_is_asked_for_is_taken_without_measuring(measured):
    seen = measured()
    for name in ("float32", "bfloat16", "float16"):
        assert choose_dtype(name, "cpu").name == name
    assert not seen


def test_the_measurement_is_short_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    speedups = measure_speedups()
    assert 1 <= len(speedups) <= 3 and min(speedups) > 0
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("capability", "name"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_on_a_gpu(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    chosen = choose_dtype("auto", "cuda:0")
    assert chosen.name == name and "a GPU" in chosen.why


@pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))
def test_a_run_keeps_the_dtype_it_began_with(measured, tmp_path, capsys):
    """The second half may run on another machine, where another dtype would be chosen."""
    data = write_clips(tmp_path / "clips", 8)
    measured(FAST, FAST, FAST)
    wanted = recipe(data=str(data), out=tmp_path / "run", steps=1, dtype="auto")
    pretrain(wanted)
    assert "computing in bfloat16: measured on this CPU" in " ".join(capsys.readouterr().err.split())
    state = json.loads((tmp_path / "run/checkpoints/00000001/state.json").read_text())
    assert state["recipe"]["dtype"] == "bfloat16"
    measured(EMULATED)
    pretrain(wanted)
    assert "computing in bfloat16: as the run in --out began" in " ".join(capsys.readouterr().err.split())
