"""Weights in and out: own folders, published names and prefixes, and every way a file can be wrong."""

import json
import pickle

import pytest
import torch
from reference_cases import load
from safetensors.torch import load_file, save_file
from test_model import SIZES, make, shake, video
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from bt_adapter import (
    BTAdapterConfig,
    BTAdapterVisionModel,
    CheckpointError,
    load_reference_checkpoint,
    to_reference_state_dict,
)

CASE = "clip_pretrain_tube70_droppath"


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIPModel(
        CLIPConfig(
            vision_config={**SIZES, "hidden_act": "quick_gelu"},
            text_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
            projection_dim=24,
        )
    ).eval()


def test_branch_alone_is_saved_and_the_tower_named(tmp_path, clip):
    clip.save_pretrained(tmp_path / "clip")
    model = shake(BTAdapterVisionModel.from_clip(tmp_path / "clip", BTAdapterConfig(depth=2))).eval()
    model.save_pretrained(tmp_path / "branch")
    names = set(load_file(tmp_path / "branch" / "model.safetensors"))
    assert names == {n for n in model.state_dict() if n.startswith("branch.")}
    config = json.loads((tmp_path / "branch" / "config.json").read_text())
    assert config["tower_name"] == str(tmp_path / "clip") and not config["includes_tower"]
    expected = model(video()).video_embeds
    for source in (None, tmp_path / "clip", clip):
        again = BTAdapterVisionModel.from_pretrained(tmp_path / "branch", source)
        assert not again.training
        assert torch.equal(again(video()).video_embeds, expected)
    shared = BTAdapterVisionModel.from_pretrained(tmp_path / "branch", clip, share=True)
    assert shared.tower.projection.weight is clip.visual_projection.weight


@pytest.mark.parametrize("choices", [{"recompute": "layer", "fused": True}, {"recompute": "none", "fused": False}])
def test_choices_of_a_run_are_read_from_old_folders_and_not_saved(tmp_path, choices):
    make(recompute="mlp").save_pretrained(tmp_path, include_tower=True)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert not {"recompute", "fused"} & set(config["branch"])
    assert BTAdapterVisionModel.from_pretrained(tmp_path).config == BTAdapterConfig(depth=2, max_frames=8)
    path.write_text(json.dumps(config | {"branch": config["branch"] | choices}))
    old = BTAdapterVisionModel.from_pretrained(tmp_path)
    assert (old.config.recompute, old.config.fused) == (choices["recompute"], choices["fused"])
    old.save_pretrained(tmp_path, include_tower=True)
    assert json.loads(path.read_text()) == config


def test_everything_saved(tmp_path):
    model = shake(make())
    model.save_pretrained(tmp_path, include_tower=True, dtype=torch.float16)
    again = BTAdapterVisionModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(video()).video_embeds, model(video()).video_embeds, rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert not list(tmp_path.glob("*.writing"))


def test_branch_of_another_clip(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="names no tower"):
        BTAdapterVisionModel.from_pretrained(tmp_path)
    wider = CLIPVisionModel(CLIPVisionConfig(**{**SIZES, "hidden_size": 48, "num_attention_heads": 3}))
    with pytest.raises(CheckpointError, match="hidden_size 32 against 48, num_attention_heads 2 against 3"):
        BTAdapterVisionModel.from_pretrained(tmp_path, wider)


def test_another_clip_of_the_same_shape(tmp_path, clip):
    BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2)).save_pretrained(tmp_path)
    half = CLIPModel(clip.config).half()  # the same CLIP in half precision is no other one
    half.load_state_dict(clip.state_dict())
    BTAdapterVisionModel.from_pretrained(tmp_path, half)
    with torch.no_grad():
        clip.vision_model.embeddings.class_embedding.mul_(1.5)
    with pytest.raises(CheckpointError, match="another CLIP of the same shape"):
        BTAdapterVisionModel.from_pretrained(tmp_path, clip)


def test_tower_of_a_chat_model_has_no_projection(tmp_path, clip):
    model = shake(BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2)))
    model.save_pretrained(tmp_path)
    tower = CLIPVisionModel(clip.config.vision_config)
    tower.load_state_dict(clip.vision_model.state_dict())
    for share in (False, True):
        again = BTAdapterVisionModel.from_pretrained(tmp_path, tower, share)
        torch.testing.assert_close(again.video_tokens(video()), model.eval().video_tokens(video()))


@pytest.mark.parametrize("share", [False, True])
def test_tower_of_another_resolution(tmp_path, share):
    make().save_pretrained(tmp_path)
    larger = CLIPVisionModel(CLIPVisionConfig(**{**SIZES, "image_size": 24}))
    with pytest.raises(CheckpointError, match="image_size 16 against 24"):
        BTAdapterVisionModel.from_pretrained(tmp_path, larger, share)


def test_damaged_files(tmp_path):
    make().save_pretrained(tmp_path, include_tower=True)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        BTAdapterVisionModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="damaged"):
        load_reference_checkpoint(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is damaged"):
        BTAdapterVisionModel.from_pretrained(tmp_path)


def test_extra_name_in_a_saved_branch(tmp_path, clip):
    BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({**state, "foo": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="unexpected: foo"):
        BTAdapterVisionModel.from_pretrained(tmp_path, clip)


def test_no_saved_branch(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        BTAdapterVisionModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 7}')
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="format 7"):
        BTAdapterVisionModel.from_pretrained(tmp_path)


def test_from_clip_of_something_else():
    with pytest.raises(TypeError, match="clip must be a CLIP"):
        BTAdapterVisionModel.from_clip(_WithConfig())


class _WithConfig(torch.nn.Module):
    config = type("Config", (), {"model_type": "siglip"})()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize("wrap", [False, True])
def test_published_files(tmp_path, suffix, wrap):
    case = load(CASE)
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        save_file(case.weights, path)
    else:
        torch.save({"state_dict": case.weights, "meta": {"epoch": 1}} if wrap else case.weights, path)
    model = load_reference_checkpoint(path, case.vision_config)
    assert torch.equal(model.branch.cls_token, case.weights["backbone.btadapter_cls_token"].flatten())


def test_old_names_and_prefixes():
    case = load("chat_full_tower")
    old = {f"model.vision_tower.{k.replace('btadapter', 'timesFPN')}": v for k, v in case.weights.items()}
    model = load_reference_checkpoint(old, case.vision_config)
    expected = case.model()
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in model.state_dict().items())


def test_sizes_are_read_off_the_tensors():
    case = load(CASE)
    model = load_reference_checkpoint(case.weights, {**case.vision_config})
    bare = load_reference_checkpoint(case.weights)
    assert bare.config.depth == model.config.depth == 4
    found, given = bare.vision_config.to_dict(), model.vision_config.to_dict()
    found.pop("num_attention_heads"), given.pop("num_attention_heads")  # 32 wide: heads cannot be told
    assert found == given


@pytest.mark.parametrize("layers", [2, 3])
def test_instruction_tuning_file_holds_the_branch_alone(clip, layers):
    """Names with ``btadapter`` only, no gates: the tower comes from clip=, gates start half open."""
    model = shake(BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=layers + (layers == 3)))).eval()
    with torch.no_grad():
        model.branch.merge_gate.zero_()
    last = f"_layers.{model.config.depth - 1}." if layers == 3 else "no such name"
    tuned = {k: v for k, v in to_reference_state_dict(model).items() if "btadapter" in k and last not in k}
    with pytest.raises(CheckpointError, match="give clip="):
        load_reference_checkpoint(tuned)
    with pytest.warns(UserWarning, match="half open"):
        again = load_reference_checkpoint(tuned, clip=clip)
    assert again.config.depth == model.config.depth and again.chat_only == (layers == 3)
    torch.testing.assert_close(again.video_tokens(video()), model.video_tokens(video()))
    if again.chat_only:
        with pytest.raises(ValueError, match="only video_tokens works"):
            again(video())


GATES = {"balance1": "output_gate_slope", "balance2": "merge_gate_slope"}


@pytest.mark.parametrize("lacking", [("balance1",), ("balance2",), ("balance1", "balance2")])
def test_file_with_the_tower_was_trained_without_the_gates_it_lacks(lacking, recwarn):
    """Each gate is read off the tensors for itself; where it is missing, the branch computes a plain sum."""
    case = load(CASE)
    weights = {k: v for k, v in case.weights.items() if not k.endswith(lacking)}
    slopes = {GATES[name]: None for name in lacking}
    expected = load_reference_checkpoint(case.weights, case.vision_config, **slopes)  # the gates left out by name
    for given in ({}, {"merge_gate_slope": 100.0, "output_gate_slope": 1e4}):
        model = load_reference_checkpoint(weights, case.vision_config, **given)
        assert {field: getattr(model.config, field) is None for field in GATES.values()} == {
            field: name in lacking for name, field in GATES.items()
        }
        assert torch.equal(model(case.pixels()).video_embeds, expected(case.pixels()).video_embeds)
    assert not [warning for warning in recwarn if "gate" in str(warning.message)]


def test_published_file_without_gates_has_the_published_numbers():
    case = load("clip_pretrain_unmasked_nonorm")
    told, read = case.model(), load_reference_checkpoint(case.weights, case.vision_config)
    assert read.config.merge_gate_slope is read.config.output_gate_slope is None
    assert torch.equal(read(case.pixels()).video_embeds, told(case.pixels()).video_embeds)


def _alone(model) -> dict:
    return {k: v for k, v in to_reference_state_dict(model).items() if "btadapter" in k}


@pytest.mark.parametrize("kept", [("balance1", "balance2"), ("balance1",), ("balance2",), ()])
@pytest.mark.parametrize("place", ["dict", "pth", "safetensors"])
def test_gates_of_a_tuned_branch_come_from_the_pretraining_file(clip, tmp_path, kept, place):
    slopes = {field: None for name, field in GATES.items() if name not in kept}
    model = shake(BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2, **slopes))).eval()
    state = {f"backbone.{name}": tensor.clone() for name, tensor in to_reference_state_dict(model).items()}
    source: object = state
    if place == "pth":
        torch.save({"state_dict": state}, source := tmp_path / "pretrained.pth")
    elif place == "safetensors":
        save_file(state, source := tmp_path / "pretrained.safetensors")
    again = load_reference_checkpoint(_alone(model), clip=clip, gates_from=source)
    assert again.config.merge_gate_slope == model.config.merge_gate_slope
    assert again.config.output_gate_slope == model.config.output_gate_slope
    torch.testing.assert_close(again(video()).video_embeds, model(video()).video_embeds)
    if kept and place == "dict":
        with pytest.warns(UserWarning, match="half open.*gates_from"):
            half = load_reference_checkpoint(_alone(model), clip=clip)
        assert (half(video()).video_embeds - model(video()).video_embeds).abs().max() > 1e-4


def test_gates_from_a_saved_folder_and_what_is_no_source_of_gates(clip, tmp_path):
    model = shake(BTAdapterVisionModel.from_clip(clip, BTAdapterConfig(depth=2))).eval()
    model.save_pretrained(tmp_path / "pretrained")
    again = load_reference_checkpoint(_alone(model), clip=clip, gates_from=tmp_path / "pretrained")
    assert torch.equal(again.branch.merge_gate, model.branch.merge_gate)
    with pytest.raises(CheckpointError, match="has neither"):
        load_reference_checkpoint(_alone(model), clip=clip, gates_from=_alone(model))
    with pytest.raises(ValueError, match="says which gates it has"):
        load_reference_checkpoint(to_reference_state_dict(model), SIZES, gates_from=tmp_path / "pretrained")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_reference_checkpoint(_alone(model), clip=clip, gates_from="nowhere.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update(surplus=torch.zeros(1)), "unexpected: surplus"),
        (lambda w: w.pop("backbone.btadapter_T_layers.1.temporal_fc.bias"), "missing: branch.temporal.1.fc.bias"),
        (lambda w: w.pop("backbone.btadapter_time_embed.weight"), "missing: btadapter_time_embed.weight"),
        (lambda w: w.pop("backbone.position_embedding.weight"), "missing: position_embedding.weight"),
        (lambda w: w.pop("backbone.btadapter_S_layers.0.mlp.fc1.weight"), "missing: btadapter_S_layers.0.mlp.fc1"),
        (
            lambda w: w.update({"backbone.post_layernorm.weight": torch.zeros(5)}),
            r"wrong shape: tower.final_norm.weight is \[5\], expected \[32\]",
        ),
        (lambda w: [w.pop(k) for k in list(w) if "btadapter" in k], "not a BT-Adapter checkpoint"),
        (lambda w: w.update(note="text"), "dict of tensors"),
    ],
)
def test_names_that_do_not_fit(change, message):
    case = load(CASE)
    weights = dict(case.weights)
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load_reference_checkpoint(weights, case.vision_config)


def test_checkpoint_of_another_width():
    case = load(CASE)
    with pytest.raises(CheckpointError, match="hidden_size 64, but the checkpoint's width is 32"):
        load_reference_checkpoint(case.weights, {**case.vision_config, "hidden_size": 64})


class _Evil:
    def __reduce__(self):
        return (print, ("code ran while loading",))


def test_unsafe_pickle(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"x": _Evil()}}, path)
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_reference_checkpoint(path)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="weights_only=True"):
        load_reference_checkpoint(tmp_path / "plain.pth")
    assert "code ran" not in capsys.readouterr().out


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_reference_checkpoint(tmp_path / "none.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="damaged"):
        load_reference_checkpoint(tmp_path / "junk.pth")


def test_way_back_of_what_has_no_name():
    with pytest.raises(CheckpointError, match="branch.output_gate has no published name|branch.merge_gate has no"):
        to_reference_state_dict(make({**SIZES, "model_type": "eva", "hidden_act": "gelu"}))


def test_way_back_is_complete():
    model = shake(make())
    names = set(to_reference_state_dict(model))
    own = model.state_dict()
    packed = sum("qkv_" in name for name in own)  # three published names for one of ours
    assert len(names) == len(own) + 2 * packed and None not in names
    again = load_reference_checkpoint(to_reference_state_dict(model), SIZES, max_frames=8)
    assert torch.equal(again(video()).video_embeds, model(video()).video_embeds)
