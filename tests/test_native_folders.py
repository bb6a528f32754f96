"""Video chat models saved as one folder, loaded by name, asked, and taken apart again."""

import doctest
import json

import pytest
import torch
from chat_models import FAMILIES, SIZE, make_branch, make_chat, videos
from safetensors.torch import load_file, save_file
from test_chat import mini_is_there
from test_hf_models import VIDEO_TOKEN, generated, prompts
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessorPil, LlavaProcessor
from tuning import make_tokenizer, write_clips

from bt_adapter.chat.attach import attach, attached_branch, detach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.families import family_of
from bt_adapter.chat.sampled import settle_sampling
from bt_adapter.chat.settings import Chat
from bt_adapter.chat.watch import Sampling, watch
from bt_adapter.commands.cli import main
from bt_adapter.errors import CheckpointError
from bt_adapter.native import NATIVE_CLASSES, make_processor

ASKED = "how is it moving ?"
MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)


@pytest.fixture(params=FAMILIES)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 1)
    return folder / "clip0.mp4"


def make_video_chat(name: str = "llava", **attributes) -> VideoChat:
    """A chat model of random weights whose processor normalises frames in a way of its own."""
    images = None
    if name != "llava_next":
        size = {"height": SIZE, "width": SIZE}
        images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=size, image_mean=MEAN, image_std=STD)
    model = make_chat(name)
    chat = VideoChat(attach(model, make_branch(model)), make_tokenizer(), images, make_tokenizer())
    for attribute, value in attributes.items():
        setattr(chat.processor, attribute, value)
    return chat


def answered(chat: VideoChat, clip, frames: int = 5) -> tuple[str, torch.Tensor]:
    """An answer about a video, and the tokens it is made of, before a question and with it."""
    seen = watch(chat, clip, Sampling(frames=frames))
    conversation = chat.converse()
    conversation.add(seen)
    return conversation.ask(ASKED, 6).text, seen.for_question(ASKED).tokens


def by_transformers(model, processor, clip, **options) -> str:
    """The answer of plain transformers."""
    content = [{"type": "video", "path": str(clip)}, {"type": "text", "text": ASKED}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", processor_kwargs=options,
    )  # fmt: skip
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True).strip()


def test_a_saved_chat_answers_token_for_token(name, clip, tmp_path):
    chat = make_video_chat(name)
    expected, tokens = answered(chat, clip)
    chat.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing temporary is left

    again = VideoChat.load(tmp_path / "model")
    assert type(again.model) is NATIVE_CLASSES[name] and again.images == chat.images
    text, found = answered(again, clip)
    assert text == expected
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-6)

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    if name != "instructblip":  # there transformers' Q-Former reads the whole prompt, ours the question
        assert by_transformers(model, processor, clip, num_frames=5) == expected
    tokens = prompts(model)
    tokens[tokens == VIDEO_TOKEN] = model.video_token_id
    pixels = videos(1)
    assert torch.equal(
        generated(model, tokens, pixel_values_videos=pixels), generated(chat.model, tokens, pixel_values_videos=pixels)
    )
    assert {*model._no_split_modules} == {*chat.model._no_split_modules}


def test_choices_of_a_run_are_read_from_old_folders_and_not_saved(tmp_path):
    chat = make_video_chat()
    attached_branch(chat.model).recompute = "mlp"
    chat.save(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    branch = config["bt_adapter"]["branch"]
    assert not {"recompute", "fused"} & set(branch)
    branch |= {"recompute": "layer", "fused": True}
    path.write_text(json.dumps(config))
    old = VideoChat.load(tmp_path / "model")
    assert attached_branch(old.model).config.recompute == "layer"
    old.save(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())["bt_adapter"]["branch"]
    assert again == {name: value for name, value in branch.items() if name not in ("recompute", "fused")}


def test_commands_take_a_saved_chat_without_a_branch(clip, tmp_path, capsys):
    chat = make_video_chat(video_frames=5)
    expected, _ = answered(chat, clip)
    folder = str(tmp_path / "model")
    chat.save(folder)
    command = ["--model", folder, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "6"]
    assert main(["chat", "--video", str(clip), *command, ASKED]) == 0
    assert capsys.readouterr().out.strip() == expected
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"video": "clip0", "question": ASKED}))
    out = tmp_path / "answers.jsonl"
    arguments = [str(asked), "--videos", str(clip.parent), "--out", str(out)]
    assert main(["answer", *arguments, *command]) == 0
    assert json.loads(out.read_text().splitlines()[-1])["prediction"] == expected


def test_frames_are_those_of_the_processor(tmp_path):
    make_video_chat(video_frames=5).save(tmp_path / "model")
    values, notes = settle_sampling(Chat(model=str(tmp_path / "model")))
    assert (values["frames"], values["repeat"]) == (5, True) and "frames 5" in notes[0]
    values, notes = settle_sampling(Chat(model=str(tmp_path / "model"), frames=6))
    assert values["frames"] == 6 and "another choice" in notes[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_the_dtype_asked_for_runs(dtype, clip, tmp_path):
    chat = make_video_chat()
    chat.model.to(torch.float16)
    chat.save(tmp_path / "model")
    again = VideoChat.load(tmp_path / "model", dtype=dtype)
    assert {p.dtype for p in again.model.parameters()} == {dtype or torch.float16}
    if dtype != torch.float16:
        answered(again, clip)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.usefixtures("narrow_four_bit_layers")
def test_only_the_language_model_is_quantized(kind, clip, tmp_path):
    pytest.importorskip("bitsandbytes")
    chat = make_video_chat()
    chat.save(tmp_path / "model")
    again = VideoChat.load(tmp_path / "model", quantize=kind)
    linear = {path: type(m).__name__ for path, m in again.model.named_modules() if hasattr(m, "in_features")}
    kinds = {"language_model" in path: found for path, found in linear.items()}
    assert kinds == {True: {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind], False: "Linear"}
    torch.testing.assert_close(answered(again, clip)[1], answered(chat, clip)[1], rtol=0, atol=1e-6)


def test_another_branch_takes_the_place_of_the_saved_one(clip, tmp_path):
    chat = make_video_chat()
    _, before = answered(chat, clip)
    chat.save(tmp_path / "model")
    image = make_chat("llava")
    torch.manual_seed(5)
    other = make_branch(image)
    other.save_pretrained(tmp_path / "other")
    again = VideoChat.load(tmp_path / "model", tmp_path / "other")
    _, found = answered(again, clip)
    assert not torch.equal(found, before)
    assert torch.equal(found, answered(VideoChat(attach(chat.model, other), chat.processor), clip)[1])
    make_branch(make_chat("llava", hidden_size=48)).save_pretrained(tmp_path / "wide")
    (tmp_path / "model" / "model.safetensors").unlink()  # what does not fit is told before weights are read
    with pytest.raises(ValueError, match="hidden_size 48 against 32"):
        VideoChat.load(tmp_path / "model", tmp_path / "wide")


@pytest.mark.parametrize("lacking", ["bt_adapter.temporal.0", "multi_modal_projector", "layers.1.mlp.up_proj"])
def test_missing_weights_are_listed(lacking, tmp_path, capsys):
    make_video_chat().save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state = {path: tensor for path, tensor in load_file(file).items() if lacking not in path}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing.*{lacking}"):
        VideoChat.load(tmp_path / "model")


def test_folders_that_cannot_be_loaded_or_written(tmp_path):
    chat = make_video_chat()
    chat.save(tmp_path / "model")
    with pytest.raises(FileExistsError, match="already exists"):
        chat.save(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    chat.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()

    make_chat("llava").save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="needs a branch"):
        VideoChat.load(tmp_path / "image")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "model" / file).unlink(missing_ok=True)
    assert VideoChat.load(tmp_path / "model").mean != MEAN  # of a tokenizer alone: the family's own

    large = make_chat("llava", image_size=2 * SIZE)
    attach(large, make_branch(large))
    with pytest.raises(ValueError, match=r"another model than this llava: video_size 24, expected 48; video_length 10"):
        VideoChat(large, chat.processor)


def test_adapters_are_merged_before_they_are_saved(clip, tmp_path):
    peft = pytest.importorskip("peft")
    chat = make_video_chat()
    before, _ = answered(chat, clip)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "fc"], init_lora_weights=False, r=2)
    wrapped = peft.get_peft_model(chat.model, config)
    expected, tokens = answered(VideoChat(wrapped, chat.processor), clip)
    with pytest.raises(ValueError, match=r"has PEFT adapters: merge .* by model.merge_and_unload\(\)"):
        VideoChat(wrapped, chat.processor).save(tmp_path / "model")
    VideoChat(wrapped.merge_and_unload(), chat.processor).save(tmp_path / "model")
    text, found = answered(VideoChat.load(tmp_path / "model"), clip)
    torch.testing.assert_close(found, tokens, rtol=1e-4, atol=1e-5)
    assert text == expected


def test_detach_leaves_no_trace_of_a_processor(name):
    model, tokenizer = make_chat(name), make_tokenizer()
    kind, config, words = type(model), model.config.to_dict(), dict(tokenizer.get_vocab())
    whole = model._no_split_modules
    template = tokenizer.chat_template
    branch = make_branch(model)
    first = make_processor(attach(model, branch), tokenizer, None, tokenizer)
    assert model.config.video_token_id == first.video_token_id == len(words)
    assert model._no_split_modules == whole | {"TemporalLayer", "SpatialLayer"}  # of device maps and FSDP
    attach(model, branch)  # again: the processor that was made still fits
    assert model.config.video_token_id == first.video_token_id
    detach(model)
    assert type(model) is kind and model.config.to_dict() == config and not hasattr(model.config, "video_token_index")
    assert model._no_split_modules == whole
    assert (tokenizer.get_vocab(), tokenizer.chat_template) == (words, template)
    with pytest.raises(ValueError, match="has no branch"):
        VideoChat(model, first)
    attach(model, branch)
    second = make_processor(model, tokenizer, None, tokenizer)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab() and second.chat_template == first.chat_template
    assert model.config.video_token_id == second.video_token_id


def test_a_loaded_model_is_taken_apart_and_put_together(name, clip, tmp_path):
    chat = make_video_chat(name)
    expected, tokens = answered(chat, clip)
    chat.save(tmp_path / "model")
    again = VideoChat.load(tmp_path / "model")
    branch = attached_branch(again.model)
    model = detach(again.model)
    image = detach(chat.model)
    assert type(model) is type(image) is family_of(image).model_class
    assert model.state_dict().keys() == image.state_dict().keys()
    assert model._no_split_modules == image._no_split_modules
    assert type(model.config) is type(image.config) and not hasattr(model.config, "bt_adapter")
    model.save_pretrained(tmp_path / "image")  # and is written as the image chat model that it is
    config = json.loads((tmp_path / "image" / "config.json").read_text())
    assert config["model_type"] == name and config["architectures"] == [type(image).__name__]
    assert not {"bt_adapter", "use_branch", "video_token_index"} & config.keys()
    row = torch.tensor([[1, 2, 3]])
    if name not in ("blip-2", "instructblip"):  # which answer about pictures alone
        assert torch.equal(model(input_ids=row).logits, image(input_ids=row).logits)
    attach(model, branch)
    text, found = answered(VideoChat(model, again.processor), clip)
    assert text == expected
    torch.testing.assert_close(found, tokens, rtol=0, atol=1e-6)
    detach(detach(model))  # nothing is there the second time


def test_the_example_of_attach_runs(clip, tmp_path):
    model = make_chat("llava")
    make_branch(model).save_pretrained(tmp_path / "branch")
    model.save_pretrained(tmp_path / "llava")
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    LlavaProcessor(images, make_tokenizer(), patch_size=8).save_pretrained(tmp_path / "llava")
    places = {"my-llava": tmp_path / "llava", "my-branch": tmp_path / "branch", "clip.mp4": clip}
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(attach.__doc__))
    for name, place in places.items():
        assert name in source
        source = source.replace(name, str(place))
    names: dict = {}
    exec(source, names)
    assert type(names["model"]) is NATIVE_CLASSES["llava"] and names["answer"]


@pytest.mark.slow
def test_mini_is_saved_as_a_model_of_transformers(clip, tmp_path):
    if reason := mini_is_there():
        pytest.skip(reason)
    chat = VideoChat.mini()
    expected, _ = answered(chat, clip)
    chat.save(tmp_path / "mini")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "mini")
    assert by_transformers(model, AutoProcessor.from_pretrained(tmp_path / "mini"), clip, num_frames=5) == expected
    assert answered(VideoChat.load(tmp_path / "mini"), clip)[0] == expected
