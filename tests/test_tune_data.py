"""What a tuning step sees: records, tokens and targets, batches, stored features."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_attach import IMAGE_TOKEN, PATCHES
from tuning import TEMPLATE, make_tokenizer, make_video_chat, recipe, write_clips, write_data

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.data import VideoError, preprocess, read_video, write_video
from bt_adapter.errors import CommandError
from bt_adapter.native import make_processor
from bt_adapter.towers.tower import Tower
from bt_adapter.training.loop import Stopped
from bt_adapter.training.processes import Processes
from bt_adapter.tune.batches import Order, Part, Steps, VisualReader
from bt_adapter.tune.conversations import Exchange, Source, TrainingConversation, read_conversations
from bt_adapter.tune.features import FeatureStore, store_features
from bt_adapter.tune.tokens import IGNORED, Tokens, make_examples

EOS = 63
VIDEO = Source("clip0.mp4", "video")


@pytest.fixture(scope="module")
def video_chat():
    return make_video_chat()


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def conversation(*pairs: tuple[str, str], sources: tuple[Source, ...] = (VIDEO,)) -> TrainingConversation:
    exchanges = [Exchange(q, len(sources) if i == 0 else 0, a) for i, (q, a) in enumerate(pairs)]
    return TrainingConversation("one", tuple(exchanges), sources)


def test_both_layouts_and_both_kinds_of_json(tmp_path):
    write_clips(tmp_path / "v", 2)
    write_video(tmp_path / "v/still.mp4", torch.zeros(1, 3, 24, 24, dtype=torch.uint8))
    rows = [
        {"q": "how ? ", "a": "left\u2028right .", "video_id": "clip0"},  # no end of a line in JSON
        {"id": "x", "video": "clip1.mp4", "conversations": talk("<video>\nhow ?", "left", "what ?", " red ")},
        {"image": "still.mp4", "conversations": talk("what ?\n<image>", "red")},
        {"id": 7, "conversations": talk("how ?", "left")},
        {
            "video": ["clip0.mp4", "clip1.mp4"], "image": "still.mp4",
            "conversations": talk("<image> a <video> b", "red", "and <video> ?", "left"),
        },
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for name in ("a.json", "a.jsonl"):
        found, skipped = read_conversations(tmp_path / name, tmp_path / "v")
        assert not len(skipped) and len(found) == 5
        assert found[0].exchanges == (Exchange("how ?", 1, "left\u2028right ."),)
        assert found[0].sources[0].path.endswith("v/clip0.mp4")
        assert found[1].exchanges == (Exchange("how ?", 1, "left"), Exchange("what ?", 0, "red"))
        assert found[2].sources[0].kind == "image" and found[2].exchanges[0].question == "what ?\n<image>"
        assert found[3].sources == ()
        assert [s.kind for s in found[4].sources] == ["image", "video", "video"]
        assert [e.visuals for e in found[4].exchanges] == [2, 1]
        assert [e.question for e in found[4].exchanges] == ["<image> a <video> b", "and <video> ?"]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"q": "how ?", "video_id": "clip0"}, "neither conversations nor a"),
        ({"q": "how ?", "a": " ", "video_id": "clip0"}, "an empty answer"),
        ({"q": "how ?", "a": "left", "video_id": "gone"}, "there is no .*gone"),
        ({"video": "clip0.mp4", "conversations": talk("how ?", "left")}, "no place .* for its 1 videos"),
        ({"video": ["clip0.mp4", "clip0.mp4"], "conversations": talk("<video> ?", "left")}, "1 places .* its 2 videos"),
        ({"conversations": talk("<video> ?", "left")}, "1 places .* its 0 videos"),
        ({"video": "clip0.mp4", "conversations": talk("<video> ?")}, "pairs of a question and its answer"),
        ({"video": "clip0.mp4", "conversations": talk("<video> ?", "a")[::-1]}, "human and gpt by turns"),
        ({"q": "<video> or <video> ?", "a": "left", "video_id": "clip0"}, "2 places .* its 1 videos"),
        ({"video": 3, "conversations": talk("<video> ?", "a")}, "video must be a file name"),
        ("text", "an object was expected"),
    ],
)
def test_records_that_cannot_be_used_are_named(tmp_path, record, reason):
    write_clips(tmp_path, 1)
    good = {"q": "how ?", "a": "left", "video_id": "clip0"}
    (tmp_path / "a.json").write_text(json.dumps([good, record]))
    found, skipped = read_conversations(tmp_path / "a.json")
    assert len(found) == 1 and len(skipped) == 1
    (key,) = skipped.reasons
    assert key.startswith("record 1")
    (tmp_path / "a.json").write_text(json.dumps([record]))
    with pytest.raises(CommandError, match=reason):
        read_conversations(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [("[{]", "no JSON: .*line 1"), ("", "no usable"), ("{\n}", "line 1"), (None, "No such file")],
)
def test_what_is_no_json_is_an_error(tmp_path, text, message):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(CommandError, match=message):
        read_conversations(tmp_path / "a.json")


def test_a_broken_line_is_skipped(tmp_path):
    write_clips(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text('{"q": "how ?", "a": "left", "video_id": "clip0"}\n{"q": \n')
    found, skipped = read_conversations(tmp_path / "a.jsonl")
    assert len(found) == 1 and "line 2" in skipped.reasons


def test_targets_are_the_answers_and_nothing_else(video_chat):
    """Against the sequence put together token by token."""
    tokens = Tokens(video_chat.model, video_chat.processor)
    example = tokens.example(conversation(("how is it moving ?", "it is left ."), ("what colour ?", "red")))
    of = video_chat.tokenizer.convert_tokens_to_ids
    pieces = [(["user", *["<image>"] * (PATCHES + 1), "how", "is", "it", "moving", "?", "assistant"], False)]
    pieces += [(["it", "is", "left", ".", "</s>"], True), (["user", "what", "colour", "?", "assistant"], False)]
    pieces += [(["red", "</s>"], True)]
    flat = [(of(word), answer) for words, answer in pieces for word in words]
    expected = [after if answer else IGNORED for after, answer in flat[1:]] + [IGNORED]
    ids, targets = example.expand()
    special = [] if ids[0] == flat[0][0] else [61]  # an opening token, where the tokenizer puts one
    assert ids.tolist() == special + [token for token, _ in flat]
    assert targets.tolist() == [IGNORED] * len(special) + expected
    assert example.length == len(ids) and example.answer_tokens == 7


def test_every_prompt_is_that_of_inference(video_chat):
    tokens = Tokens(video_chat.model, video_chat.processor)
    pairs = [("how is it moving ?", "it is left ."), ("what colour ?", "red"), ("and ?", "blue .")]
    ids, targets = tokens.example(conversation(*pairs)).expand()
    turns = [Turn(q, ("video",) if i == 0 else (), a) for i, (q, a) in enumerate(pairs)]
    begins = [i for i in range(len(ids)) if targets[i] != IGNORED and (i == 0 or targets[i - 1] == IGNORED)]
    assert len(begins) == 3
    for number, begin in enumerate(begins):
        asked = [*turns[:number], Turn(turns[number].question, turns[number].kinds)]
        assert ids[: begin + 1].tolist() == conversation_ids(video_chat.processor, asked, [PATCHES + 1])


@pytest.mark.parametrize(
    ("asked", "kind", "expected"),
    [
        ("how is it moving ?\n<video>", ["video"], "how is it moving ?\n<video>"),
        ("left <image> or <image> right ?", ["video"] * 2, "left <video> or <video> right ?"),
        ("how <image> is <video> it ?", ["image", "video"], "how <image> is <video> it ?"),
        ("<image>\n<video>\nhow ?", ["image", "video"], "how ?"),
    ],
)
def test_places_in_a_question_are_those_of_inference(video_chat, tmp_path, asked, kind, expected):
    write_clips(tmp_path, 1)
    names = {name: ["clip0.mp4"] * kind.count(name) for name in set(kind)}
    (tmp_path / "a.json").write_text(json.dumps([{**names, "conversations": talk(asked, "left .")}]))
    (found,), _ = read_conversations(tmp_path / "a.json")
    ids, targets = Tokens(video_chat.model, video_chat.processor).example(found).expand()
    begin = int((targets != IGNORED).nonzero()[0])
    lengths = [PATCHES + (name == "video") for name in kind]
    prompt = conversation_ids(video_chat.processor, [Turn(expected, tuple(kind))], lengths)
    assert ids[: begin + 1].tolist() == prompt


def test_an_answer_without_an_end_in_the_template_ends_with_the_tokenizers(video_chat):
    tokenizer = make_tokenizer(TEMPLATE.replace("</s>", " "))
    tokens = Tokens(video_chat.model, make_processor(video_chat.model, tokenizer))
    ids, targets = tokens.example(conversation(("how ?", "left ."), ("?", "red"))).expand()
    assert EOS not in ids.tolist()
    assert [t for t in targets.tolist() if t != IGNORED] == tokenizer.convert_tokens_to_ids(
        ["left", ".", "</s>", "red", "</s>"]
    )


def test_templates_that_lose_the_video_or_rewrite_the_past_are_refused(video_chat):
    lost = make_tokenizer("{% for m in messages %}{{ m.role }} nothing {% endfor %}")
    past = make_tokenizer(TEMPLATE.replace("{% for m in", "{{ messages | length }} {% for m in"))
    for tokenizer, reason in (
        (lost, "wrote 0 image tokens"),
        (past, "writes past turns otherwise"),
    ):
        tokens = Tokens(video_chat.model, make_processor(video_chat.model, tokenizer))
        examples, skipped = make_examples(tokens, [conversation(("how ?", "left"), ("?", "red"))], 100, False)
        assert not examples and reason in skipped.report()


def test_what_does_not_fit_into_the_context_is_counted_and_named(video_chat):
    tokens = Tokens(video_chat.model, video_chat.processor)
    both = [conversation(("how ?", "left")), conversation(("how ?", "left " * 30))]
    with pytest.raises(CommandError, match=r"1 of 2 conversations do not fit.* 30 tokens(?s:.*)one"):
        make_examples(tokens, both, 30, False)
    examples, skipped = make_examples(tokens, both, 30, True)
    assert len(examples) == 1 and len(skipped) == 1


def test_order_is_everything_once_an_epoch_by_length():
    lengths = np.random.default_rng(0).integers(20, 400, 103).tolist()
    order, again = Order(lengths, 4, 5), Order(lengths, 4, 5)
    assert order.steps_per_epoch == 26
    for epoch in range(2):
        steps = range(epoch * 26, epoch * 26 + 26)
        assert sorted(int(n) for step in steps for n in order.step(step)) == list(range(103))
    assert again.step(30).tolist() == order.step(30).tolist()  # without the steps before
    assert any(order.step(i).tolist() != order.step(i + 26).tolist() for i in range(26))
    waste = sum(max(lengths[n] for n in order.step(i)) * 4 for i in range(26)) / sum(lengths)
    assert waste < 1.15  # by chance 1.6


def test_parts_of_all_processes_are_the_step(video_chat, tmp_path):
    data = write_data(tmp_path, 7, broken=(3,))
    conversations, _ = read_conversations(data)
    examples, _ = make_examples(Tokens(video_chat.model, video_chat.processor), conversations, 100, False)
    order, visuals = Order([e.length for e in examples], 4, 0), VisualReader(24, 4)
    for step in range(2):
        whole = {examples[n].key for n in order.step(step)}
        seen, failed = [], []
        for rank in range(2):
            own = Steps(examples, order, visuals, rank, 2, 2)[step]
            seen += [example.key for part in own.parts for example in part.examples]
            failed += [key for key, _ in own.failed]
            assert len(own.parts) <= 2
            assert all(v.shape == (4, 3, 24, 24) and v.dtype == torch.uint8 for p in own.parts for v in p.visuals)
        assert sorted(seen + failed) == sorted(whole)
        assert failed == [key for key in whole if "clip3" in key]


def test_padding_and_packing_hold_the_same_tokens(video_chat):
    tokens = Tokens(video_chat.model, video_chat.processor)
    examples = [tokens.example(conversation(("how ?", answer))) for answer in ("left", "it is moving left .")]
    part = Part(tuple(examples), (), ())
    ids, targets, mask = part.padded(62)
    packed, packed_targets, positions = part.packed()
    assert packed[0].tolist() == ids[mask].tolist() and packed_targets[0].tolist() == targets[mask].tolist()
    assert (targets[~mask] == IGNORED).all() and (ids[~mask] == 62).all()
    assert positions[0].tolist() == [*range(examples[0].length), *range(examples[1].length)]
    assert (ids == IMAGE_TOKEN).sum() == 2 * (PATCHES + 1)


def open_store(folder, data, chat, frames=4, dtype="float16"):
    return FeatureStore(folder, data.parent, attached_branch(chat.model), frames, chat.mean, chat.std, dtype)


def fill(store, data, chat, said, processes=None, asked=lambda: False):
    videos = [source.path for c in read_conversations(data)[0] for source in c.sources]
    visuals = VisualReader(24, 4)
    processes = processes or Processes("cpu")
    model = attached_branch(chat.model)
    return store_features(store, videos, visuals.decode, model, processes, 0, said.append, asked)


@pytest.mark.parametrize(("dtype", "most", "size"), [("float16", 1e-3, 2), ("float8", 5e-2, 1)])
def test_stored_features_give_the_video_tokens(video_chat, tmp_path, dtype, most, size):
    data, said = write_data(tmp_path), []
    store = open_store(tmp_path / "f", data, video_chat, dtype=dtype)
    assert not len(fill(store, data, video_chat, said))
    assert "features of 4 videos" in said[0] and "4 are to be written" in said[0]
    model = attached_branch(video_chat.model)
    path = str(tmp_path / "clip1.mp4")
    pixels = preprocess(read_video(path, 4, repeat=True).frames, 24, video_chat.mean, video_chat.std)
    with torch.no_grad():
        exact = model.video_tokens(pixels[None])
        found = model.video_tokens(features=store.read(path)[None], start_layer=model.first_branch_layer)
    error = float((found - exact).norm() / exact.norm())
    print(f"video tokens from features in {dtype}: relative error {error:.2g}")
    assert 0 < error < most
    on_disk = store.path(path).stat().st_size
    assert store.bytes_each <= on_disk < store.bytes_each + 600
    assert store.bytes_each == 4 * (PATCHES + 1) * (32 * size + (4 if size == 1 else 0))  # float8: and its scales


def test_features_go_on_where_they_were_and_stale_ones_are_refused(video_chat, tmp_path):
    data, said = write_data(tmp_path, 4, broken=(2,)), []
    store = open_store(tmp_path / "f", data, video_chat)
    failed = fill(store, data, video_chat, said)
    assert len(failed) == 1 and "clip2" in failed.report()
    with pytest.raises(VideoError, match="cannot be read"):
        store.read(str(tmp_path / "clip2.mp4"))
    with pytest.raises(VideoError, match="no stored features"):
        store.read(str(tmp_path / "clip9.mp4"))
    kept = store.path(str(tmp_path / "clip0.mp4"))
    before = kept.stat().st_mtime_ns
    lost = store.path(str(tmp_path / "clip1.mp4"))
    lost.unlink()
    write_video(tmp_path / "clip3.mp4", torch.full((9, 3, 24, 24), 99, dtype=torch.uint8))  # another video by that name
    fill(store, data, video_chat, said)
    assert "3 are to be written" in said[-1] and lost.exists() and kept.stat().st_mtime_ns == before
    assert store.has(str(tmp_path / "clip3.mp4"))
    for chat, changes, message in (
        (video_chat, {"frames": 5}, "frames 4 against 5"),
        (video_chat, {"dtype": "float8"}, "dtype float16 against float8"),
        (make_video_chat(depth=2), {}, "layer 1 against 2"),
    ):
        with pytest.raises(CommandError, match=message):
            open_store(tmp_path / "f", data, chat, **changes)
    about = json.loads((tmp_path / "f/features.json").read_text())
    about["tower"]["position"] *= 1.1
    (tmp_path / "f/features.json").write_text(json.dumps(about))
    with pytest.raises(CommandError, match="tower"):
        open_store(tmp_path / "f", data, video_chat)


def test_features_that_do_not_fit_are_told_before(video_chat, tmp_path, monkeypatch):
    data, said = write_data(tmp_path), []
    store = open_store(tmp_path / "f", data, video_chat)
    monkeypatch.setattr("bt_adapter.tune.features._free", lambda folder: 1000)
    with pytest.raises(CommandError, match="do not fit"):
        fill(store, data, video_chat, said)
    assert not (tmp_path / "f").exists() and len(said) == 1
    # the first process's space counts for all
    second = Processes("cpu")
    second.rank, second.world = 1, 2
    monkeypatch.setattr(second, "gather", lambda value: [(value[0], 10**9) if value[1] == 1000 else value, value])
    fill(store, data, video_chat, said, second)
    assert len(list((tmp_path / "f").glob("*.safetensors"))) == 2


def test_features_beyond_float16_are_skipped_or_kept_in_float8(video_chat, tmp_path, monkeypatch):
    data = write_data(tmp_path, 2)
    run, scales = Tower.run, iter([1, 1e6] * 2)
    monkeypatch.setattr(Tower, "run", lambda *arguments: run(*arguments) * next(scales))
    skipped = fill(open_store(tmp_path / "f", data, video_chat), data, video_chat, [])
    assert len(skipped) == 1 and "leave the range of float16; use --feature-dtype float8" in skipped.report()
    store = open_store(tmp_path / "g", data, video_chat, dtype="float8")
    assert not len(fill(store, data, video_chat, []))
    read = [store.read(str(tmp_path / f"clip{n}.mp4")) for n in range(2)]
    assert all(features.isfinite().all() for features in read)
    assert max(float(features.abs().max()) for features in read) > 1e5


def test_features_stop_between_videos_and_leftovers_go(video_chat, tmp_path):
    data = write_data(tmp_path)
    store, answers = open_store(tmp_path / "f", data, video_chat), iter([False, False, True])
    with pytest.raises(Stopped, match="while features were stored"):
        fill(store, data, video_chat, [], asked=lambda: next(answers))
    assert len(list((tmp_path / "f").glob("*.safetensors"))) == 2
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    names = [f".a.safetensors.{gone.pid}-00000000.writing", f".features.json.{gone.pid}-00000000.writing"]
    left = [tmp_path / "f" / name for name in names]
    other = tmp_path / f"f/.a.safetensors.{os.getppid()}-00000000.writing"  # one that still writes
    for path in (*left, other):
        path.touch()
    fill(store, data, video_chat, said := [])
    assert "2 are to be written" in said[0]
    assert other.exists() and not any(path.exists() for path in left)


def test_values_that_cannot_be():
    for changes, message in (
        ({"data": ""}, "--data is missing"),
        ({"data": "x", "learn": ()}, "--learn must name"),
        ({"data": "x", "learn": ("branch", "branch")}, "--learn must name"),
        ({"data": "x", "frames": 0}, "--frames must be above 0"),
        ({"data": "x", "warmup": 2.0}, "--warmup must lie"),
        ({"data": "x", "model": "./llava", "branch": None}, "needs --branch"),
        ({"data": "x", "batch_size": 1}, "--batch-size must be at least"),
    ):
        with pytest.raises(CommandError, match=message):
            recipe(**changes).check(2)
