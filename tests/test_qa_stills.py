"""Questions about stills beside questions about videos: which file is asked about, how, and what is counted."""

import json

import numpy as np
import pytest
from PIL import Image
from test_answer import chat, folder  # noqa: F401 (fixtures)

from bt_adapter.chat import answer, conversation
from bt_adapter.chat.questions import Question, read_questions
from bt_adapter.chat.watch import Sampling, encode_image, watch
from bt_adapter.commands import cli
from bt_adapter.errors import CommandError
from bt_adapter.eval.qa import exact_scores, read_items

RECORDS = [
    {"id": "m1", "video_id": "a", "question": "how ?", "answer": "left", "type": "motion"},
    {"id": "s1", "image": "one.png", "question": "w20 w21 w22 ?", "answer": "right", "type": "item"},
    {"id": "s2", "video_id": "two.jpg", "question": "is it moving ?", "answer": "no", "type": "item"},
    {"id": "m2", "video_id": "b", "question": "left or right ?", "answer": "left", "type": "motion"},
    {"id": "s3", "image": "deep", "question": "how ?", "answer": "left", "type": "item"},
    {"id": "m3", "video": "moving.png", "question": "how ?", "answer": "left"},
    {"id": "s4", "image": "moving.png", "question": "how ?", "answer": "left"},
    {"id": "gone", "image": "gone.png", "question": "how ?", "answer": "left"},
    {"id": "clip", "image": "c.mp4", "question": "how ?", "answer": "left"},
]
IMAGES, VIDEOS = {"s1": "one.png", "s2": "two.jpg", "s3": "part/deep.webp", "s4": "moving.png"}, ["a", "b"]


@pytest.fixture(scope="module")
def files(folder):  # noqa: F811
    """Stills of several formats beside the videos of ``folder``, and an animated PNG of eight frames."""
    draws = np.random.default_rng(5)

    def picture():
        return Image.fromarray(draws.integers(0, 256, (40, 32, 3), dtype=np.uint8))

    picture().save(folder / "one.png")
    picture().save(folder / "two.jpg")
    (folder / "part").mkdir()
    picture().save(folder / "part" / "deep.webp")
    frames = [picture() for _ in range(8)]
    frames[0].save(folder / "moving.png", save_all=True, append_images=frames[1:], duration=100)
    return folder


def ask(files, out, records, batch, *arguments):
    data = out.parent / f"{out.name}.json"
    data.write_text(json.dumps(records))
    given = ["--data", str(data), "--videos", str(files), "--out", str(out), "--batch-size", str(batch), *arguments]
    code = cli.main(["eval", "qa", *given, "--frames", "4", "--max-new-tokens", "6"])
    if code:
        return code
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    return {row["id"]: row for row in rows}, json.loads((out / "scores.json").read_text())


def test_stills_and_videos_in_one_file(chat, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(answer, "load", lambda command: chat)
    found, scores = ask(files, tmp_path / "many", RECORDS, 4)
    assert ask(files, tmp_path / "one", RECORDS, 1)[0] == found
    assert {key: row["image"] for key, row in found.items() if "image" in row} == {
        "s1": "one.png", "s2": "two.jpg", "s3": "deep", "s4": "moving.png"
    }  # fmt: skip
    assert found["m1"]["video"] == "a" and found["m3"]["video"] == "moving.png" and "image" not in found["m3"]
    questions = {record["id"]: record["question"] for record in RECORDS}
    seen = {key: encode_image(chat, files / name) for key, name in IMAGES.items()}
    seen |= {
        "m3": watch(chat, files / "moving.png", Sampling(frames=4)),
        "m1": watch(chat, files / "a.mp4", Sampling(4)),
    }
    assert {len(seen[key].tokens) for key in IMAGES} == {len(seen["m1"].tokens) - 1}  # patches alone, without CLS
    for key, visual in seen.items():
        alone = chat.converse()
        alone.add(visual)
        assert alone.ask(questions[key], 6).text == found[key]["prediction"]
    assert len({row["prediction"] for row in found.values()}) > 2
    assert set(scores["skipped"]) == {"gone (gone.png)", "clip (c.mp4)"}
    assert "no such file" in scores["skipped"]["gone (gone.png)"]
    assert "cannot be read as an image" in scores["skipped"]["clip (c.mp4)"]
    assert (scores["records"], scores["answered"], scores["questions"]) == (9, 7, 7)
    predictions = {row["id"]: row for row in json.loads((tmp_path / "many" / "predictions.json").read_text())}
    assert predictions["s1"]["video_name"] == predictions["s1"]["image"] == "one.png"


def test_stills_run_past_the_branch(chat, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(answer, "load", lambda command: chat)
    stills = [record for record in RECORDS if record["id"] in IMAGES]
    found, _ = ask(files, tmp_path / "on", stills, 4)

    def forward(*arguments):
        raise AssertionError("the branch ran")

    monkeypatch.setattr(type(chat.branch.branch), "forward", forward)
    monkeypatch.setattr(type(chat.branch), "video_tokens", forward)
    assert ask(files, tmp_path / "off", stills, 4)[0] == found


def test_a_killed_run_goes_on_and_other_files_are_told_apart(chat, files, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(answer, "load", lambda command: chat)
    out = tmp_path / "out"
    whole, _ = ask(files, out, RECORDS, 2)
    kept = (out / "answers.jsonl").read_text().splitlines(keepends=True)[:2]
    (out / "answers.jsonl").write_text("".join(kept))
    assert ask(files, out, RECORDS, 2)[0] == whole
    other = [record | {"image": "two.jpg"} if record["id"] == "s1" else record for record in RECORDS]
    assert ask(files, out, other, 2) == 2
    assert "about one.png, but the question now is" in " ".join(capsys.readouterr().err.split())
    video = [{"id": "m1", "image": "a", "question": "how ?", "answer": "left"}]
    assert ask(files, out, video, 2) == 2  # a still of the name of a video


def test_types_are_counted(tmp_path):
    asked = [
        *(
            {"id": i, "question": "how ?", "answer": "left", "video_id": i, "type": kind}
            for i, kind in enumerate("xxy")
        ),
        {"id": 3, "question": "how ?", "answer": "left", "image": "a.png", "type": 7},
        {"id": 4, "question": "how ?", "answer": "left", "video_id": 9, "type": None},
        {"question_id": "q", "question": "how ?", "answer": "left", "video_name": "v", "type": "y"},
    ]
    (tmp_path / "data.json").write_text(json.dumps(asked))
    items = read_items(tmp_path / "data.json")
    assert [item.kind for item in items] == ["x", "x", "y", "7", None, "y"]
    said = ["left", "It is left", "right", "right", "left", "Left."]
    scores = exact_scores(items, {item.id: text for item, text in zip(items, said, strict=True)})
    assert scores["kinds"] == {
        "x": {"n": 2, "exact": 0.5, "contained": 1.0},
        "y": {"n": 2, "exact": 0.5, "contained": 0.5},
        "7": {"n": 1, "exact": 0.0, "contained": 0.0},
    }
    assert (scores["questions"], scores["exact"]) == (6, 0.5)
    (tmp_path / "right.json").write_text(json.dumps([{"question_id": "q", "answer": "left", "type": 3}]))
    (tmp_path / "data.json").write_text(json.dumps(asked[-1:]))
    assert read_items(tmp_path / "data.json", tmp_path / "right.json")[0].kind == "3"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"id": 1, "video_id": 2, "image": "a.png", "question": "how ?", "answer": "x"},
            "a video .video_id. and an image",
        ),
        ({"video_name": "v", "image": "a.png", "Q": "how ?", "A": "x"}, "a video .video_name. and an image"),
        ({"video": "v", "image": "a.png", "question": "how ?", "answer": "x"}, "a video .video. and an image"),
        ({"image": ["a.png"], "question": "how ?", "answer": "x"}, "image must be the file name of one still.* list"),
        ({"image": "a.png", "question": "how ?"}, "holds no answer"),
        ({"image": None, "question": "how ?", "answer": "x"}, "holds no video"),
    ],
)
def test_bad_records(tmp_path, record, message):
    (tmp_path / "data.json").write_text(json.dumps([record]))
    with pytest.raises(CommandError, match=f"data.json, record 1: .*{message}"):
        read_items(tmp_path / "data.json")


def test_lists_of_questions_name_stills(chat, files, tmp_path):  # noqa: F811
    path = tmp_path / "questions.jsonl"
    path.write_text('{"image": "one.png", "question": "how ?"}\n{"video": "two.jpg", "question": "how ?"}\n')
    first, second = read_questions(path, files)
    assert (first.kind, first.video, second.kind) == ("image", files / "one.png", "image")
    path.write_text('{"question": "how ?"}\n')
    (only,) = read_questions(path, files / "two.jpg")
    assert (only.kind, only.name) == ("image", "two.jpg")
    assert read_questions(path, files / "moving.png")[0].kind == "video"
    path.write_text('{"image": "one.png", "video": "a", "question": "how ?"}\n')
    with pytest.raises(CommandError, match="line 1: names a video and an image"):
        read_questions(path, files)


def test_a_question_places_its_still(chat, files):  # noqa: F811
    """Named in the question as a still, a still may stand inside of it; a video may not stand there."""
    asked = [Question("1", files / "one.png", "how <image> ?", kind="image")]
    asked.append(Question("2", files / "one.png", "how <video> ?", kind="image"))
    kept = []

    class Kept:
        append = staticmethod(kept.extend)

    skipped = answer.answer_all(chat, asked, Kept, Sampling(frames=4), 2, 4)
    assert [row["id"] for row in kept] == ["1"] and "places" in next(iter(skipped.reasons.values()))
    visual = encode_image(chat, files / "one.png")
    turn = conversation.Turn("how <image> ?", ("image",))
    ids = conversation.conversation_ids(chat.processor, [turn], [len(visual.tokens)])
    assert conversation.answer_batch(chat.model, chat.tokenizer, [(ids, [visual])], 4) == [kept[0]["prediction"]]
