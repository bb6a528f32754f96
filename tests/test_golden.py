"""The model against numbers computed by the published code: every golden case, forward, losses and gradients.

Tolerances: float32 noise of the reference itself is at most 1e-6 forward and 2e-5 in gradients (its files say so).
"""

import pytest
import torch
from reference_cases import CHAT, PRETRAINING, Case, load, reference_gradients, relative_error

from bt_adapter.model.walk import run_lockstep
from bt_kernels import VisibleTokens, backend

FORWARD = 2e-5
GRADIENT = 1e-3
LOSSES = {"vtc": "NCE_loss", "mbca": "branch_text_nce_loss", "mbta": "clip_branch_mask_mse_loss"}


@pytest.fixture(params=[None, "reference"])
def kernels(request):
    with backend(request.param):
        yield


def check_gradients(case: Case, actual: dict, expected: dict) -> None:
    assert expected
    floor = 1e-3 * max(float(g.abs().max()) for g in expected.values())
    errors = {
        name: float((actual[name] - g).abs().max()) / max(float(g.abs().max()), floor) for name, g in expected.items()
    }
    worst = max(errors, key=errors.get)
    assert errors[worst] <= GRADIENT, f"{case.name}: {worst} is off by {errors[worst]:.1e}"


def test_every_case_is_here():
    assert len(PRETRAINING) == 8


@pytest.mark.parametrize("recompute", ["plain", "none", "mlp", "layer"])
@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining(name, recompute, kernels):
    case = load(name)
    model = case.model(**({"fused": False} if recompute == "plain" else {"recompute": recompute}))
    output = model(case.pixels(), case.visible(), case.draws())
    last = f"outputs.encoder_states.{case.config['layers']}"
    assert relative_error(output.backbone_tokens.flatten(0, 1), case[f"{last}.x"]) <= FORWARD
    assert relative_error(output.branch_tokens, case[f"{last}.x2"]) <= FORWARD
    assert relative_error(output.video_embeds, case["outputs.video_feature"]) <= FORWARD
    losses = model.pretraining_losses(output, case["outputs.text_feature"], temperature=case.config["tau"])
    recorded = {ours: case[f"losses.{theirs}"] for ours, theirs in LOSSES.items() if f"losses.{theirs}" in case}
    for ours, expected in recorded.items():
        assert float((losses[ours].detach() - expected).abs() / expected.abs()) <= FORWARD, ours
    if case.gradients():
        sum(losses[ours] for ours in recorded).backward()
        check_gradients(case, reference_gradients(model), case.gradients())


@pytest.mark.parametrize("frames", [100, 8])
def test_chat_from_pixels(frames, kernels):
    case = load("chat_full_tower")
    tokens = case.model().video_tokens(case[f"T{frames}.inputs.imgs"][None], windows="reference")
    assert relative_error(tokens[0], case[f"T{frames}.outputs.video_feature"]) <= FORWARD


def test_whole_branch_in_reference_windows(kernels):
    case = load("chat_full_tower")
    model = case.model()
    with torch.no_grad():
        tokens = model._embed(case["T8.inputs.imgs"][None])
        visible = VisibleTokens.all(1, model.vision_config.patches, 8, slots=4)
        tokens, z = run_lockstep(model, tokens, visible, 4)
        frames = model._final_norm(model.branch.mix_output(z[:, 0], tokens[:, :, 0]))[0]
    assert relative_error(tokens[0], case["T8.outputs.hidden_states.6.x"]) <= FORWARD
    assert relative_error(z, case["T8.outputs.hidden_states.6.x2"]) <= FORWARD
    assert relative_error(frames, case["T8.outputs.pooler_output"]) <= FORWARD


def test_hundred_frames_have_full_windows():
    """The published code's windows are whole from 65 frames on: both modes agree there, and only there."""
    model, case = load("chat_full_tower").model(), load("chat_full_tower")
    long, short = case["T100.inputs.imgs"][None], case["T8.inputs.imgs"][None]
    assert torch.equal(model.video_tokens(long), model.video_tokens(long, windows="reference"))
    assert not torch.allclose(model.video_tokens(short), model.video_tokens(short, windows="reference"), atol=1e-3)


@pytest.mark.parametrize("frames", [100, 8])
def test_chat_from_stored_features(frames, kernels):
    case = load("chat_reserve")
    model = case.model()
    prefix = f"T{frames}."
    tokens = model.video_tokens(features=case[f"{prefix}inputs.features"], windows="reference")
    assert relative_error(tokens, case[f"{prefix}outputs.hidden_states.3"]) <= FORWARD
    dot = (tokens * case[f"{prefix}inputs.cotangent"]).sum()
    expected = case[f"{prefix}losses.cotangent_dot"]
    assert float((dot.detach() - expected).abs() / expected.abs()) <= FORWARD
    if frames == case.config["grad_T"]:
        dot.backward()
        check_gradients(case, reference_gradients(model), case.gradients(f"{prefix}grads."))


@pytest.mark.parametrize("name", [*PRETRAINING, *CHAT])
def test_names_survive_the_round_trip(name):
    from bt_adapter import load_reference_checkpoint, to_reference_state_dict

    case = load(name)
    mine = to_reference_state_dict(case.model())
    theirs = {k.removeprefix("backbone."): v for k, v in case.weights.items() if not k.startswith("text_backbone.")}
    assert set(mine) == set(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    gates = {"merge_gate_slope": case.config.get("middle_norm"), "output_gate_slope": case.config.get("out_norm")}
    again = load_reference_checkpoint(mine, case.vision_config, **gates)
    assert set(again.state_dict()) == set(case.model().state_dict())
