"""Models of open_clip as the frozen tower, against open_clip's own forward: `make test-open-clip` runs this."""

from __future__ import annotations

import torchvision_operators  # noqa: F401

# isort: split
import json
from pathlib import Path

import pytest
import torch
from chat_models import ids, make_chat, question
from pretraining import recipe

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel, attach
from bt_adapter.chat.families import family_of
from bt_adapter.errors import CheckpointError
from bt_adapter.eval.stack import load_stack
from bt_adapter.pretrain.run import pretrain
from bt_adapter.towers import open_clip
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.image_models import read_tower
from bt_adapter.towers.text import load_clip

package = pytest.importorskip("open_clip", reason="open_clip is not installed (make test-open-clip)")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
VIT = {"image_size": 28, "layers": 4, "width": 64, "patch_size": 7, "head_width": 32}


def shrunk_vit(**changes):
    """Of open_clip's ViT-L-14: its configuration, shrunk."""
    fields = {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT} | changes
    return _shaken(package.model.CLIP(**fields))


def shrunk_eva(layers: int = 4, width: int = 32, inner: int = 64, heads: int = 2, size: int = 16, patch: int = 4):
    """Of EVA01-g-14: timm's own class with the arguments of eva_giant_patch14_224, shrunk, in open_clip's wrapper."""
    from timm.models.eva import Eva

    model = package.model.CustomTextCLIP(48, VIT, TEXT)
    fields = package.get_model_config("EVA01-g-14")["vision_cfg"]
    visual = package.timm_model.TimmModel.__new__(package.timm_model.TimmModel)
    torch.nn.Module.__init__(visual)
    visual.trunk = Eva(
        img_size=size, patch_size=patch, embed_dim=width, depth=layers, num_heads=heads, mlp_ratio=inner / width,
        num_classes=48, global_pool=fields["timm_pool"],
    )  # fmt: skip
    visual.head, visual.image_size = torch.nn.Sequential(), (size, size)
    model.visual = visual
    return _shaken(model)


def _shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                parameter.zero_()
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


MODELS = {
    "gelu": shrunk_vit,
    "quick-gelu": lambda: shrunk_vit(quick_gelu=True),
    "eps": lambda: shrunk_vit(vision_cfg=VIT | {"norm_kwargs": {"eps": 1e-3}}),
    "gelu-tanh": lambda: shrunk_vit(vision_cfg=VIT | {"act_kwargs": {"approximate": "tanh"}}),
    "eva": shrunk_eva,
}
kinds = pytest.mark.parametrize("kind", MODELS)


def write(model, folder: Path, config: dict | None = None, **preprocess) -> Path:
    """A folder as open_clip's own, with open_clip_config.json; ``preprocess``: of its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def adapter(**fields) -> BTAdapterConfig:
    return BTAdapterConfig(**{"depth": 2, "max_frames": 8, "trained_steps": 8, **fields})


@kinds
@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_hidden_states_and_embeddings_are_open_clips_own(kind, share):
    source = MODELS[kind]()
    model = BTAdapterVisionModel.from_clip(source, adapter(), share=share)
    size = model.vision_config.image_size
    images = torch.randn(2, 3, size, size)
    layers = model.vision_config.num_hidden_layers
    found = source.visual.forward_intermediates(
        images, indices=list(range(layers)), output_fmt="NLC", output_extra_tokens=True, normalize_intermediates=False
    )
    pairs = zip(found["image_intermediates_prefix"], found["image_intermediates"], strict=True)
    for layer, (cls, patches) in enumerate(pairs, 1):
        torch.testing.assert_close(model.tower.run(images, layer), torch.cat([cls, patches], 1), **CLOSE)
    torch.testing.assert_close(model.image_embeds(images), source.encode_image(images), **CLOSE)


def test_a_shared_tower_holds_the_models_own_numbers():
    source = shrunk_vit()
    model = BTAdapterVisionModel.from_clip(source, adapter(), share=True)
    with torch.no_grad():
        source.visual.transformer.resblocks[1].attn.in_proj_weight[64:128] = 7.0
        source.visual.proj[3] = 5.0
    assert (model.tower.layers[1].attention.k_proj.weight == 7).all()
    assert (model.tower.projection.weight[:, 3] == 5).all()


def test_the_true_eva_is_the_tower_of_blip2():
    fields = package.get_model_config("EVA01-g-14")
    fields.pop("custom_text")
    with torch.device("meta"):
        model = package.model.CustomTextCLIP(**fields)
    assert read_tower(model).config == TowerConfig.eva_clip_g(1024)


@torch.no_grad()
def test_names_folders_and_pictures(tmp_path):
    source = shrunk_vit()
    squash = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    folder = write(source, tmp_path / "clip", **squash)
    for name in (str(folder), f"open_clip:{folder}"):
        model = BTAdapterVisionModel.from_clip(name, adapter())
        assert model.tower_name == name
        assert (model.images.mean, model.images.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
        assert (model.images.resample, model.images.resize, model.images.size) == ("bilinear", (28, 28), 28)
        model.save_pretrained(tmp_path / "branch")
        again = BTAdapterVisionModel.from_pretrained(tmp_path / "branch")
        assert again.tower_name == name and again.images == model.images
        images = torch.randn(1, 3, 28, 28)
        torch.testing.assert_close(again.image_embeds(images), source.encode_image(images), **CLOSE)
    # weights from a file, under a name of open_clip's own
    package.add_model_config(_config(tmp_path / "tiny-vit.json"))
    name = f"open_clip:tiny-vit/{folder / 'open_clip_pytorch_model.bin'}"
    torch.testing.assert_close(
        BTAdapterVisionModel.from_clip(name, adapter()).image_embeds(images), source.encode_image(images), **CLOSE
    )


def _config(path: Path) -> Path:
    path.write_text(json.dumps({"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT}))
    return path


@torch.no_grad()
@pytest.mark.parametrize("custom", [False, True])
def test_the_text_tower_and_its_tokenizer(custom, tmp_path):
    config = {"embed_dim": 48, "vision_cfg": VIT, "text_cfg": TEXT} | ({"custom_text": True} if custom else {})
    source = _shaken((package.model.CustomTextCLIP if custom else package.model.CLIP)(48, VIT, TEXT))
    _, text = load_clip(write(source, tmp_path, config))
    captions = ["a dog runs", "a much longer caption about a cat"]
    expected = source.encode_text(package.get_tokenizer("ViT-L-14")(captions))
    torch.testing.assert_close(text(captions), expected, **CLOSE)
    assert (text.width, text.context) == (48, 77)
    assert text.too_long(["a", "dog " * 75, "dog " * 76]) == [2]
    assert not any(p.requires_grad for p in text.parameters()) and not text.train().training


def test_pretraining_and_evaluation(tmp_path):
    folder = str(write(shrunk_vit(), tmp_path / "clip"))
    out = pretrain(recipe(out=tmp_path / "run", data="synthetic", clip=folder, depth=2, steps=2))
    stack = load_stack(folder, str(out))
    assert stack.model.tower_name == folder and stack.text.width == 48


def test_an_eva_branch_is_pretrained_and_goes_into_blip2(tmp_path, monkeypatch):
    """Pretrained beside open_clip's EVA-CLIP, the branch stands in an InstructBLIP over the same tower."""
    chat = make_chat("instructblip")
    theirs = family_of(chat).tower_config
    source = shrunk_eva(
        theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size, theirs.num_attention_heads,
        theirs.image_size, theirs.patch_size,
    )  # fmt: skip
    monkeypatch.setattr(open_clip, "load", lambda name: _named(source, name))
    monkeypatch.setattr(open_clip, "load_tokenizer", lambda name: package.get_tokenizer("EVA01-g-14"))
    name = "open_clip:EVA01-g-14/laion400m_s11b_b41k"
    out = pretrain(recipe(out=tmp_path / "run", data="synthetic", clip=name, depth=2, steps=2))
    settings = json.loads((out / "config.json").read_text())
    assert settings["tower_name"] == name and settings["tower"]["model_type"] == "eva"
    branch = BTAdapterVisionModel.from_pretrained(out)
    tensors, _ = family_of(chat).tower()
    with torch.no_grad():  # the same CLIP in the chat model
        mine = branch.tower.state_dict()
        for key, tensor in tensors.items():
            tensor.copy_(mine[key])
    model = attach(chat, str(out))
    frames = torch.randn(1, 4, 3, theirs.image_size, theirs.image_size)
    tokens = ids(family_of(chat).video_length)
    assert model(input_ids=tokens, pixel_values=frames, **question(chat, 1)).logits.isfinite().all()


def _named(source, name: str):
    source.name_or_path = name
    source.image_settings = open_clip.image_settings(source)
    return source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_type": "avg"}, "pools all tokens"),
        ({"attentional_pool": True, "attn_pooler_heads": 4}, "pools all tokens"),
        ({"qk_norm": True}, "layers"),
        ({"ls_init_value": 0.1}, r"unexpected: .*ls_1\.gamma"),
        ({"layers": (1, 1, 1, 1), "image_size": 64}, "ModifiedResNet"),
    ],
)
def test_other_structures_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        BTAdapterVisionModel.from_clip(shrunk_vit(vision_cfg=VIT | changes), adapter())


def test_other_towers_of_timm_are_refused():
    for name in ("ViT-B-16-SigLIP", "EVA02-B-16"):
        fields = package.get_model_config(name)
        fields.pop("custom_text")
        with torch.device("meta"):
            model = package.model.CustomTextCLIP(**fields)
        with pytest.raises(CheckpointError, match="cannot be the tower"):
            BTAdapterVisionModel.from_clip(model, adapter())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("open_clip:ViT-L-14", "has no weights ''"),
        ("open_clip:ViT-L-14/no_such", "laion2b_s32b_b82k"),
        ("open_clip:ViT-Q-14/openai", "no model 'ViT-Q-14'"),
    ],
)
def test_names_that_are_not_there(name, message):
    with pytest.raises(CheckpointError, match=message):
        load_clip(name)


def test_broken_folders(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg"')
    with pytest.raises(CheckpointError, match="open_clip_config.json"):
        load_clip(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="open_clip_config.json"):
        load_clip(f"open_clip:{tmp_path / 'empty'}")
    folder = write(shrunk_vit(vision_cfg=VIT | {"width": 32}), tmp_path / "other")
    with pytest.raises(CheckpointError, match="open_clip cannot load it"):
        load_clip(folder)
