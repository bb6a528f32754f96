"""Which image models can be the frozen tower: each against the library's own forward, hidden states and embeddings."""

import json
from pathlib import Path

import image_models
import pytest
import torch
from pretraining import recipe
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPVisionModel, PreTrainedTokenizerFast

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.eval.stack import load_stack
from bt_adapter.model.checkpoint import check_fit
from bt_adapter.pretrain.run import pretrain
from bt_adapter.towers import dinov2, open_clip, rows, siglip
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.image_models import read_tower
from bt_adapter.towers.text import load_clip
from bt_adapter.towers.tower import Tower
from bt_kernels import VisibleTokens

CLOSE = {"rtol": 2e-5, "atol": 2e-5}
MAKERS = {
    "clip-quick": lambda: image_models.clip("quick_gelu"),
    "clip-gelu": lambda: image_models.clip("gelu", 1e-6),
    "siglip": image_models.siglip,
    "dinov2": image_models.dinov2,
    "dinov2-registers": lambda: image_models.dinov2(registers=4),
}
kinds = pytest.mark.parametrize("kind", MAKERS)


def adapter(**fields) -> BTAdapterConfig:
    return BTAdapterConfig(**{"depth": 2, "max_frames": 8, "trained_steps": 8, **fields})


def pixels(model: BTAdapterVisionModel, *shape: int) -> torch.Tensor:
    size = model.vision_config.image_size
    return torch.randn(*shape, 3, size, size, generator=torch.Generator().manual_seed(3))


@kinds
@pytest.mark.parametrize("runs", ["in place", "called", "by kernels", "by products of bt_kernels"])
@torch.no_grad()
def test_hidden_states_after_every_layer_are_the_librarys_own(kind, runs, monkeypatch):
    source = MAKERS[kind]()
    model = BTAdapterVisionModel.from_clip(source, adapter())
    if runs.startswith("by"):  # as on a GPU, here by their references
        monkeypatch.setattr(rows, "has_kernels", lambda x: True)
    if runs == "by products of bt_kernels":
        for layer in model.tower.layers:
            layer.products = "bt_kernels"
    if runs == "called":  # a hook: the parts are called as modules
        model.tower.layers[1].fc1.register_forward_hook(lambda module, args, output: output)
    images = pixels(model, 2)
    vision = getattr(source, "vision_model", source)
    theirs = vision(pixel_values=images, output_hidden_states=True).hidden_states
    registers, patches = model.vision_config.num_register_tokens, model.vision_config.patches
    for layer in range(model.vision_config.num_hidden_layers + 1):
        mine, expected = model.tower.run(images, layer), theirs[layer]
        if layer > 1:
            alone = model.tower.run_layer(layer - 1, model.tower.run(images, layer - 1))
            torch.testing.assert_close(alone, mine, **CLOSE)
        if kind == "siglip":
            assert mine.shape[1] == 1 + expected.shape[1]
            torch.testing.assert_close(mine[:, 0], expected.mean(1), **CLOSE)
            torch.testing.assert_close(mine[:, 1:], expected, **CLOSE)
            continue
        torch.testing.assert_close(mine[:, 0], expected[:, 0], **CLOSE)
        torch.testing.assert_close(mine[:, 1 : 1 + patches], expected[:, 1 + registers :], **CLOSE)
        torch.testing.assert_close(mine[:, 1 + patches :], expected[:, 1 : 1 + registers], **CLOSE)


@pytest.mark.parametrize("kind", ["clip-quick", "clip-gelu", "siglip"])
@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_embeddings_of_stills_are_the_librarys_own(kind, share):
    source = MAKERS[kind]()
    model = BTAdapterVisionModel.from_clip(source, adapter(), share=share)
    images = pixels(model, 3)
    expected = source.get_image_features(pixel_values=images)
    expected = getattr(expected, "pooler_output", expected)
    torch.testing.assert_close(model.image_embeds(images), expected, **CLOSE)
    if share:
        lower = source.vision_model.encoder.layers[0].mlp.fc1.weight
        assert model.tower.layers[0].fc1.weight.data_ptr() == lower.data_ptr()


@kinds
@torch.no_grad()
def test_video_tokens_of_a_branch_that_adds_nothing_new(kind):
    """One frame, and a branch whose layers add nothing: the formula of video tokens written out."""
    source = MAKERS[kind]()
    model = BTAdapterVisionModel.from_clip(source, adapter(merge_gate_slope=1e4)).eval()
    branch, config = model.branch, model.vision_config
    for layer in branch.spatial:
        for part in (layer.attention.out_proj, layer.fc2):
            part.weight.zero_()
            part.bias.zero_()
    branch.cls_token.normal_()
    frames = pixels(model, 2, 1)
    x = [model.tower.run(frames[:, 0], layer)[:, : 1 + config.patches] for layer in (3,)][0]  # output of layer L-2
    position = model.tower.position
    z_cls = (x[:, 0] + branch.cls_token + position[0]) / 2
    z = x[:, 1:] + position[1:] + branch.time[0]
    expected = torch.cat([(x[:, 1:] + z) / 2, ((x[:, 0] + z_cls) / 2)[:, None]], 1)
    torch.testing.assert_close(model.video_tokens(frames), expected, **CLOSE)
    if kind == "siglip":
        assert not position[0].any()


@kinds
def test_learning_beside_it(kind):
    model = BTAdapterVisionModel.from_clip(MAKERS[kind](), adapter(drop_path=0.0))
    model.branch.requires_grad_(True)
    frames = pixels(model, 2, 4)
    plain = BTAdapterVisionModel.from_clip(MAKERS[kind](), adapter(drop_path=0.0, fused=False))
    plain.branch.load_state_dict(model.branch.state_dict())
    if model.vision_config.projection_dim is None:
        with pytest.raises(ValueError, match="only video_tokens"):
            model(frames)
        results = [m.video_tokens(frames).square().sum() for m in (model, plain)]
    else:
        visible = VisibleTokens.tube(2, model.vision_config.patches, 4, 0.5, torch.Generator().manual_seed(1))
        text = torch.randn(2, model.vision_config.projection_dim, generator=torch.Generator().manual_seed(2))
        results = [sum(m.pretraining_losses(m(frames, visible), text).values()) for m in (model, plain)]
    for result in results:
        result.backward()
    torch.testing.assert_close(results[0], results[1])
    names = [name for name, p in model.branch.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert {"cls_token", "time", "temporal.0.fc.weight", "spatial.0.fc1.weight"} <= set(names)
    for (name, mine), theirs in zip(model.branch.named_parameters(), plain.branch.parameters(), strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(p.requires_grad for p in model.tower.parameters())


@torch.no_grad()
def test_a_siglip_is_found_whole_behind_an_open_gate():
    """Where the output gate lets the tower through alone, a video is the mean of SigLIP's embeddings of its frames."""
    source = image_models.siglip()
    model = BTAdapterVisionModel.from_clip(source, adapter()).eval()
    model.branch.output_gate.fill_(1.0)
    frames = pixels(model, 2, 3)
    expected = source.get_image_features(pixel_values=frames.flatten(0, 1))
    expected = getattr(expected, "pooler_output", expected).unflatten(0, (2, 3))
    output = model(frames)
    torch.testing.assert_close(output.frame_embeds, expected, **CLOSE)
    torch.testing.assert_close(output.video_embeds, expected.mean(1), **CLOSE)
    model.branch.output_gate.fill_(-1.0)  # and the branch alone: its CLS as a sequence of one token
    cls = source.vision_model.post_layernorm(model(frames).branch_tokens[:, :1])
    expected = source.vision_model.head(cls)
    torch.testing.assert_close(model(frames).video_embeds, expected, **CLOSE)


@kinds
@torch.no_grad()
def test_a_saved_branch_finds_its_tower_again(kind, tmp_path):
    source = MAKERS[kind]()
    source.save_pretrained(tmp_path / "model")
    model = BTAdapterVisionModel.from_clip(tmp_path / "model", adapter()).eval()
    model.save_pretrained(tmp_path / "branch")
    again = BTAdapterVisionModel.from_pretrained(tmp_path / "branch")
    assert again.tower_name == model.tower_name == str(tmp_path / "model")
    assert again.vision_config == model.vision_config == read_tower(source).config
    frames = pixels(model, 1, 2)
    assert torch.equal(again.video_tokens(frames), model.video_tokens(frames))
    other = MAKERS["clip-quick" if kind != "clip-quick" else "clip-gelu"]()
    with pytest.raises(CheckpointError, match="hidden_act|model_type"):
        BTAdapterVisionModel.from_pretrained(tmp_path / "branch", clip=other)
    model.save_pretrained(tmp_path / "whole", include_tower=True)
    whole = BTAdapterVisionModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(whole.video_tokens(frames), model.video_tokens(frames))


def test_models_that_lack_a_part():
    clip = image_models.clip("gelu")
    alone = BTAdapterVisionModel.from_clip(CLIPVisionModel(clip.config.vision_config), adapter())
    assert alone.vision_config.projection_dim is None and alone.vision_config.hidden_act == "gelu"
    headless = image_models.siglip(vision_use_head=False)
    assert BTAdapterVisionModel.from_clip(headless, adapter()).vision_config.projection_dim is None
    with pytest.raises(CheckpointError, match="use_swiglu_ffn"):
        BTAdapterVisionModel.from_clip(image_models.dinov2(use_swiglu_ffn=True), adapter())
    with pytest.raises(ValueError, match="share must be False"):
        BTAdapterVisionModel.from_clip(image_models.dinov2(), adapter(), share=True)


@torch.no_grad()
def test_dinov2_takes_pictures_of_the_size_its_processor_makes(tmp_path):
    """As facebook/dinov2-base: a table of places for 518 pixels, pictures of 224; here 42 and 28."""
    source = image_models.dinov2(registers=2, image_size=42)
    source.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
                "do_center_crop": True, "crop_size": {"height": 28, "width": 28}, "resample": 3, "do_rescale": True,
                "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
            }
        )
    )  # fmt: skip
    model = BTAdapterVisionModel.from_clip(tmp_path, adapter())
    assert (model.vision_config.image_size, model.images.size, model.images.resize) == (28, 28, 32)
    assert model.images.mean == (0.485, 0.456, 0.406)
    images = pixels(model, 2)
    expected = source(pixel_values=images, output_hidden_states=True).hidden_states[4]
    torch.testing.assert_close(model.tower.run(images, 4)[:, 1:17], expected[:, 3:], **CLOSE)


def write_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"<pad>": 1, "</s>": 2, "<s>": 3, "clip": 4, "of": 5, "a": 6}, "a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    ).save_pretrained(folder)


@torch.no_grad()
def test_siglips_text_tower(tmp_path):
    source = image_models.siglip()
    source.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    _, text = load_clip(tmp_path)
    captions = ["a clip", "clip of a clip of a"]
    tokens = text.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
    expected = source.get_text_features(input_ids=tokens)
    torch.testing.assert_close(text(captions), getattr(expected, "pooler_output", expected), **CLOSE)
    assert text.width == 144 and text.context == 16
    assert text.too_long(["a", " ".join(["clip"] * 15), " ".join(["clip"] * 16)]) == [2]


def test_a_branch_is_pretrained_and_evaluated_beside_a_siglip(tmp_path):
    image_models.siglip().save_pretrained(tmp_path / "siglip")
    write_tokenizer(tmp_path / "siglip")
    out = pretrain(recipe(out=tmp_path / "run", data="synthetic", clip=str(tmp_path / "siglip"), depth=2, steps=2))
    stack = load_stack(str(tmp_path / "siglip"), str(out))
    assert stack.model.tower_name == str(tmp_path / "siglip") and stack.model.vision_config.is_siglip
    assert load_stack(str(tmp_path / "siglip"), None, use_branch=False).text.width == 144


def test_a_dinov2_has_no_text_tower(tmp_path):
    image_models.dinov2().save_pretrained(tmp_path / "dinov2")
    with pytest.raises(CommandError, match="DINOv2, which has no text tower"):
        pretrain(recipe(out=tmp_path / "run", data="synthetic", clip=str(tmp_path / "dinov2"), steps=1))
    with pytest.raises(CommandError, match="DINOv2, which has no text tower"):
        load_stack(str(tmp_path / "dinov2"), None, use_branch=False)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("siglip2", "fixed resolution are supported, not NaFlex"), ("vit", "expected a CLIP of Hugging Face")],
)
def test_other_models_are_refused_by_name(kind, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    for load in (load_clip, BTAdapterVisionModel.from_clip):
        with pytest.raises(CheckpointError, match=message):
            load(tmp_path)


TRUE = json.loads((Path(__file__).parent / "tower_names.json").read_text())


@pytest.mark.parametrize("name", TRUE)
def test_names_of_the_true_models_fit(name):
    """State dicts of the true configurations, names and shapes without numbers, against the tower built for them."""
    about = TRUE[name]
    config = TowerConfig(**about["config"])
    tensors = {
        written.replace("{}", str(layer)): torch.empty(shape, device="meta")
        for written, shape in about["tensors"].items()
        for layer in range(config.num_hidden_layers if "{}" in written else 1)
    }
    if about["kind"] == "dinov2":
        tensors, _ = dinov2.own_tensors(tensors)
        tensors["position"] = torch.empty(config.rows - config.num_register_tokens, config.hidden_size, device="meta")
    else:
        tensors = {
            "siglip": siglip.own_tensors, "clip": open_clip.clip_tensors, "eva": open_clip.eva_tensors,
        }[about["kind"]](tensors)  # fmt: skip
    with torch.device("meta"):
        tower = Tower(config)
    check_fit(tower, tensors, name)


def test_an_open_clip_name_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(CommandError, match=r"bt-adapter\[open-clip\]"):
        BTAdapterVisionModel.from_clip("open_clip:ViT-L-14/laion2b_s32b_b82k")
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(CommandError, match=r"bt-adapter\[open-clip\]"):
        load_clip(tmp_path)
