"""Long videos in chunks, and conversations of several turns over one cache."""

import argparse
import subprocess
import sys
from pathlib import Path

import chat as bench_chat
import pytest
import torch
from chat_models import FAMILIES
from chat_models import make_branch as make_family_branch
from chat_models import make_chat as make_family_chat
from small_models import PATCHES, make, shake, video
from test_attach import IMAGE_TOKEN, make_branch, make_chat
from test_attach import PATCHES as CHAT_PATCHES
from test_chat import make_tokenizer
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from bt_adapter.chat import tuned
from bt_adapter.chat.attach import attach
from bt_adapter.chat.conversation import ContextError, Visual, answer_batch, embed
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.loading import LoadOptions
from bt_adapter.chat.prompts import PromptError, Turn, conversation_ids
from bt_adapter.chat.watch import Sampling, encode_image, read_image, watch
from bt_adapter.data import VideoError, read_video, write_video
from bt_adapter.data.stream import FrameStream
from bt_adapter.model.video_tokens import plan_windows, video_tokens_streamed
from bt_adapter.native import make_processor

TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {% if m.content is string %}{{ m.content }} {% else %}"
    "{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
VIDEO_TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {% for p in m.content %}{{ 'left <image> right ' if p.type == 'video' else "
    "'<image> ' if p.type == 'image' else p.text + ' ' }}{% endfor %}{% endfor %}assistant "
)
JOINING_TEMPLATE = "<s>{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}assistant "
STRIPPING_TEMPLATE = "<s>{% for m in messages %}{{ m.role }} {{ m.content.strip() }} {% endfor %}assistant "
REFUSING_TEMPLATE = (
    "<s>{% for m in messages %}{% if m.content is not string %}{{ raise_exception('text alone') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}assistant "
)
TEXT_TEMPLATE = (
    "<s>{% for m in messages %}{{ m.role }} {{ m.content if m.content is string else 'x' }} {% endfor %}assistant "
)


TEMPLATES = [TEMPLATE, VIDEO_TEMPLATE, TEXT_TEMPLATE, JOINING_TEMPLATE, STRIPPING_TEMPLATE, REFUSING_TEMPLATE]


def chunked(frames: torch.Tensor, size: int):
    return iter(frames.split(size))


# --- video tokens from chunks


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 16, 19, 40])  # the table has 8 rows: 1 to 5 frames a step
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_streamed_tokens_are_those_of_the_whole_video(frames, chunk):
    model = shake(make(depth=3))
    pixels = video(frames, 1)
    expected = model.video_tokens(pixels)
    found = video_tokens_streamed(model, chunked(pixels[0], chunk), frames)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    off = video_tokens_streamed(model, chunked(pixels[0], chunk), frames, branch=False)
    torch.testing.assert_close(off, model.frame_mean_tokens(pixels), rtol=0, atol=1e-6)


def test_windows_are_videos_of_their_own():
    model = shake(make(depth=3))
    pixels = video(10, 1)
    found = video_tokens_streamed(model, chunked(pixels[0], 4), 10, windows=3)
    expected = torch.cat([model.video_tokens(p) for p in (pixels[:, :3], pixels[:, 3:6], pixels[:, 6:])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    means = video_tokens_streamed(model, chunked(pixels[0], 4), 10, windows=3, sets=2)
    torch.testing.assert_close(means, torch.stack([expected[:2].mean(0), expected[2]]), rtol=0, atol=1e-6)


def test_windows_are_planned_by_the_time_table():
    assert plan_windows(128, 64) == [128]
    assert plan_windows(129, 64) == [64, 65]
    assert plan_windows(100, 64, 3) == [33, 33, 34]
    assert plan_windows(2, 64, 5) == [1, 1]
    with pytest.raises(ValueError, match="windows must be 1 or more"):
        plan_windows(5, 64, 0)


@pytest.mark.parametrize(("frames", "rows"), [(15, 15), (16, 16), (19, 10)])  # 19: two by two, then 10 rows of 8
def test_interpolated_table_is_a_longer_table(frames, rows):
    model = shake(make(depth=3))
    pixels = video(frames, 1)
    found = video_tokens_streamed(model, chunked(pixels[0], 4), frames, long="interpolate")
    longer = shake(make(depth=3, max_frames=rows))
    state = model.branch.state_dict()
    old, new = state["time"], []
    for place in (i * 7 / (rows - 1) for i in range(rows)):
        first = min(int(place), 6)
        new.append(old[first] + (place - first) * (old[first + 1] - old[first]))
    longer.branch.load_state_dict({**state, "time": torch.stack(new)})
    longer.tower.load_state_dict(model.tower.state_dict())
    torch.testing.assert_close(found, longer.video_tokens(pixels), rtol=0, atol=1e-5)
    assert (found - model.video_tokens(pixels)).abs().max() > 1e-3


def test_a_short_video_needs_no_interpolation():
    model = shake(make(depth=3))
    pixels = video(7, 1)
    short = video_tokens_streamed(model, chunked(pixels[0], 4), 7, long="interpolate")
    torch.testing.assert_close(short, model.video_tokens(pixels), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="long"):
        video_tokens_streamed(model, chunked(pixels[0], 4), 7, long="stretch")


def test_a_video_that_breaks_off_ends_there():
    model = shake(make(depth=3))
    pixels = video(6, 1)
    found = video_tokens_streamed(model, chunked(pixels[0], 4), 8)
    torch.testing.assert_close(found, model.video_tokens(pixels), rtol=0, atol=1e-6)
    assert found.shape == (1, PATCHES + 1, 32)
    with pytest.raises(ValueError, match="no frame"):
        video_tokens_streamed(model, iter(()), 8)


# --- frames from files


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("stream") / "clip.mp4"
    levels = torch.arange(90, dtype=torch.uint8)[:, None, None, None] * 2
    write_video(path, levels.expand(90, 3, 32, 48).contiguous(), fps=10)
    return path


@pytest.mark.parametrize("frames", [1, 7, 45, 90])
def test_streamed_frames_are_those_read_at_once(clip, frames):
    stream = FrameStream(clip, frames=frames, chunk=8)
    pieces = list(stream)
    video = read_video(clip, frames)
    assert all(len(piece) <= 8 for piece in pieces) and len(stream) == frames
    assert torch.equal(torch.cat(pieces), video.frames) and stream.numbers == video.indices.tolist()
    assert stream.total == 90 and not stream.truncated


def test_streamed_frames_at_a_rate(clip):
    assert FrameStream(clip, fps=1).numbers == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert FrameStream(clip, fps=10).numbers == list(range(90)) == FrameStream(clip, fps=50).numbers
    assert FrameStream(clip, fps=0.01).numbers == [45]  # 9 s have no middle of 100 s: the frame in their own middle
    for wrong in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="fps"):
            FrameStream(clip, fps=wrong)


def test_streaming_jumps_in_sparse_long_videos(tmp_path):
    path = tmp_path / "long.mp4"
    frames = torch.arange(600)[:, None, None, None].remainder(251).to(torch.uint8).expand(600, 3, 32, 32).contiguous()
    write_video(path, frames, fps=10, options={"g": "20", "bf": "0"})
    stream = FrameStream(path, frames=6, chunk=4)
    assert stream._is_seeking_cheaper()
    assert torch.equal(torch.cat(list(stream)), read_video(path, 6, method="sequential").frames)


def test_streaming_repeats_counts_and_breaks_off(clip, tmp_path):
    with pytest.raises(VideoError, match="100 frames were requested, but there are only 90"):
        FrameStream(clip, frames=100)
    repeated = torch.cat(list(FrameStream(clip, frames=100, repeat=True, chunk=16)))
    assert torch.equal(repeated, read_video(clip, 100, repeat=True).frames)
    avi = tmp_path / "count.avi"  # its packets do not tell the frames' times
    write_video(avi, torch.zeros(21, 3, 32, 32, dtype=torch.uint8), codec="mpeg4", options={})
    stream = FrameStream(avi, chunk=8)
    assert [len(piece) for piece in stream] == [8, 8, 5] and stream.total == 21
    with pytest.raises(VideoError, match="no such file"):
        FrameStream(tmp_path / "none.mp4")
    mkv = tmp_path / "cut.mkv"
    write_video(mkv, torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8), options={"g": "5"})
    mkv.write_bytes(mkv.read_bytes()[: mkv.stat().st_size // 2])
    cut = FrameStream(mkv, frames=4, chunk=2)
    assert sum(len(piece) for piece in cut) == 4 and cut.truncated and cut.total < 40


def test_damage_is_told_wherever_it_lies(tmp_path):
    path = tmp_path / "damaged.mp4"
    noise = torch.randint(256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    write_video(path, noise, options={"g": "5", "bf": "0"})
    whole = FrameStream(path, chunk=4)
    assert len(torch.cat(list(whole))) == 40 and not whole.truncated
    data = bytearray(path.read_bytes())
    data[3 * len(data) // 4 : 3 * len(data) // 4 + 2000] = bytes(2000)  # after many chunks were handed out
    path.write_bytes(data)
    stream = FrameStream(path, chunk=4)
    assert not stream.truncated and len(torch.cat(list(stream))) > 20 and stream.truncated


# --- conversations


@pytest.fixture(scope="module")
def chat():
    model = make_chat()
    return VideoChat(attach(model, make_branch(model)), make_tokenizer(TEMPLATE))


def visual(kind: str = "video", seed: int = 0) -> Visual:
    length = CHAT_PATCHES + (kind == "video")
    return Visual(kind, torch.randn(length, 40, generator=torch.Generator().manual_seed(seed)))


def fresh(chat, turns, visuals, max_new_tokens=8):
    """The answer to the last turn by one generate on the whole conversation."""
    ids = conversation_ids(chat.processor, turns, [len(v.tokens) for v in visuals])
    return answer_batch(chat.model, chat.tokenizer, [(ids, visuals)], max_new_tokens)[0]


def test_templates_may_tell_videos_from_stills(chat):
    turn = Turn("how ?", ("video", "image"))
    ids = conversation_ids(make_processor(chat.model, make_tokenizer(VIDEO_TEMPLATE)), [turn], [2, 1])
    left, right = 6, 7
    assert ids[2:] == [left, IMAGE_TOKEN, IMAGE_TOKEN, right, IMAGE_TOKEN, 1, 5, 10]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES, None])
def test_turns_answer_as_a_fresh_generate_does(chat, template, static):
    chat = VideoChat(chat.model, make_tokenizer(template))
    conversation = chat.converse(static)
    first, still, second = visual(), visual("image", 1), visual(seed=2)
    conversation.add(first)
    fed = []
    for question, new in (("how is it moving ?", []), ("w20 w21 ?", [still, second]), ("left right ?", [])):
        for each in new:
            conversation.add(each)
        kinds = tuple(each.kind for each in new) if fed else ("video",)
        turns = [*conversation.turns, Turn(question, kinds)]
        expected = fresh(chat, turns, conversation.visuals)
        reply = conversation.ask(question, 8)
        assert reply.text == expected
        fed.append((reply.prompt, reply.fed))
    assert fed[0][0] == fed[0][1]
    # a later turn runs the last answer's end, the new visuals and its own words, and no video a second time
    assert fed[1][1] <= len(still.tokens) + len(second.tokens) + 8 + 10 < fed[1][0]
    assert fed[2][1] <= 8 + 10 and fed[2][0] > fed[1][0]


def test_the_model_runs_no_more_than_it_says(chat, monkeypatch):
    conversation = chat.converse()
    conversation.add(visual())
    ran = []
    language = chat.model.model.language_model
    hook = language.register_forward_pre_hook(
        lambda module, args, kwargs: ran.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        for question in ("how ?", "w20 ?"):
            ran.clear()
            reply = conversation.ask(question, 5)
            assert ran[0] == reply.fed and all(n == 1 for n in ran[1:])
    finally:
        hook.remove()


def test_a_failed_or_interrupted_turn_leaves_the_conversation_as_it_was(chat, monkeypatch):
    conversation, untouched = chat.converse(), chat.converse()
    for each in (conversation, untouched):
        each.add(visual())
        each.ask("how ?", 5)
    with pytest.raises(PromptError, match="empty"):
        conversation.ask("  ")
    with pytest.raises(ContextError, match=r"10 of them for videos.*context is 2048"):
        conversation.ask("w20 ?", 3000)

    def interrupt(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.ask("w20 w21 w22 ?", 8, interrupt)
    assert conversation.turns == untouched.turns
    assert conversation.ask("w23 ?", 5).text == untouched.ask("w23 ?", 5).text
    conversation.reset()
    assert not conversation.turns and not conversation.visuals


def test_visuals_stand_where_the_question_has_places(chat):
    a, b = visual(seed=1), visual(seed=2)
    lengths = [len(a.tokens), len(b.tokens)]
    ids = conversation_ids(chat.processor, [Turn("w20 <video> w21 <video> ?", ("video",) * 2)], lengths)
    where = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
    runs = [i for i in where if i - 1 not in where]
    assert len(where) == sum(lengths) and len(runs) == 2 and ids[runs[0] - 1] == 20 and ids[runs[1] - 1] == 21
    embeds = embed(chat.model, ids, [a, b])
    assert torch.equal(embeds[runs[1] : runs[1] + 10], b.tokens)
    for question, kinds, message in (
        ("<video> how ?", ("video", "video"), "1 places <video>, but 2 videos"),
        ("<video> how ?", (), "1 places <video>, but 0 videos"),
        ("<image> <video> ?", ("video", "image"), "places are image, video"),
    ):
        with pytest.raises(PromptError, match=message):
            conversation_ids(chat.processor, [Turn(question, kinds)], [10] * len(kinds))
    lost = make_processor(chat.model, make_tokenizer("<s>{% for m in messages %}nothing{% endfor %}"))
    with pytest.raises(PromptError, match="wrote 0 image tokens <image> for 1 stills and videos"):
        conversation_ids(lost, [Turn("how ?", ("video",))], [10])
    refusing = make_processor(chat.model, make_tokenizer("{{ raise_exception('not today') }}"))
    with pytest.raises(PromptError, match="not today"):
        conversation_ids(refusing, [Turn("how ?", ("video",))], [10])


def test_batches_answer_as_single_prompts_do(chat):
    prompts = []
    for seed, question in enumerate(("how ?", "w20 w21 w22 w23 w24 ?", "is it moving ?")):
        shown = [visual(seed=seed)] if seed != 1 else [visual(seed=5), visual("image", 6)]
        ids = conversation_ids(
            chat.processor, [Turn(question, tuple(v.kind for v in shown))], [len(v.tokens) for v in shown]
        )
        prompts.append((ids, shown))
    together = answer_batch(chat.model, chat.tokenizer, prompts, 8)
    assert together == [answer_batch(chat.model, chat.tokenizer, [prompt], 8)[0] for prompt in prompts]
    assert len(set(together)) > 1


def test_a_tuned_folder_is_a_model(chat, monkeypatch, tmp_path):
    """Its own test is ``test_tune.py``'s; this one holds that ``load`` hands it over with all it was given."""
    given = []
    monkeypatch.setattr(tuned, "load_tuned", lambda *places: given.append(places) or (chat.model, chat.processor))
    (tmp_path / "tuned.json").write_text("{}")
    assert VideoChat.load(tmp_path, None, "cpu", torch.bfloat16, "nf4", False, False).model is chat.model
    assert given == [(tmp_path, None, None, LoadOptions("cpu", torch.bfloat16, "nf4", False, False))]
    make_chat().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="needs a branch"):
        VideoChat.load(tmp_path / "plain")


# --- files


def test_watching_is_encoding_what_was_read(chat, clip):
    seen = watch(chat, clip, Sampling(frames=12))
    expected = chat.encode(read_video(clip, 12))
    torch.testing.assert_close(seen.tokens[None], expected, rtol=0, atol=1e-5)
    assert (seen.frames, seen.total, seen.sets, seen.truncated) == (12, 90, 1, False)
    off = watch(chat, clip, Sampling(frames=12, branch=False))
    torch.testing.assert_close(off.tokens[None], chat.encode(read_video(clip, 12), branch=False), rtol=0, atol=1e-5)
    three = watch(chat, clip, Sampling(fps=5, windows=3))
    assert (three.frames, three.sets, len(three.tokens)) == (45, 3, 3 * (CHAT_PATCHES + 1))


def test_stills_go_the_image_models_way(chat, tmp_path):
    from PIL import Image

    pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8)
    pixels[:5] = 200
    for suffix in (".png", ".jpg"):
        path = tmp_path / f"still{suffix}"
        Image.fromarray(pixels.numpy()).save(path)
        read = read_image(path)
        if suffix == ".png":
            assert torch.equal(read.permute(1, 2, 0), pixels)
        seen = encode_image(chat, path)
        expected = chat.model.get_image_features(chat.prepare(read[None])[0]).pooler_output[0]
        assert seen.kind == "image" and torch.equal(seen.tokens, expected)
    (tmp_path / "text.png").write_text("no image")
    for name, message in (("none.png", "no such file"), ("text.png", "cannot be read as an image")):
        with pytest.raises(VideoError, match=message):
            encode_image(chat, tmp_path / name)


def test_an_upright_photo(tmp_path):
    from PIL import Image

    pixels = torch.zeros(16, 32, 3, dtype=torch.uint8)
    pixels[:, :16] = 255  # left half white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(pixels.numpy()).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    read = read_image(tmp_path / "photo.jpg")
    assert read.shape == (3, 32, 16) and read[:, :12].float().mean() > 240 > 20 > read[:, 20:].float().mean()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_its_own_generate_does(name, clip):
    model = make_family_chat(name)
    images = None
    if name == "llava_next":
        size, places = {"height": 24, "width": 24}, model.config.image_grid_pinpoints
        images = LlavaNextImageProcessorPil(size={"shortest_edge": 24}, crop_size=size, image_grid_pinpoints=places)
    attach(model, make_family_branch(model))
    asked, questions = {}, None
    if name == "instructblip":
        with pytest.raises(ValueError, match="qformer_tokenizer must be given"):
            VideoChat(model, make_tokenizer(TEMPLATE))
        questions = make_tokenizer()
        read = make_tokenizer()(["how is it moving ?"], return_tensors="pt")
        asked = {"qformer_input_ids": read["input_ids"], "qformer_attention_mask": read["attention_mask"]}
    chat = VideoChat(model, make_tokenizer(TEMPLATE), images, questions)
    still = torch.randint(256, (3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    shown = chat.encode_image(still)
    inputs = {"pixel_values": chat.prepare(still[None])[0]}
    if images is not None:
        inputs = images([still.numpy()], return_tensors="pt", input_data_format="channels_first")
    frames = {"pixel_values": chat.prepare(read_video(clip, 6).frames)}
    for kind, visual, own in (
        ("video", watch(chat, clip, Sampling(frames=6)), frames),
        ("image", shown, inputs),
    ):
        conversation = chat.converse()
        conversation.add(visual)
        reply = conversation.ask("how is it moving ?", 6)
        ids = conversation_ids(
            chat.processor, [Turn("how is it moving ?", (kind,))], [len(conversation.visuals[0].tokens)]
        )
        row = torch.tensor([ids])
        whole = model.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=6, do_sample=False, **own, **asked
        )
        assert chat.tokenizer.decode(whole[0, -reply.tokens :], skip_special_tokens=True).strip() == reply.text
    if name == "vipllava":
        with pytest.raises(ValueError, match="several layers of its tower"):
            watch(chat, clip, Sampling(frames=6, windows=2))


@pytest.mark.slow
def test_an_hour_takes_the_memory_of_twenty_minutes(tmp_path):
    """A minute takes less, as its passes are smaller; from twenty minutes on nothing grows."""
    paths = []
    for name, minutes in (("part", 20), ("hour", 60)):
        paths.append(tmp_path / f"{name}.mp4")
        count = 2 * 60 * minutes
        frames = (torch.arange(count) % 256).to(torch.uint8)[:, None, None, None].expand(count, 3, 48, 64).contiguous()
        write_video(paths[-1], frames, fps=2, options={"preset": "ultrafast", "crf": "30"})
    script = Path(__file__).parent / "hour.py"
    done = subprocess.run([sys.executable, script, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    part, hour = ([int(word) for word in line.split()] for line in done.stdout.splitlines())
    assert part[:2] == [2400, 19] and hour[:2] == [7200, 57]
    assert hour[3] <= 1.2 * part[3]
    # nor does what they take beyond the program itself grow with the length: 4800 frames more would be 44 MB
    assert hour[3] - hour[2] <= part[3] - part[2] + 16 * 2**20


# --- the benchmark


def options(**changes):
    return argparse.Namespace(**{"new": 4, "seconds": 0.0, "most": 10**6} | changes)


def test_the_benchmark_gives_all_the_same_question(chat):
    pixels = torch.randn(16, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    encoders = {name: bench_chat.encoder(name, chat) for name in ("image", "reference", "ours")}
    with torch.no_grad():
        seen = {name: encode(pixels) for name, encode in encoders.items()}
    torch.testing.assert_close(seen["ours"][0].tokens, seen["reference"][0].tokens, rtol=1e-4, atol=1e-4)
    assert [len(visual.tokens) for visual in seen["image"]] == [CHAT_PATCHES] * 16
    rows = {}
    for name in encoders:
        rows[name] = bench_chat.measure(chat, bench_chat.Row("tiny", name, 16, 2, clock="cpu"), options())
        assert not rows[name].error and rows[name].first > 0 and rows[name].tokens_per_s > 0
    assert rows["image"].prompt == rows["ours"].prompt - (CHAT_PATCHES + 1) + 16 * CHAT_PATCHES


def test_the_benchmark_says_what_does_not_fit(chat):
    row = bench_chat.measure(chat, bench_chat.Row("tiny", "image", 300, 1), options())
    assert row.first is None and "context is 2048" in row.error
    row = bench_chat.measure(chat, bench_chat.Row("tiny", "image", 300, 1), options(most=100))
    assert row.error.startswith("left out: about 2720 tokens")
