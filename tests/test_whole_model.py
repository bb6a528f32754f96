"""Folders that transformers loads by itself: what tuning writes beside its parts, and `bt-adapter export`."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

import chat_models as families
import pytest
import torch
from peft import PeftModel
from test_hf_models import make_native
from test_hf_processors import processor_of
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Blip2Processor,
    InstructBlipProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from tuning import make_tokenizer, recipe, write_data

from bt_adapter import tune
from bt_adapter.chat.attach import attached_branch, video_tokens
from bt_adapter.chat.engine import VideoChat, read
from bt_adapter.chat.families import family_of
from bt_adapter.chat.native import saving
from bt_adapter.chat.tuned import projector_of
from bt_adapter.commands import cli
from bt_adapter.files import writing
from bt_adapter.native import NATIVE_CLASSES
from bt_adapter.tune.run import tune as run_tuning

QUESTION = "how is it moving ?"


def write_stand(folder, name: str):
    """Folders of an image chat model with its own processor (``chat``) and of a branch, and questions about clips."""
    chat = families.make_chat(name)
    torch.nn.init.normal_(family_of(chat).lm_head.weight, std=0.5)  # or all answers are one
    families.make_branch(chat, trained_steps=4).save_pretrained(folder / "branch")
    chat.save_pretrained(folder / "chat")
    images = processor_of(make_native(name)[0]).image_processor
    images.image_mean = [0.3, 0.4, 0.5]  # other than CLIP's
    if name in ("blip-2", "instructblip"):
        images = BlipImageProcessorPil(
            size={"height": families.SIZE, "width": families.SIZE}, image_mean=[0.3, 0.4, 0.5]
        )
    if name == "blip-2":
        processor = Blip2Processor(images, make_tokenizer(), num_query_tokens=families.QUERIES)
    elif name == "instructblip":
        processor = InstructBlipProcessor(images, make_tokenizer(), make_tokenizer(), families.QUERIES)
    else:
        processor = (LlavaNextProcessor if name == "llava_next" else LlavaProcessor)(images, make_tokenizer(), 8)
    processor.save_pretrained(folder / "chat")
    write_data(folder / "clips", 2)
    return folder


def options_of(folder, **changes):
    return recipe(
        data=str(folder / "clips/data.json"), out=folder / "run", model=str(folder / "chat"),
        branch=str(folder / "branch"), learn=("projector", "branch", "lora"), steps=3, lr=0.02, frames=6, batch_size=2,
        **changes,
    )  # fmt: skip


def answer_by_transformers(folder, clip, question=QUESTION, longest=6) -> tuple[list[int], torch.Tensor]:
    """Token ids, and the frames that were taken."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    parts = [{"type": "video", "path": str(clip)}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), inputs["pixel_values_videos"]


def answer_by_chat(chat: VideoChat, clip, frames: int) -> str:
    return chat.ask(chat.encode(read(clip, frames, repeat=True)), QUESTION, 6).text


def check_same_answers(folder, chat: VideoChat, clips, frames: int) -> None:
    for number in range(2):
        clip = clips / f"clip{number}.mp4"
        ids, pixels = answer_by_transformers(folder, clip)
        assert pixels.shape[1] == frames
        torch.testing.assert_close(pixels, chat.prepare(read(clip, frames, repeat=True).frames))
        assert ids and chat.tokenizer.decode(ids, skip_special_tokens=True) == answer_by_chat(chat, clip, frames)


@pytest.mark.parametrize("name", ["llava", "llava_next", "vipllava", "blip-2"])
def test_tuning_writes_a_model_that_transformers_loads_by_itself(name, tmp_path, capsys):
    stand = write_stand(tmp_path, name)
    tuned = run_tuning(options_of(stand))
    folder = stand / "run/model"
    assert f"the whole model, which transformers loads by itself, is in {folder}" in capsys.readouterr().err
    chat = tune.load(tuned)
    check_same_answers(folder, chat, stand / "clips", 6)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is NATIVE_CLASSES[name]
    wanted = chat.model.state_dict()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=0, msg=key)
    untuned = VideoChat.load(stand / "chat", stand / "branch").model.state_dict()
    changed = {key for key, tensor in wanted.items() if not torch.equal(tensor, untuned[key])}
    for part in ("q_proj", "bt_adapter.temporal", "proj"):  # adapters, branch, projector
        assert any(part in key for key in changed), part
    assert attached_branch(model).config == attached_branch(chat.model).config  # its trained steps among it

    base = VideoChat.load(stand / "chat", tuned / "branch")
    theirs = PeftModel.from_pretrained(base.model, tuned / "lora")
    pixels = families.videos(1)
    ids = families.ids(chat.family.video_length)
    with torch.no_grad():
        for owner in (chat.model, base.model):
            projector = projector_of(owner)
            projector.load_state_dict(projector_of(chat.model).state_dict())
        expected = chat.model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(theirs(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
        native = ids.masked_fill(ids == families.IMAGE_TOKEN, model.video_token_id)
        found = model(input_ids=native, pixel_values_videos=pixels).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_whole_model_is_left_out_where_that_is_asked_for_or_it_would_be_another(tmp_path, capsys):
    stand = write_stand(tmp_path, "llava")
    folder = stand / "run/model"
    tuned = run_tuning(options_of(stand, save_model=False))
    said = " ".join(capsys.readouterr().err.split())
    assert not folder.exists() and f"bt-adapter export {tuned} {folder} writes it" in said
    run_tuning(options_of(stand))  # the finished run again, which writes what it lacks
    assert folder.is_dir()
    capsys.readouterr()
    run_tuning(options_of(stand, save_model=False))
    assert f"{folder} is of an earlier part of this run" in " ".join(capsys.readouterr().err.split())
    pytest.importorskip("bitsandbytes")
    few = options_of(stand, quantize="nf4")
    few = recipe(**vars(few) | {"out": stand / "few"})
    tuned = run_tuning(few)
    assert tune.is_tuned(tuned) and not (stand / "few/model").exists()
    assert "tuned beside weights in nf4" in " ".join(capsys.readouterr().err.split())


def test_a_run_killed_while_it_writes_leaves_no_half_model_and_writes_it_the_next_time(tmp_path, monkeypatch):
    stand = write_stand(tmp_path, "llava")
    folder = stand / "run/model"

    @contextmanager
    def killed(folder):
        with writing(folder) as temporary:
            yield temporary
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving, "writing", killed)
        with pytest.raises(KeyboardInterrupt):
            run_tuning(options_of(stand))
    assert tune.is_tuned(stand / "run/tuned") and not folder.exists()
    run_tuning(options_of(stand))
    whole = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= whole
    assert not [name for name in os.listdir(stand / "run") if "writing" in name]
    modes = {path.stat().st_mode for path in folder.iterdir() if path.is_file()}
    assert len(modes) == 1
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    run_tuning(options_of(stand))  # a full disk costs this run nothing
    assert {path.name for path in folder.iterdir()} == whole


def test_a_model_that_was_handed_over_is_written_with_its_adapters_merged(tmp_path):
    stand = write_stand(tmp_path, "llava")
    chat = VideoChat.load(stand / "chat", stand / "branch")
    tuned = run_tuning(options_of(stand), chat)
    check_same_answers(stand / "run/model", tune.load(tuned), stand / "clips", 6)


@pytest.mark.parametrize(
    ("learn", "long", "expected"),
    [
        (("projector",), "interpolate", "interpolate"),
        (("projector",), "published", "published"),
        (("projector", "branch"), "published", "average"),  # which takes the same steps of as many frames
    ],
)
def test_long_videos_are_read_as_in_tuning(tmp_path, learn, long, expected):
    stand = write_stand(tmp_path, "llava")
    wanted = recipe(**vars(options_of(stand)) | {"learn": learn, "long": long, "steps": 1})
    tuned = run_tuning(wanted)
    assert json.loads((tuned / "tuned.json").read_text())["sampling"]["long"] == expected
    model = AutoModelForImageTextToText.from_pretrained(stand / "run/model")
    assert model.config.long_videos == expected
    pixels = families.videos(1, frames=6)
    chat = tune.load(tuned)
    found = model.get_video_features(pixels).pooler_output[0]
    as_tuned = chat.family.project(video_tokens(chat.model, pixels, long=long))[0]
    torch.testing.assert_close(found, as_tuned)
    if expected != "average":
        averaged = chat.family.project(video_tokens(chat.model, pixels))[0]
        assert (found - averaged).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["llava", "blip-2", "instructblip"])
def test_export_writes_a_model_with_a_branch(name, tmp_path):
    stand = write_stand(tmp_path, name)
    command = ["export", str(stand / "chat"), str(stand / "out"), "--branch", str(stand / "branch"), "--frames", "5"]
    assert cli.main(command) == 0
    chat = VideoChat.load(stand / "chat", stand / "branch")
    if name == "instructblip":  # whose Q-Former reads the prompt's words there, and the question alone here
        model = AutoModelForImageTextToText.from_pretrained(stand / "out")
        wanted = chat.model.state_dict()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())
        assert answer_by_transformers(stand / "out", stand / "clips/clip0.mp4")[1].shape[1] == 5
    else:
        check_same_answers(stand / "out", chat, stand / "clips", 5)


def test_export_takes_tuned_folders_and_refuses_at_once(tmp_path, capsys, monkeypatch):
    stand = write_stand(tmp_path, "llava")
    tuned = run_tuning(options_of(stand))
    assert cli.main(["export", str(tuned), str(stand / "out"), "--dtype", "bfloat16"]) == 0
    model = AutoModelForImageTextToText.from_pretrained(stand / "out")
    assert model.dtype == torch.bfloat16 and AutoProcessor.from_pretrained(stand / "out").video_frames == 6
    capsys.readouterr()
    (stand / "chat/model.safetensors").unlink()  # were it opened, the error would be another
    families.make_branch(families.make_chat("llava", hidden_size=48)).save_pretrained(stand / "wide")
    for arguments, message in (
        ([str(tuned), str(stand / "out")], "out is already there"),
        ([str(stand / "chat"), str(stand / "new")], "needs --branch"),
        ([str(stand / "chat"), str(stand / "new"), "--branch", str(stand / "wide")], "hidden_size 48 against 32"),
        ([str(stand / "chat"), str(stand / "new"), "--branch", "nowhere"], "nowhere is not there"),
        ([str(tuned), str(stand / "new"), "--frames", "0"], "--frames must"),
    ):
        assert cli.main(["export", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split()), arguments
        assert not (stand / "new").exists()
