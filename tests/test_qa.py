"""Benchmarks of questions: their layouts, exact match, and a judge that fails, stalls and talks nonsense."""

import http.server
import json
import os
import re
import signal
import sys
import threading
import time
from email.utils import formatdate

import pytest
from test_answer import chat, folder  # noqa: F401 (fixtures)

from bt_adapter.chat import answer
from bt_adapter.commands import cli
from bt_adapter.data.finding import VisualFolder
from bt_adapter.errors import CommandError
from bt_adapter.eval.qa import Item, exact_scores, normalise, read_items, write_predictions
from bt_adapter.files import Rows
from bt_adapter.qa import judge
from bt_adapter.qa import run as qa
from bt_adapter.qa.judge import Case, Judge, JudgeError, judge_all, summary
from bt_adapter.training.loop import Stopped

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


# --- the judge


class Stand(http.server.ThreadingHTTPServer):
    """A judge on 127.0.0.1. ``script``: what it does to the n-th request about a case, by the case's right answer."""

    daemon_threads = True

    def __init__(self, script=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = script or (lambda right, n: "good")
        self.lock, self.asked, self.running, self.most = threading.Lock(), {}, 0, 0
        self.bodies, self.keys = [], []
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Clients that gave up are meant to."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        right = re.search(r"Right answer: (.*)", body["messages"][1]["content"])[1]
        with server.lock:
            n = server.asked[right] = server.asked.get(right, 0) + 1
            server.running += 1
            server.most = max(server.most, server.running)
            server.bodies.append(body)
            server.keys.append(self.headers.get("Authorization"))
        try:
            self.act(server.script(right, n), self.path)
        finally:
            with server.lock:
                server.running -= 1

    def act(self, what, path):
        if what == "stall":
            time.sleep(1.5)
        if what == "cut":
            self.connection.close()
            return
        if path != "/v1/chat/completions":
            what = 404
        if what == "deep":
            self.answer(200, b"[" * 200_000, {})
            return
        if isinstance(what, int):
            self.answer(what, {"error": "no"}, {"Retry-After": "0.01"})
            return
        text = {"good": 'Sure: {"right": "yes", "score": 4}', "python": "{'right': 'no', 'score': 1}",
                "nonsense": "I would rather not.", "range": '{"right": "yes", "score": 9}'}.get(what, "")  # fmt: skip
        message = [{"message": {"role": "assistant", "content": text}}]
        reply = {"choices": [] if what == "empty" else message, "model": "judge-2026", "system_fingerprint": "fp1"}
        self.answer(200, reply, {})

    def answer(self, code, body, headers):
        data = body if isinstance(body, bytes) else b"<html>" if body is None else json.dumps(body).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def stand():
    servers = []

    def start(script=None):
        servers.append(Stand(script))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


CASES = [Case(str(i), ((f"q{i}", f"said {i}"),), f"right {i}") for i in range(12)]


def judged(tmp_path, judge, cases=CASES, aspect="match"):
    with Rows(tmp_path / "judged.jsonl", {}) as rows:
        return judge_all(judge, cases, aspect, rows), summary(cases, aspect, rows)


def test_a_judge_that_fails_stalls_and_talks_nonsense(stand, tmp_path):
    troubles = [500, 429, "stall", "cut", "nonsense", "range", "empty", 503]
    # the i-th case meets the i-th trouble first, the next one then; two in three verdicts are good
    server = stand(
        lambda right, n: troubles[(int(right[6:]) + n) % 8] if n < 3 else ("python", "good", "good")[int(right[6:]) % 3]
    )
    judge = Judge(server.url, "judge", key="secret", timeout=1.0, tries=6, pause=0.01, parallel=3)
    skipped, found = judged(tmp_path, judge)
    assert not len(skipped) and found["judged"] == 12 and found["unjudged"] == 0
    assert found["accuracy"] == pytest.approx(8 / 12) and found["score"] == pytest.approx((8 * 4 + 4) / 12)
    assert found["models"] == ["judge-2026"] and found["fingerprints"] == ["fp1"]
    assert min(server.asked.values()) == 3  # a slow machine may lose one more to the timeout
    assert set(server.keys) == {"Bearer secret"} and server.bodies[0]["model"] == "judge"
    asked = dict(server.asked)
    assert found["requests"] == sum(asked.values()) and found["refused"] == 0
    assert found["retries"] == found["failures"] == found["requests"] - 12
    assert judged(tmp_path, judge)[1] == found and server.asked == asked  # nothing is asked twice


def test_a_key_that_was_not_given_is_not_sent(stand, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of another endpoint")
    server = stand()
    judged(tmp_path, Judge(server.url, "judge"), CASES[:1])
    assert server.keys == [None]


def test_requests_are_parallel_but_bounded(stand, tmp_path):
    server = stand(lambda right, n: time.sleep(0.05) or "good")
    judged(tmp_path, Judge(server.url, "judge", parallel=3))
    assert server.most == 3


def test_nothing_but_nonsense_is_counted_and_asked_again(stand, tmp_path):
    server = stand(lambda right, n: "nonsense" if right in ("right 1", "right 4") and n <= 2 else "good")
    judge = Judge(server.url, "judge", tries=2, pause=0.01, parallel=2)
    skipped, found = judged(tmp_path, judge)
    assert set(skipped.reasons) == {"1", "4"} and found["judged"] == 10 and found["unjudged"] == 2
    assert "no score" in skipped.reasons["1"]
    assert (found["requests"], found["retries"], found["failures"]) == (14, 2, 4)
    skipped, found = judged(tmp_path, judge)
    assert not len(skipped) and found["judged"] == 12
    assert (found["requests"], found["retries"], found["failures"]) == (16, 4, 4)  # of both runs


@pytest.mark.parametrize("code", [400, 413, 422])
def test_an_answer_that_is_refused_holds_nothing_up(stand, tmp_path, code):
    server = stand(lambda right, n: code if right in ("right 0", "right 7") else "good")
    judge = Judge(server.url, "judge", tries=3, pause=0.01, parallel=1)
    skipped, found = judged(tmp_path, judge)
    assert set(skipped.reasons) == {"0", "7"} and f"refuses with {code}: " in skipped.reasons["7"]
    assert (found["judged"], found["unjudged"], found["refused"]) == (10, 2, 2)
    assert set(server.asked.values()) == {1}
    again = judged(tmp_path, judge)  # refused once more, and no reason to stop: others were judged here
    assert again[0].reasons == skipped.reasons and (again[1]["judged"], again[1]["requests"]) == (10, 14)
    server.script = lambda right, n: "good"
    skipped, found = judged(tmp_path, judge)
    assert not len(skipped) and (found["judged"], found["refused"], found["requests"]) == (12, 0, 16)


@pytest.mark.parametrize("code", [400, 422])
@pytest.mark.parametrize(("count", "parallel", "most"), [(12, 1, 3), (12, 8, 9), (2, 4, 2), (1, 1, 1)])
def test_an_endpoint_that_refuses_every_request_stops_the_run_and_spoils_nothing(
    stand, tmp_path, code, count, parallel, most
):
    server = stand(lambda right, n: code)
    judge = Judge(server.url, "judge", tries=3, pause=0.01, parallel=parallel)
    with pytest.raises(JudgeError, match=rf"refuses with {code}: .*--judge-temperature None\); 0 of {count} answers"):
        judged(tmp_path, judge, CASES[:count])
    assert sum(server.asked.values()) <= most + parallel - 1 and (tmp_path / "judged.jsonl").read_bytes() == b""
    server.script = lambda right, n: "good"
    with Rows(tmp_path / "judged.jsonl", {"temperature": None}) as rows:  # nothing was kept that was asked otherwise
        assert not len(judge_all(judge, CASES[:count], "match", rows))
        assert summary(CASES[:count], "match", rows)["judged"] == count


def test_an_endpoint_that_begins_to_refuse_stops_the_run(stand, tmp_path):
    server = stand(lambda right, n: "good" if int(right[6:]) < 5 else 400)
    judge = Judge(server.url, "judge", parallel=1)
    with pytest.raises(JudgeError, match="refuses with 400: .*5 of 12 answers are judged"):
        judged(tmp_path, judge)
    assert sum(server.asked.values()) == 8
    server.script = lambda right, n: "good" if right != "right 5" else 400
    skipped, found = judged(tmp_path, judge)
    assert set(skipped.reasons) == {"5"} and (found["judged"], found["refused"]) == (11, 1)


def test_temperature_can_be_left_out(stand, tmp_path):
    server = stand()
    judged(tmp_path, Judge(server.url, "judge"), CASES[:1])
    assert server.bodies[0]["temperature"] == 0
    judged(tmp_path / "none", Judge(server.url, "judge", temperature=None), CASES[:1])
    assert "temperature" not in server.bodies[1]
    judged(tmp_path / "half", Judge(server.url, "judge", temperature=0.5), CASES[:1])
    assert server.bodies[2]["temperature"] == 0.5


def test_an_endpoint_says_how_long_to_wait():
    assert judge._retry_after("2.5") == 2.5 and judge._retry_after("3600") == 60
    assert judge._retry_after(None) is judge._retry_after("soon") is judge._retry_after("nan") is None
    assert 3 < judge._retry_after(formatdate(time.time() + 5, usegmt=True)) <= 5
    assert judge._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_what_is_under_way(stand, tmp_path, number):
    def script(right, n):
        if right == "right 2":
            os.kill(os.getpid(), number)
            time.sleep(0.3)
        return "cut" if right == "right 1" else "good"

    server = stand(script)
    judge = Judge(server.url, "judge", tries=2, pause=60, parallel=3)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=r"stopped; \d of 12 answers are judged and kept in .*judged.jsonl: run again"):
        judged(tmp_path, judge)
    assert signal.getsignal(number) == before
    with Rows(tmp_path / "judged.jsonl", {}) as rows:
        assert {case for case, row in rows.done.items() if row["score"] == 4} == {
            right[6:] for right in server.asked if right != "right 1"
        }
    server.script = lambda right, n: "good"
    found = judged(tmp_path, judge)[1]
    assert found["judged"] == 12 and found["failures"] == found["retries"] == 1
    assert sum(server.asked.values()) == found["requests"] == 13


def test_an_endpoint_that_goes_down_keeps_the_work(stand, tmp_path):
    down = threading.Event()

    def script(right, n):
        if sum(server.asked.values()) > 5:
            down.set()
        return 503 if down.is_set() else "good"

    server = stand(script)
    judge = Judge(server.url, "judge", tries=2, pause=0.01, parallel=2)
    with pytest.raises(JudgeError, match=r"503.*5 of 12 answers are judged and kept in .*judged.jsonl: run again"):
        judged(tmp_path, judge)
    done = [right for right, n in server.asked.items() if n == 1]
    server.script = lambda right, n: "good"
    before = dict(server.asked)
    assert judged(tmp_path, judge)[1]["judged"] == 12
    assert all(server.asked[right] == before[right] for right in done[:5])


def test_an_endpoint_that_is_not_there_or_refuses(stand, tmp_path):
    for code in (401, 402, 403, 404, 405, 410):
        server = stand(lambda right, n, code=code: code)
        with pytest.raises(JudgeError, match=f"the judge at {server.url} answers {code}"):
            judged(tmp_path, Judge(server.url, "judge"))
        assert max(server.asked.values()) == 1  # asking again would be no use
    nobody = stand()
    url = nobody.url
    nobody.shutdown()
    nobody.server_close()
    began = time.perf_counter()
    with pytest.raises(JudgeError, match="0 of 12 answers are judged"):
        judged(tmp_path, Judge(url, "judge", tries=2, pause=0.01))
    assert time.perf_counter() - began < 5


def test_verdicts_on_other_answers_are_refused(stand, tmp_path):
    judged(tmp_path, Judge(stand().url, "judge"), CASES[:2])
    changed = [Case("0", (("q0", "said otherwise"),), "right 0")]
    with pytest.raises(CommandError, match="verdict on '0' is about another answer"):
        judged(tmp_path, Judge(stand().url, "judge"), changed)


# --- the command


@pytest.fixture
def command(chat, folder, tmp_path, monkeypatch):  # noqa: F811
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


def test_replies_that_are_no_json_are_nonsense(stand, tmp_path):
    server = stand(lambda right, n: "deep" if right == "right 0" and n == 1 else "good")
    skipped, found = judged(tmp_path, Judge(server.url, "judge", pause=0.01, tries=2), CASES[:2])
    assert not len(skipped) and found["judged"] == 2 and found["failures"] == 1
