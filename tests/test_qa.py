# ruff: noqa: F811 (fixtures)
"""Benchmarks of questions: their layouts, exact match, and the command that answers and scores them."""

import json
import os
import signal
import sys
import time

import pytest
from judge_stand import stand  # noqa: F401 (a fixture)
from test_answer import chat, folder  # noqa: F401 (fixtures)

from bt_adapter.chat import answer
from bt_adapter.commands import cli
from bt_adapter.data.finding import VisualFolder
from bt_adapter.errors import CommandError
from bt_adapter.eval.qa import Item, exact_scores, normalise, read_items, write_predictions
from bt_adapter.qa import run as qa

GENERIC = [{"video_name": "a", "Q": "how ?", "A": "It moves left."}, {"video_name": "b", "Q": "w20 ?", "A": "right"}]
CONSISTENCY = [{"video_name": "a", "Q1": "how ?", "Q2": "is it moving ?", "A": "left"}]


# --- records and exact match


def write(path, records):
    path.write_text(json.dumps(records))
    return path


def test_every_benchmarks_records(tmp_path):
    one = read_items(write(tmp_path / "generic_qa.json", GENERIC))
    assert [(i.id, i.video, i.questions, i.answer) for i in one][1] == ("2", "b", ("w20 ?",), "right")
    two = read_items(write(tmp_path / "consistency_qa.json", CONSISTENCY))
    assert two[0].questions == ("how ?", "is it moving ?")
    asked = write(tmp_path / "q.json", [{"video_name": "xyz", "question": "how ?", "question_id": "v_xyz_0"}])
    right = write(tmp_path / "a.json", [{"answer": "no", "type": 3, "question_id": "v_xyz_0"}])
    three = read_items(asked, right)
    assert (three[0].id, three[0].answer, three[0].kind) == ("v_xyz_0", "no", "3")
    msvd = [{"answer": "dog", "id": 5, "question": "what ?", "video_id": 7}]
    four = read_items(write(tmp_path / "test_qa.json", msvd))
    assert (four[0].id, four[0].video) == ("5", "7")
    assert qa.aspects_of(one, tmp_path / "generic_qa.json") == ("correctness", "detail", "context")
    assert qa.aspects_of(one, tmp_path / "temporal_qa.json") == ("temporal",)
    assert qa.aspects_of(two, tmp_path / "x") == ("consistency",) and qa.aspects_of(four, tmp_path / "x") == ("match",)
    for name, written in (("7.mp4", "7"), ("vid7.avi", "7"), ("video7.mp4", "7"), ("v_xyz.mkv", "xyz")):
        (tmp_path / name).write_bytes(b"x")
        assert qa._find(VisualFolder(tmp_path), written)[0].name == name
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "holds no record"),
        ([3], "record 1: expected an object, got int"),
        ([{"video_name": "a", "Q": "how ?"}], "record 1: holds no A"),
        ([{"video_name": "a", "Q": " ", "A": "x"}], "record 1: the question is empty"),
        ([{"video_name": "a", "question": "how ?", "question_id": 1}], "pass the file of answers as --answers"),
        ([{"id": 1, "video_id": 2, "question": "how ?", "answer": "x"}] * 2, "id '1' is a duplicate"),
    ],
)
def test_bad_records(tmp_path, records, message):
    with pytest.raises(CommandError, match=f"--data .*data.json.*{message}"):
        read_items(write(tmp_path / "data.json", records))


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"[{", ": not JSON"), (b'{"a": 1}\n\n{', ", line 3: not JSON"), (b"[\xff]", ", line 1: not UTF-8")],
)
def test_bad_files(tmp_path, data, message):
    good = write(tmp_path / "good.json", GENERIC)
    (tmp_path / "bad.json").write_bytes(data)
    with pytest.raises(CommandError, match=f"^--data .*bad.json{message}"):
        read_items(tmp_path / "bad.json")
    with pytest.raises(CommandError, match=f"^--answers .*bad.json{message}"):
        read_items(good, tmp_path / "bad.json")


def test_lines_end_at_line_feeds_alone(tmp_path):
    texts = ["left\u2028right", "left\u0085right"]
    records = [{"video_name": "a", "Q": "how ?", "A": text} for text in texts]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records)
    (tmp_path / "data.jsonl").write_bytes(lines.encode())
    assert [item.answer for item in read_items(tmp_path / "data.jsonl")] == texts


def test_predictions_hold_what_the_scorers_read(tmp_path):
    asked = write(tmp_path / "q.json", [{"video_name": "xyz", "question": "how ?", "question_id": "v_xyz_0"}])
    right = write(tmp_path / "a.json", [{"answer": "no", "type": 3, "question_id": "v_xyz_0"}])
    msvd = write(tmp_path / "m.json", [{"answer": "dog", "id": 5, "question": "what ?", "video_id": 7}])
    out = tmp_path / "predictions.json"
    for items, ident, video, question, wanted in (
        (read_items(asked, right), "v_xyz_0", "xyz", "how ?", "no"),
        (read_items(msvd), 5, "7", "what ?", "dog"),
    ):
        write_predictions(out, items, {items[0].id: "said"})
        (row,) = json.loads(out.read_text())
        assert {name: row[name] for name in ("video_name", "Q", "A", "pred")} == {
            "video_name": video, "Q": question, "A": wanted, "pred": "said"
        }  # fmt: skip
        assert (row["id"], row["question"], row["answer"]) == (ident, question, wanted)


def test_exact_match_is_normalised():
    assert normalise("  The Dog's, a  DOG! ") == "dogs dog"
    items = [Item(str(i), "v", ("q",), right, {}, kind) for i, (right, kind) in
             enumerate([("dog", "5"), ("A cat", "5"), ("two", "7"), ("no", "3")])]  # fmt: skip
    given = {"0": "Dog.", "1": "It is a cat", "2": "twofold", "3": "yes"}
    scores = exact_scores(items, given)
    assert (scores["questions"], scores["exact"], scores["contained"]) == (4, 0.25, 0.5)
    assert scores["kinds"]["5"] == {"n": 2, "exact": 0.5, "contained": 1.0}


@pytest.mark.parametrize(
    ("right", "said", "exact", "contained"),
    [
        ("A", "", False, False), ("A", "The", False, False), ("a", " ", False, False), ("The", "a", False, False),
        ("A", "A.", True, True), ("(a)", "A", True, True), ("A", "B", False, False), ("A", "A dog", False, False),
        ("?", "", False, False), ("?", "!", False, False), ("", "", False, False), ("", "dog", False, False),
        ("The Who", "", False, False), ("The Who", "who", True, True), ("...", "…", True, True),
        ("dog's", "dog\u2019s", True, True), ("cafe\u0301", "CAFÉ", True, True), ("red_car", "red car", True, True),
        ("1", "1.5", False, False), ("1.5", "It is 1.5.", False, True), ("1,000", "1000", True, True),
        ("5", "-5", False, False), ("2-3", "2 - 3", True, True), ("t-shirt", "T shirt", True, True),
        ("C", "C++", False, False), ("C++", "c++.", True, True),
        ("红色", "它是红色的", False, True), ("红色", "红色。", True, True),
        ("cat", "concatenate", False, False), ("की", "क", False, False), ("**red**", "red", True, True),
        ("50%", "50 %", True, True), ("dog", "\ufeffdog\u200b", True, True),
    ],
)  # fmt: skip
def test_exact_match_of_short_and_odd_answers(right, said, exact, contained):
    scores = exact_scores([Item("1", "v", ("q",), right, {})], {"1": said})
    assert (scores["exact"], scores["contained"]) == (exact, contained)


# --- the command


@pytest.fixture
def command(chat, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(answer, "load", lambda command: chat)

    def run(records, *arguments):
        data = write(tmp_path / "generic_qa.json", records)
        arguments = ["--data", str(data), "--videos", str(folder), "--out", str(tmp_path / "qa"), *arguments]
        return cli.main(["eval", "qa", *arguments, "--frames", "4", "--max-new-tokens", "6"])

    return run


def test_the_command_predicts_and_scores(command, stand, tmp_path, capsys):
    server = stand()
    records = [
        *GENERIC,
        {"video_name": "broken", "Q": "how ?", "A": "x"},
        {"video_name": "none", "Q": "how ?", "A": "x"},
    ]
    assert command(records, "--judge-url", server.url, "--judge-model", "judge-1") == 0
    told = capsys.readouterr()
    assert "2 skipped" in told.err and "2 of 4 records" in told.out and "judge-1: detail, 0 to 5" in told.out
    predictions = json.loads((tmp_path / "qa" / "predictions.json").read_text())
    assert [{k: v for k, v in row.items() if k != "pred"} for row in predictions] == GENERIC
    assert all(isinstance(row["pred"], str) for row in predictions)
    scores = json.loads((tmp_path / "qa" / "scores.json").read_text())
    assert scores["judge"]["aspects"]["correctness"] == {
        "url": server.url, "model": "judge-1", "prompts": 1, "judged": 2, "unjudged": 0, "refused": 0, "requests": 2,
        "retries": 0, "failures": 0, "score": 4.0, "models": ["judge-2026"], "fingerprints": ["fp1"],
    }  # fmt: skip
    assert set(scores["judge"]["aspects"]) == {"correctness", "detail", "context"}
    assert set(scores["skipped"]) == {"3 (broken)", "4 (none)"} and scores["made"]["frames"] == 4
    asked = len(server.bodies)
    assert command(records, "--judge-url", server.url, "--judge-model", "judge-1") == 0
    assert len(server.bodies) == asked
    assert command(records, "--judge-url", server.url, "--judge-model", "judge-2") == 2
    assert "made with model 'judge-1', now 'judge-2'" in " ".join(capsys.readouterr().err.split())
    assert command(records) == 0  # without a judge
    assert "judge-1: detail, 0 to 5" in capsys.readouterr().out
    assert json.loads((tmp_path / "qa" / "scores.json").read_text())["judge"] == scores["judge"]


def test_scores_of_other_settings_are_not_overwritten(command, tmp_path, capsys):
    assert command(GENERIC) == 0
    for path in (tmp_path / "qa").glob("answers.jsonl*"):
        path.unlink()
    before = (tmp_path / "qa" / "scores.json").read_bytes()
    assert command(GENERIC, "--no-repeat") == 2
    assert "scores.json holds a result that was made with repeat True, now False" in capsys.readouterr().err
    assert (tmp_path / "qa" / "scores.json").read_bytes() == before
    assert command(GENERIC) == 0


def test_consistency_asks_both_questions(command, stand, tmp_path, capsys):
    server = stand()
    assert command(CONSISTENCY, "--judge-url", server.url, "--judge-model", "judge") == 0
    row = json.loads((tmp_path / "qa" / "predictions.json").read_text())[0]
    assert set(row) == {"video_name", "Q1", "Q2", "A", "pred1", "pred2"}
    said = server.bodies[0]["messages"][1]["content"]
    assert f"Given answer 1: {row['pred1']}" in said and f"Given answer 2: {row['pred2']}" in said


def test_a_judge_that_goes_down_or_refuses_leaves_its_scores(command, stand, tmp_path, capsys):
    server = stand(lambda right, n: 400 if right == "right" else 403 if n > 1 else "good")
    arguments = (GENERIC, "--judge-url", server.url, "--judge-model", "judge", "--judge-parallel", "1")
    assert command(*arguments) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "refuses with 400: " in told and "1 of them are refused" in told and "answers 403" in told
    for again in (False, True):
        found = json.loads((tmp_path / "qa" / "scores.json").read_text())["judge"]["aspects"]
        assert (found["correctness"]["score"], found["correctness"]["refused"]) == (4.0, 1)
        assert again or command(*arguments) == 2
    assert server.asked["right"] == 2  # once in each run


def test_an_endpoint_that_takes_no_temperature(command, stand, tmp_path, capsys):
    """As some reasoning models do: the first run says what to do, and doing it judges everything."""
    server = stand(lambda right, n: 400 if "temperature" in server.bodies[-1] else "good")
    arguments = (GENERIC, "--judge-url", server.url, "--judge-model", "judge", "--judge-parallel", "1")
    assert command(*arguments) == 2
    assert "if it does not accept a temperature, pass --judge-temperature None" in " ".join(
        capsys.readouterr().err.split()
    )
    assert command(*arguments, "--judge-temperature", "None") == 0
    scores = json.loads((tmp_path / "qa" / "scores.json").read_text())["judge"]["aspects"]["correctness"]
    assert (scores["judged"], scores["refused"], scores["temperature"]) == (2, 0, "left out")
    assert command(*arguments) == 2 and "made with temperature 'left out'" in " ".join(capsys.readouterr().err.split())


def test_a_signal_ends_with_scores(command, stand, tmp_path, capsys):
    server = stand(lambda right, n: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(0.1) or "good")
    assert command(GENERIC, "--judge-url", server.url, "--judge-model", "judge", "--judge-parallel", "1") == 143
    assert "stopped; 1 of 2 answers are judged" in " ".join(capsys.readouterr().err.split())
    scores = json.loads((tmp_path / "qa" / "scores.json").read_text())
    assert scores["judge"]["aspects"]["correctness"]["judged"] == 1


def test_a_judge_that_is_down_leaves_the_exact_scores(command, stand, tmp_path, capsys, monkeypatch):
    server = stand(lambda right, n: 403)
    assert command(GENERIC, "--judge-url", server.url, "--judge-model", "judge") == 2
    assert "answers 403" in capsys.readouterr().err
    assert "exact" in json.loads((tmp_path / "qa" / "scores.json").read_text())
    for arguments, message in (
        (("--judge-url", server.url), "--judge-model go together"),
        (("--judge-url", "ftp://x", "--judge-model", "m"), "--judge-url must begin"),
        (("--judge-url", "http://", "--judge-model", "m"), "--judge-url must begin"),
        (("--judge-url", "http://[::1/v1", "--judge-model", "m"), "--judge-url must begin"),
        (("--judge-url", "http://h:99999/v1", "--judge-model", "m"), "--judge-url must begin"),
        (("--judge-url", "http://a b/v1", "--judge-model", "m"), "--judge-url must begin"),
        (("--judge-parallel", "0"), "--judge-parallel must be above 0"),
        (("--judge-timeout", "nan"), "--judge-timeout must be a finite number, above 0"),
        (("--judge-temperature", "-1"), "--judge-temperature must be 0 or more"),
        (("--answers", "gone.json"), "--answers gone.json"),
    ):
        assert command(GENERIC, *arguments) == 2 and message in " ".join(capsys.readouterr().err.split())
    asked = ("--judge-url", server.url, "--judge-model", "m", "--judge-key", "ODD_KEY")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "openai", None)
        assert command(GENERIC, *asked) == 2
        assert "pip install 'bt-adapter[judge]'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("ODD_KEY", "two\nlines")
    assert command(GENERIC, *asked) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "environment variable ODD_KEY must be ASCII" in said and "lines" not in said.partition("ASCII")[0]
