"""The benchmark's baseline is the published procedure: its golden numbers, and ours where ours are the same."""

import contenders
import counting
import pytest
import step
import torch
from baseline import Baseline, Options
from reference_cases import load, relative_error
from small_models import PATCHES, make, shake, video
from test_golden import FORWARD, GRADIENT, LOSSES

from bt_adapter.towers.config import TowerConfig
from bt_kernels import VisibleTokens

OPTIONS = [Options(), Options(sdpa=True), Options(checkpoint=True)]
options = pytest.mark.parametrize("options", OPTIONS, ids=["eager", "sdpa", "checkpoint"])


@options
def test_baseline_computes_the_golden_numbers(options):
    case = load("clip_pretrain_tube70")
    baseline = Baseline(case.model(), options)
    losses = baseline(case.pixels(), case["outputs.text_feature"], case["inputs.mask"])
    for ours, theirs in LOSSES.items():
        expected = case[f"losses.{theirs}"]
        assert float((losses[ours].detach() - expected).abs() / expected.abs()) <= FORWARD, ours
    sum(losses.values()).backward()
    expected = case.gradients()
    layer = baseline.spatial[1]
    pairs = {
        "btadapter_S_layers.1.mlp.fc1.weight": layer.fc1.weight,
        "btadapter_S_layers.1.self_attn.k_proj.weight": layer.attention.k.weight,
        "btadapter_cls_token": baseline.cls_token,
        "btadapter_time_embed.weight": baseline.time,
    }
    for name, parameter in pairs.items():
        gradient = expected[name].view_as(parameter) if expected[name].numel() == parameter.numel() else None
        assert gradient is not None, (name, expected[name].shape)
        assert relative_error(parameter.grad, gradient) <= GRADIENT, name


@options
def test_baseline_step_is_our_step(options):
    model = shake(make(depth=3)).double()
    baseline = Baseline(model, options)
    mask = torch.zeros(2, PATCHES * 4, dtype=torch.bool).view(2, -1, 4)
    mask[:, ::3] = True
    mask = mask.flatten(1)
    text = torch.randn(2, 24, dtype=torch.float64)
    losses = baseline(video().double(), text, mask)
    mine = model.pretraining_losses(model(video().double(), VisibleTokens.from_reference_mask(mask, 4)), text)
    for name in mine:
        torch.testing.assert_close(losses[name], mine[name], rtol=1e-9, atol=1e-9)
    sum(losses.values()).backward()
    sum(mine.values()).backward()
    for theirs, ours in zip(baseline.spatial, model.branch.spatial, strict=True):
        torch.testing.assert_close(theirs.fc1.weight.grad, ours.fc1.weight.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(baseline.merge_gate.grad, model.branch.merge_gate.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frames", [4, 16])
def test_baseline_video_tokens_are_ours(frames):
    model = shake(make(depth=3)).double()
    pixels = video(frames).double()
    with torch.no_grad():
        torch.testing.assert_close(
            Baseline(model).video_tokens(pixels), model.video_tokens(pixels), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("part", ["branch", "step", "chat"])
def test_benchmark_measures_what_it_says(part, monkeypatch):
    monkeypatch.setattr(contenders, "VIT_L", TowerConfig(32, 64, 6, 2, 16, 4, 24))
    case = contenders.Case(part, 4, 0.0 if part == "chat" else 0.5, 2)
    names = ("eager", "sdpa", "checkpoint", "none", "mlp", "layer", "half")
    rows = {row.contender: row for row in step.measure(case, "cpu", names, 0.0, 1, False)}
    assert all(row.error == "" and row.seconds > 0 for row in rows.values())
    assert rows["none"].waits == 0 and rows["none"].operators < rows["eager"].operators
    if part == "chat":
        assert set(rows) == {"eager", "sdpa", "none", "half"} and rows["half"].similarity > 0.99
        return
    assert rows["eager"].waits > 0
    assert rows["layer"].saved < rows["mlp"].saved < rows["none"].saved < rows["eager"].saved
    assert rows["checkpoint"].saved < rows["eager"].saved
    assert ("half" in rows) == (part == "step") and ("products" in rows) == (part == "branch")


def test_rows_come_one_by_one_and_those_that_compile_last(monkeypatch):
    monkeypatch.setattr(contenders, "VIT_L", contenders.SMALL)
    monkeypatch.setattr(step, "LAST", ("sdpa",))
    case = contenders.Case("step", 4, 0.5, 1)
    order = [(row.contender, row.rounds) for row in step.measure(case, "cpu", ("eager", "sdpa", "none"), 0.0, 2, False)]
    assert order[:4] == [("none", 1), ("eager", 1), ("none", 2), ("eager", 2)]
    assert order[4] == ("sdpa", 1) and [name for name, _ in order[5:]] == ["none", "eager", "sdpa"]


@pytest.mark.parametrize("name", ["eager", "sdpa", "none", "mlp"])
def test_products_have_the_dtype_of_autocast(name, monkeypatch):
    monkeypatch.setattr(contenders, "VIT_L", contenders.SMALL)
    case = contenders.Case("step", 4, 0.5, 2)
    model, inputs = contenders.make_model("step", "cpu"), contenders.make_inputs(case, "cpu")
    if name not in contenders.BASELINES:  # a GPU's tower is in bfloat16
        model.tower.optimize(dtype=torch.bfloat16)
    for autocast, product in ((True, torch.bfloat16), (False, torch.float32)):
        if product == torch.float32:
            model.tower.optimize(dtype=torch.float32)
        contender = contenders.Contender(name, model, case, "cpu", inputs, autocast)
        with counting.Operators() as operators:
            contender.run()
        assert counting.why_wrong_products(contender, operators) is None
        contender.autocast = not autocast
        assert f"{product} 100.0%" in counting.why_wrong_products(contender, operators) or autocast
