"""CLIPs from folders: in half precision, with their own normalisation, of another kind, with weights missing."""

import json

import pytest
import torch
from pretraining import recipe
from safetensors.torch import load_file, save_file
from small_models import SIZES, make
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTModel,
)

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.data.image_settings import ImageSettings, read_image_settings
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.eval.stack import load_stack
from bt_adapter.pretrain.run import with_clip
from bt_adapter.towers.image_models import load_image_model, read_tower
from bt_adapter.towers.text import load_clip


@pytest.fixture
def vision(tmp_path):
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES)).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


@pytest.fixture
def whole(tmp_path):
    """A CLIP with both towers and the mini stack's tokenizer, 48 px."""
    clip, text = load_clip("mini")
    clip.save_pretrained(tmp_path / "clip")
    text.tokenizer.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
def test_clips_are_float32_whatever_they_were_stored_in(whole, stored):
    CLIPModel.from_pretrained(whole, dtype=stored).save_pretrained(whole)
    model, text = load_clip(whole)
    assert {p.dtype for p in [*model.parameters(), *text.parameters()]} == {torch.float32}
    assert {t.dtype for t in read_tower(load_image_model(whole)).tensors.values()} == {torch.float32}
    assert load_stack(str(whole), None, use_branch=False).model.tower.dtype == torch.float32


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_the_programs_default_dtype_rounds_nothing(tmp_path, vision, default):
    fresh = BTAdapterVisionModel.from_clip(vision, BTAdapterConfig(depth=2))
    fresh.save_pretrained(tmp_path / "branch")
    torch.set_default_dtype(default)
    try:
        loaded = BTAdapterVisionModel.from_pretrained(tmp_path / "branch", vision)
        assert {p.dtype for p in BTAdapterVisionModel.from_clip(vision).parameters()} == {torch.float32}
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in fresh.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(loaded.state_dict()[name], tensor), name


def test_what_is_no_whole_clip_is_named(tmp_path, vision):
    ViTModel(
        ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path / "vit")
    for load in (load_clip, BTAdapterVisionModel.from_clip):
        with pytest.raises(CheckpointError, match="of type 'vit', expected a CLIP"):
            load(tmp_path / "vit")
        with pytest.raises(FileNotFoundError, match="did you mean .*vision"):
            load(tmp_path / "visoin")
    with pytest.raises(CheckpointError, match="missing: .*text_model"):
        load_clip(vision)  # a vision tower alone has no text encoder
    file = vision / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith("layers.1.mlp.fc1.bias"))
    save_file({n: t for n, t in state.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing: .*layers.1.mlp.fc1.bias"):
        BTAdapterVisionModel.from_clip(vision)
    save_file({**state, name: state[name][:-1]}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wrong shape: .*fc1.bias is \[63\], expected \[64\]"):
        BTAdapterVisionModel.from_clip(vision)


SETTINGS = [
    {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    {"image_mean": 0.4, "image_std": 0.3},
    {"size": {"shortest_edge": 20}},
    {"size": {"height": 16, "width": 16}, "do_center_crop": False},
    {"resample": 2},
    {"do_normalize": False},
    {"do_rescale": False, "image_mean": [120.0] * 3, "image_std": [60.0] * 3},
    {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
]


@pytest.mark.parametrize("values", SETTINGS)
def test_frames_are_prepared_as_the_folders_own_processor_does(vision, values):
    base = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    processor = CLIPImageProcessorPil(**{**base, **values})
    processor.save_pretrained(vision)
    model = BTAdapterVisionModel.from_clip(vision, BTAdapterConfig(depth=2))
    frames = torch.randint(256, (3, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = processor(list(frames.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    level = expected.abs().max() / 100 + 1e-3
    assert (model.images.prepare(frames) - expected).abs().max() <= 2 * level
    model.save_pretrained(vision.parent / "branch")
    stored = json.loads((vision.parent / "branch" / "config.json").read_text())["images"]
    assert ImageSettings.of_dict(stored) == model.images
    assert BTAdapterVisionModel.from_pretrained(vision.parent / "branch", vision).images == model.images
    (vision / "preprocessor_config.json").unlink(missing_ok=True)
    (vision / "processor_config.json").unlink(missing_ok=True)
    assert read_image_settings(vision, 16) == ImageSettings(16)  # CLIP's own where nothing is said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"crop_size": {"height": 20, "width": 20}}, "crop_size is"),
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": 1, "size": {"shortest_edge": 20}}, "resample is 1"),
        ({"size": {"shortest_edge": 12}}, "size is 12"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"image_std": 0}, "image_std"),
        ({"image_mean": "half"}, "image_mean"),
        ({"image_mean": [[0.5], [0.5], [0.5]]}, "image_mean"),
        ({"size": {"longest_edge": 16}}, "size is"),
    ],
)
def test_settings_that_cannot_be_had_are_refused(vision, values, message):
    base = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    (vision / "preprocessor_config.json").write_text(json.dumps({**base, **values}))
    with pytest.raises(CheckpointError, match=message):
        BTAdapterVisionModel.from_clip(vision)


def test_pretraining_asks_for_its_clip_or_takes_that_of_init(tmp_path, whole):
    with pytest.raises(CommandError, match="--clip is missing"):
        with_clip(recipe(clip=None))
    assert with_clip(recipe(clip="mini")).clip == "mini"
    BTAdapterVisionModel.from_clip(whole, BTAdapterConfig(depth=2)).save_pretrained(tmp_path / "branch")
    assert with_clip(recipe(clip=None, init=str(tmp_path / "branch"))).clip == str(whole)
    stack = load_stack(None, str(tmp_path / "branch"))
    assert stack.clip == str(whole) and stack.model.config.depth == 2
    make().save_pretrained(tmp_path / "nameless")
    for call in (
        lambda: with_clip(recipe(clip=None, init=str(tmp_path / "nameless"))),
        lambda: load_stack(None, str(tmp_path / "nameless")),
    ):
        with pytest.raises(CommandError, match="--clip is missing.*names none"):
            call()
