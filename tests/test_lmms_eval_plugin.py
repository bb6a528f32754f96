"""The parts of the plug-in for lmms-eval that need no lmms-eval; `make test-lmms-eval` runs tasks with it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tuning import make_video_chat, write_clips, write_still

from bt_adapter.chat.prompts import PromptError, Turn
from bt_adapter.chat.watch import Sampling
from bt_adapter.data import VideoError
from bt_adapter.data.stream import FrameStream
from bt_adapter.errors import CommandError
from bt_adapter.lmms_eval.answering import Answerer
from bt_adapter.lmms_eval.conversations import Asked, Medium, read_context, read_messages
from bt_adapter.lmms_eval.generation import Generation, read_generation
from bt_adapter.mini import data_folder

SHORT = Generation(6)


def user(*parts):
    return {"role": "user", "content": [text(p) if isinstance(p, str) else p for p in parts]}


def text(content):
    return {"type": "text", "text": content}


def video(name, **more):
    return {"type": "video", "url": name, **more}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    write_clips(folder, 2)
    write_still(folder / "still.png")
    return folder


@pytest.fixture(scope="module")
def chat():
    return make_video_chat()


def test_messages_become_turns():
    image = Image.new("RGB", (4, 4))
    messages = [
        user(video("a.mp4", start_time=1.0, end_time=2.5), "What moves?"),
        {"role": "assistant", "content": [text("A bar")]},
        user("Is ", {"type": "image", "url": image}, " it?"),
    ]
    asked = read_messages(messages)
    assert asked.turns == (
        Turn("<video>What moves?", ("video",), "A bar"),
        Turn("Is <image> it?", ("image",)),
    )
    assert asked.media == (Medium("video", "a.mp4", 1.0, 2.5), Medium("image", image))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "system", "content": [text("x")]}], "message 0 has the role system, expected user"),
        ([user("x"), user("y")], "message 1 has the role user, expected assistant"),
        ([user("x"), {"role": "assistant", "content": [text("y")]}], "last of 2 messages must be a user's"),
        ([], "last of 0 messages must be a user's"),
        ([user({"type": "audio", "url": "a.wav"})], "text, an image or a video, but is audio"),
        ([user("x"), {"role": "assistant", "content": [video("a.mp4")]}], "part of type video"),
    ],
)
def test_messages_that_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        read_messages(messages)


def test_a_context_and_its_visuals_become_one_turn():
    image = Image.new("RGB", (4, 4))
    asked = read_context("What?", [["clip.mp4"], "still.jpg", image])
    assert asked == Asked(
        (Turn("What?", ("video", "image", "image")),),
        (Medium("video", "clip.mp4"), Medium("image", "still.jpg"), Medium("image", image)),
    )
    assert read_context("What?", None) == Asked((Turn("What?", ()),), ())
    with pytest.raises(TypeError, match="a file's name or a PIL image, but is int"):
        read_context("What?", [3])


def test_options_of_the_known_benchmarks_are_taken():
    known = {"max_new_tokens": 16, "temperature": 0.0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert read_generation(known, 64) == Generation(16)
    activitynet = known | {"until": ["ASSISTANT:"], "image_aspect_ratio": "original", "max_new_tokens": 64}
    assert read_generation(activitynet, 8) == Generation(64, ("ASSISTANT:",))
    assert read_generation({"until": ["\n\n"], "do_sample": False}, 64) == Generation(64, ("\n\n",))
    assert read_generation({"until": None, "temperature": 0.7, "do_sample": False}, 64) == Generation(64)
    assert read_generation({"until": "x"}, 64) == Generation(64, ("x",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True}, "answers are greedy"),
        ({"temperature": 0.7}, "answers are greedy"),
        ({"num_beams": 4}, "num_beams 4"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio must be original"),
        ({"modalities": ["image"], "best_of": 2}, "best_of, modalities: not supported"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive int, but is 0"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        read_generation(options, 64)


def test_an_answer_is_cut_at_the_first_stop_text():
    assert Generation(1, ("stop", "end", "")).cut(" a end b stop c ") == "a"
    assert Generation(1).cut(" a b ") == "a b"


def test_batches_answer_as_single_conversations(chat, files):
    clips, still = [str(files / f"clip{i}.mp4") for i in range(2)], str(files / "still.png")
    asked = [
        read_context("how is it moving ?", [clips[0]]),
        read_messages([user(video(clips[1]), "what is it ?")]),
        read_messages([user(video(clips[0]), {"type": "image", "url": still}, "is it the same ?")]),
        read_context("what is it ?", [Image.open(still)]),
        read_messages([user(video(clips[1], start_time=0.1, end_time=0.5), "what is it ?")]),
        read_context("hello", []),
    ]
    generations = [SHORT, SHORT, SHORT, Generation(3), SHORT, SHORT]
    sampling = Sampling(frames=4, repeat=True)
    single = Answerer(chat, sampling)
    expected = [single.answer([one], [how])[0] for one, how in zip(asked, generations, strict=True)]
    assert Answerer(chat, sampling, 4).answer(asked, generations) == expected
    assert len({answer for answer, _ in expected}) > 1
    assert expected[2][1] == expected[1][1] + chat.family.image_length(24, 24) + 1  # one word more, and the still


def test_a_file_is_encoded_once_while_it_is_kept(chat, files, monkeypatch):
    from bt_adapter.lmms_eval import answering

    watched = []
    whole = answering.watch
    monkeypatch.setattr(
        answering, "watch", lambda chat, video, sampling: watched.append(video.path) or whole(chat, video, sampling)
    )
    clips = [str(files / f"clip{i}.mp4") for i in range(2)]
    answerer = Answerer(chat, Sampling(frames=2), 1)
    for clip in (clips[0], clips[0], clips[1], clips[0]):
        answerer.answer([read_context("what ?", [clip])], [SHORT])
    assert watched == [clips[0], clips[1], clips[0]]


def test_the_part_of_a_video_is_read(chat, files):
    clip = str(files / "clip0.mp4")
    answerer = Answerer(chat, Sampling(frames=2, repeat=True))
    whole = answerer._encode(Medium("video", clip)).tokens
    part = answerer._encode(Medium("video", clip, 0.0, 0.2)).tokens
    assert part.shape == whole.shape and not part.equal(whole)
    all_of_it = answerer._encode(Medium("video", clip, 0.0, None)).tokens
    assert all_of_it.equal(whole)
    with pytest.raises(VideoError, match="no frame can be decoded between start=9.0 and end=None"):
        answerer._encode(Medium("video", clip, 9.0))


def test_the_part_of_a_video_is_read_at_a_rate_and_in_windows(chat, files):
    clip = str(files / "clip0.mp4")
    stream = FrameStream(clip)
    frames, middle = torch.cat(list(stream)), stream.total // 2
    moment = middle / stream.fps

    def tokens(start, end, **options):
        return Answerer(chat, Sampling(**options))._encode(Medium("video", clip, start, end)).tokens

    half = [chat.encode(part)[0] for part in (frames[:middle], frames[middle:])]
    late = tokens(moment - 1e-3, None, fps=stream.fps)
    assert (late - half[1]).abs().max() < 1e-5
    early = tokens(None, moment - 1e-3, fps=stream.fps)
    assert (early - half[0]).abs().max() < 1e-5
    two = tokens(0.0, moment - 1e-3, frames=2, windows=2)
    assert len(two) == 2 * len(tokens(0.0, moment - 1e-3, frames=2, windows=1))


def test_what_cannot_be_answered_is_an_error(chat, files):
    answerer = Answerer(chat, Sampling(frames=2))
    with pytest.raises(VideoError, match="nothing.mp4"):
        answerer.answer([read_context("what ?", [str(files / "nothing.mp4")])], [SHORT])
    with pytest.raises(PromptError, match="1 places <video>, but 2 videos"):
        clip = str(files / "clip0.mp4")
        answerer.answer([read_context("<video> what ?", [clip, clip])], [SHORT])
    with pytest.raises(ValueError, match="batch_size must be a positive int, but is 0"):
        Answerer(chat, Sampling(), 0)


def test_options_are_those_of_the_command_line():
    from bt_adapter.chat.settings import ChatModel

    with pytest.raises(CommandError, match="frames"):
        Answerer.load(ChatModel(frames=0))


def test_the_task_of_the_small_world_scores_its_own_truth(monkeypatch):
    clips = data_folder() / "clips"
    listed = json.loads((clips / "clips.json").read_text())
    path = Path("bench/lmms_tasks/utils.py")
    spec = importlib.util.spec_from_file_location("mini_motion_utils", path)
    utils = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(utils)

    class Documents(list):
        def filter(self, keep):
            return Documents(filter(keep, self))

    asked = utils.motion_only(Documents(listed))
    assert len(asked) == 8 and all(Path(utils.visual(one)[0]).is_file() for one in asked)
    assert [utils.target(one) for one in asked[:2]] == ["moving left", "moving right"]
    for one in asked:
        assert utils.score(one, [f"It is {utils.target(one)}."]) == {"accuracy": 1.0}
        assert utils.score(one, ["It is still."]) == {"accuracy": 0.0}
    assert "lmms_eval" not in sys.modules
