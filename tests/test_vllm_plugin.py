"""The parts of the plug-in for vLLM that need no vLLM; `make test-vllm` runs the small stack under vLLM itself."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_models import SIZE, make_branch, make_chat, stills, videos
from PIL import Image
from safetensors.torch import load_file
from tuning import make_tokenizer, write_clips

from bt_adapter.chat.attach import attach
from bt_adapter.chat.families import family_of
from bt_adapter.data import VideoError, read_video
from bt_adapter.native import NATIVE_CLASSES, make_processor
from bt_adapter.vllm.encoder import VisualEncoder
from bt_adapter.vllm.frames import decode
from bt_adapter.vllm.inputs import count_tokens, prepare, video_token
from bt_adapter.vllm.names import ENCODER, LANGUAGE, SERVED, rename


@pytest.fixture(params=SERVED)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 1)
    return (folder / "clip0.mp4").read_bytes()


def make(name: str):
    """A video chat model of random weights and its processor."""
    model = make_chat(name)
    model = attach(model, make_branch(model)).eval()
    return model, make_processor(model, make_tokenizer())


def saved(model, folder) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def loaded(model, folder) -> VisualEncoder:
    """The encoder, with the weights of a saved model under the names that vLLM gives them."""
    encoder = VisualEncoder(model.config)
    renamed = {rename(one): weight for one, weight in saved(model, folder).items()}
    own = {one.removeprefix(f"{ENCODER}."): w for one, w in renamed.items() if one.startswith(f"{ENCODER}.")}
    encoder.load_state_dict(own)  # strictly: none is missing, none is left over
    return encoder


def test_the_core_and_the_entry_point_import_no_vllm():
    group = tomllib.loads(Path("pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = group["bt_adapter"].partition(":")
    code = (
        f"import sys, {module}, bt_adapter.native; assert callable({module}.{function}); "
        "print(sorted({'vllm', 'lmms_eval'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_videos_and_stills_are_encoded_as_by_the_whole_model(name, tmp_path):
    model, _ = make(name)
    encoder = loaded(model, tmp_path)
    two = videos(2, 4)
    for mine, whole in zip(encoder.videos(list(two)), model.get_video_features(two).pooler_output, strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=0)
    one, longer = two[0], torch.cat([two[1], two[0]])
    assert [len(tokens) for tokens in encoder.videos([one, longer])] == [family_of(model).video_length] * 2
    given, _ = stills(name)
    sizes = given.get("image_sizes", [None] * len(given["pixel_values"]))
    sizes = [size if size is None else tuple(size.tolist()) for size in sizes]
    whole = model.model.get_image_features(**given).pooler_output
    for mine, expected in zip(encoder.stills(list(given["pixel_values"]), sizes), whole, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_the_branch_of_the_configuration_is_obeyed(tmp_path):
    model, _ = make("llava")
    model.config.use_branch = False
    encoder = loaded(model, tmp_path)
    expected = model.get_video_features(videos(1), use_branch=False).pooler_output[0]
    torch.testing.assert_close(encoder.videos(list(videos(1)))[0], expected, rtol=0, atol=0)
    model.config.use_branch = True
    assert not torch.equal(loaded(model, tmp_path / "on").videos(list(videos(1)))[0], expected)


def test_weights_of_the_language_model_get_the_names_of_vllm(name, tmp_path):
    model, _ = make(name)
    language = {rename(one) for one in saved(model, tmp_path) if not rename(one).startswith(f"{ENCODER}.")}
    inner = {f"{LANGUAGE}.model.{one}" for one, _ in family_of(model).language_model.named_parameters()}
    assert language == inner | {f"{LANGUAGE}.lm_head.weight"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("vision_tower.vision_model.encoder.x", "encoder.chat.model.vision_tower.encoder.x"),
        ("model.vision_tower.embeddings.x", "encoder.chat.model.vision_tower.embeddings.x"),
        ("image_newline", "encoder.chat.model.image_newline"),
        ("model.bt_adapter.time", "encoder.chat.model.bt_adapter.time"),
        ("language_model.model.layers.0.x", "language_model.model.layers.0.x"),
        ("model.language_model.layers.0.x.lora_A.weight", "language_model.model.layers.0.x.lora_A.weight"),
        ("lm_head.weight", "language_model.lm_head.weight"),
    ],
)
def test_names(theirs, ours):
    assert rename(theirs) == ours


@pytest.mark.parametrize("part", ["vision_tower.encoder.layers.0.self_attn", "bt_adapter.spatial.0"])
def test_adapters_outside_of_the_language_model_get_a_name_that_vllm_refuses(part):
    # vLLM compares the last part of the layer's name with those of the language model's layers
    *layer, kind, weight = rename(f"model.{part}.q_proj.lora_B.weight").split(".")
    assert layer[-1].startswith("only_adapters_of_the_language_model") and (kind, weight) == ("lora_B", "weight")


def test_other_families_are_refused():
    config = NATIVE_CLASSES["blip-2"].config_class()
    with pytest.raises(ValueError, match="model_type must be one of bt_adapter_llava, .*but is bt_adapter_blip_2"):
        VisualEncoder(config)


def test_inputs_are_those_of_the_processor(name):
    model, processor = make(name)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 31, 3), np.uint8))
    frames = np.random.default_rng(1).integers(0, 255, (6, 30, 20, 3), np.uint8)
    found = prepare(processor, [picture, picture.resize((64, 64))], [frames, frames[:3]])
    whole = processor(images=[picture], videos=[frames], text="<image> <video>", return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"][0], whole["pixel_values"][0], rtol=0, atol=0)
    torch.testing.assert_close(found["pixel_values_videos"][0], whole["pixel_values_videos"][0], rtol=0, atol=0)
    assert [len(video) for video in found["pixel_values_videos"]] == [6, 3]
    ids = whole["input_ids"][0]
    assert count_tokens(processor, 20, 31) == int((ids == model.config.image_token_index).sum())
    assert processor.video_length == int((ids == video_token(model.config)).sum())
    fewer = prepare(processor, [], [frames], {"num_frames": 2})["pixel_values_videos"][0]
    torch.testing.assert_close(fewer, whole["pixel_values_videos"][0][[1, 4]], rtol=0, atol=0)
    assert prepare(processor, [], []) == {}


@pytest.mark.parametrize(
    ("options", "message"), [({"fps": 2, "crop": 1}, "have crop, fps"), ({"num_frames": 0}, "is 0")]
)
def test_options_of_inputs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prepare(make("llava")[1], [], [np.zeros((2, SIZE, SIZE, 3), np.uint8)], options)


def test_a_configuration_without_a_video_token_is_refused():
    config = NATIVE_CLASSES["llava"].config_class(bt_adapter={"branch": {"depth": 2}})
    with pytest.raises(ValueError, match="video_token_index: write the folder with bt-adapter export"):
        video_token(config)


def test_frames_are_those_of_our_reader(clip):
    whole = read_video(clip, None)
    frames, about = decode(clip, num_frames=4)
    expected = read_video(clip, 4)
    assert frames.dtype == np.uint8 and frames.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(frames, expected.frames.permute(0, 2, 3, 1).numpy())
    assert about["frames_indices"] == expected.indices.tolist() and about["total_num_frames"] == whole.total
    assert len(decode(clip)[0]) == whole.total
    assert len(decode(clip, num_frames=whole.total + 3)[0]) == whole.total + 3  # repeated


def test_frames_a_second_are_limited_by_the_number_of_frames(clip):
    whole = read_video(clip, None)
    all_frames, about = decode(clip, num_frames=100, fps=1000)
    assert len(all_frames) == whole.total == len(about["frames_indices"])
    few, about = decode(clip, num_frames=32, fps=2 / whole.duration)
    assert len(few) == 2 == len(about["frames_indices"])
    np.testing.assert_array_equal(few, all_frames[about["frames_indices"]])
    assert len(decode(clip, num_frames=3, fps=1000)[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 0}, "num_frames must be a positive int, or -1"),
        ({"num_frames": True}, "num_frames must be a positive int, or -1"),
        ({"fps": 0}, "fps must be a number above 0, or -1"),
        ({"fps": float("nan")}, "fps must be a number above 0, or -1"),
        ({"side": -3}, "side must be a positive int"),
        ({"backend": "opencv"}, "num_frames, fps and side with this decoder, but have backend"),
    ],
)
def test_options_of_the_decoder_are_refused(clip, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        decode(clip, **options)


def test_junk_is_no_video():
    with pytest.raises(VideoError):
        decode(b"junk", num_frames=4)
