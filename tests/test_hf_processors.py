"""Processors and chat templates of video chat models."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from test_conversation import TEMPLATES
from test_hf_models import make_native, name  # noqa: F401  a fixture
from transformers import AutoProcessor
from tuning import make_tokenizer, write_clips

from bt_adapter.chat.families import family_of
from bt_adapter.chat.native.processing import VideoReader, flat_videos
from bt_adapter.chat.native.template import with_videos
from bt_adapter.chat.prompts import Turn, conversation_text
from bt_adapter.data import VideoError, preprocess, read_video
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.native import VideoChatCollator, make_processor

IMAGE, VIDEO = "<image>", "<video>"


def tokenizer_with(template):
    tokenizer = make_tokenizer(template)
    tokenizer.padding_side = "left"
    return tokenizer


def processor_of(model, template=None):
    tokenizer = tokenizer_with(template)
    images = None
    if family_of(model).name == "llava_next":
        from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24},
            image_grid_pinpoints=model.config.image_grid_pinpoints,
        )  # fmt: skip
    return make_processor(model, tokenizer, images, copy.deepcopy(tokenizer))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 2)
    return folder


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 48, 3), dtype=np.uint8))


def messages_of(turns):
    messages = []
    for turn in turns:
        kinds, pieces = iter(turn.kinds), turn.question.split("*")
        parts = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            parts += [{"type": next(kinds)}, {"type": "text", "text": piece}]
        messages.append({"role": "user", "content": parts})
        if turn.answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    return messages


LINES = (
    "<s>user <image>\nwhat\n<image>\nis assistant left . user <image>\nand assistant "  # of templates for text alone
)
TEXTS = [
    "<s>user <image>  what  <image>  is assistant left . user <image>  and assistant ",
    "<s>user left <image> right  what  <image>  is assistant left . user left <image> right  and assistant ",
    *[LINES] * 4,
    "USER: <image>\nwhat\n<image>\nis ASSISTANT: left .</s>USER: <image>\nand ASSISTANT:",
]


@pytest.mark.parametrize(("template", "expected"), list(zip([*TEMPLATES, None], TEXTS, strict=True)))
def test_any_template_places_videos_beside_stills(template, expected):
    """The text is that of the image chat model's own template, with the video's token in the places of videos."""
    model, _ = make_native("llava")
    turns = [Turn("* what * is", ("video", "image"), "left ."), Turn("* and", ("video",))]
    placed = [Turn("<video> what <image> is", ("video", "image"), "left ."), Turn("<video> and", ("video",))]
    assert conversation_text(make_processor(model, tokenizer_with(template)), placed) == expected
    tokenizer = tokenizer_with(with_videos(tokenizer_with(template), IMAGE, VIDEO))
    found = tokenizer.apply_chat_template(messages_of(turns), tokenize=False, add_generation_prompt=True)
    pieces = expected.split(IMAGE)
    assert found == pieces[0] + VIDEO + pieces[1] + IMAGE + pieces[2] + VIDEO + pieces[3]
    assert with_videos(tokenizer, IMAGE, VIDEO) == tokenizer.chat_template  # once is enough


def test_a_message_that_holds_the_image_token_is_refused():
    tokenizer = tokenizer_with(with_videos(tokenizer_with(None), IMAGE, VIDEO))
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what is <image> ?"}]}
    with pytest.raises(Exception, match="wrote 2 image tokens <image> for 1 stills and videos"):
        tokenizer.apply_chat_template([message], tokenize=False)


def test_conversations_become_inputs_and_answers(name, clips, picture, tmp_path):  # noqa: F811
    model, _ = make_native(name)
    processor = processor_of(model)
    assert model.config.video_token_index == processor.video_token_id == 64
    ask = {"type": "text", "text": "what is it"}
    video, other = ({"type": "video", "path": str(clips / f"clip{number}.mp4")} for number in range(2))
    conversations = [
        [{"role": "user", "content": [video, ask]}],
        [{"role": "user", "content": [{"type": "image", "image": picture}, ask]}],
        [{"role": "user", "content": [other, {"type": "image", "image": picture}, ask]}],
    ]

    def inputs_of(conversation, processor=processor, **options):
        return processor.apply_chat_template(
            conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, **options},
        )  # fmt: skip

    inputs = inputs_of(conversations)
    assert inputs["pixel_values_videos"].shape == (2, 8, 3, 24, 24)
    assert (inputs["input_ids"] == 64).sum() == 2 * family_of(model).video_length
    images = processor.image_processor
    decoded = read_video(clips / "clip0.mp4", 8, repeat=True).frames
    expected = preprocess(decoded, 24, images.image_mean, images.image_std)
    torch.testing.assert_close(inputs["pixel_values_videos"][0], expected)

    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    batch = model.generate(**inputs, **options)[:, -4:]
    for row, conversation in enumerate(conversations):
        alone = model.generate(**inputs_of(conversation), **options)[0, -4:]
        assert torch.equal(batch[row], alone)

    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    found = inputs_of(conversations, again)
    assert found.keys() == inputs.keys()
    assert [key for key in inputs if not torch.equal(found[key], inputs[key])] == []


def test_frames_are_obeyed_or_refused(clips):
    model, _ = make_native("llava")
    processor = processor_of(model)
    path = str(clips / "clip0.mp4")

    def frames(video=path, **options):
        return processor(text=VIDEO, videos=video, return_tensors="pt", **options)["pixel_values_videos"].shape[1]

    total = len(read_video(path, None).frames)
    assert frames() == 8 and frames(num_frames=3) == 3 and frames(num_frames=2 * total) == 2 * total
    assert frames(fps=2.0) == round(read_video(path, None).duration * 2)
    memory = torch.zeros(5, 20, 30, 3, dtype=torch.uint8)
    assert frames(memory) == 5 and frames(memory, num_frames=2) == 2 and frames(list(memory.numpy())) == 5
    for wrong, options, message in (
        (path, {"num_frames": 3, "fps": 1.0}, "only one of num_frames and fps"),
        (memory, {"fps": 1.0}, "fps must not be given with frames in memory"),
        (
            path,
            {"videos_kwargs": {"do_resize": False}},
            "do_resize: not supported; videos accept only num_frames or fps",
        ),
        (path, {"num_frames": 3, "do_sample_frames": False}, "do_sample_frames must not be False"),
        ("http://somewhere/clip.mp4", {}, "must be a local file"),
    ):
        with pytest.raises(ValueError, match=message):
            frames(wrong, **options)
    with pytest.raises(TypeError, match="must be uint8"):
        frames(memory.float())
    with pytest.raises(VideoError, match="no such file"):
        frames("nowhere.mp4")


def test_videos_of_different_length_are_padded_and_counted(clips):
    model, _ = make_native("llava")
    processor = processor_of(model)
    short = torch.zeros(3, 24, 24, 3, dtype=torch.uint8)
    both = processor(text=[VIDEO, VIDEO], videos=[short, str(clips / "clip0.mp4")], return_tensors="pt")
    assert both["video_frame_counts"].tolist() == [3, 8] and both["pixel_values_videos"].shape[:2] == (2, 8)


def test_flat_videos():
    array = np.zeros((4, 8, 8, 3), np.uint8)
    frames = [Image.new("RGB", (8, 8))] * 3
    assert flat_videos("a.mp4") == ["a.mp4"] and flat_videos([["a.mp4"], ["b.mp4"]]) == ["a.mp4", "b.mp4"]
    assert len(flat_videos(array)) == 1 and len(flat_videos([array, array])) == 2
    assert flat_videos(frames) == [frames] and flat_videos([frames, frames]) == [frames, frames]
    assert VideoReader(ImageSettings(8))(frames).shape == (3, 3, 8, 8)
    with pytest.raises(TypeError, match="videos must be files, frames or lists of them"):
        flat_videos(3)


def test_the_loss_of_collated_conversations_is_on_answers_alone(name, clips, picture):  # noqa: F811
    model, _ = make_native(name)
    template = (
        "{% for m in messages %}{{ m.role }} {% for p in m.content %}"
        "{{ '<image> ' if p.type == 'image' else p.text + ' ' }}{% endfor %}"
        "{% if m.role == 'assistant' %}</s> {% endif %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    processor = processor_of(model, template)

    def said(role, text, *visuals):
        return {"role": role, "content": [*visuals, {"type": "text", "text": text}]}

    video = {"type": "video", "path": str(clips / "clip0.mp4")}
    still = {"type": "image", "image": picture}
    first = [said("user", "how is it moving", video), said("assistant", "it is moving left .")]
    second = [said("user", "what colour", still, still, video), said("assistant", "red .")]
    batch = VideoChatCollator(processor, num_frames=2)(
        [{"messages": first + second}, {"prompt": second[:1], "completion": second[1:]}]
    )
    assert batch["pixel_values_videos"].shape[:2] == (3, 2)
    texts = [
        processor.tokenizer.decode(labels[labels != -100]).replace("</s>", "").split() for labels in batch["labels"]
    ]
    assert texts == ["it is moving left . red .".split(), "red .".split()]
    for labels, ids in zip(batch["labels"], batch["input_ids"], strict=True):
        assert torch.equal(labels[labels != -100], ids[labels != -100])
    model(**batch).loss.backward()
    with pytest.raises(ValueError, match="must have messages, or prompt and completion, but has"):
        VideoChatCollator(processor)([{"text": "?"}])
