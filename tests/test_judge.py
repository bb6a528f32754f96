# ruff: noqa: F811 (fixtures)
"""A judge that fails, stalls and talks nonsense, and what is kept of its verdicts."""

import os
import signal
import threading
import time
from email.utils import formatdate

import pytest
from judge_stand import stand  # noqa: F401 (a fixture)

from bt_adapter.errors import CommandError
from bt_adapter.files import Rows
from bt_adapter.qa import judge
from bt_adapter.qa.judge import Case, Judge, JudgeError, judge_all, summary
from bt_adapter.training.loop import Stopped

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


def test_replies_that_are_no_json_are_nonsense(stand, tmp_path):
    server = stand(lambda right, n: "deep" if right == "right 0" and n == 1 else "good")
    skipped, found = judged(tmp_path, Judge(server.url, "judge", pause=0.01, tries=2), CASES[:2])
    assert not len(skipped) and found["judged"] == 2 and found["failures"] == 1
