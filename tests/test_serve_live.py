"""Live sessions over HTTP: frames in, answers out, and all that is refused."""

import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from PIL import Image
from serving import serving
from test_answer import make_engine

from bt_adapter.live.session import LiveSession
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.live import LiveSessions

QUESTION = "left or right ?"
URL = "/v1/live/sessions"


@pytest.fixture(scope="module")
def chat():
    chat = make_engine()
    chat.branch.trained_steps = 4
    return chat


@pytest.fixture(scope="module")
def server(chat):
    limits = Limits(live_sessions=3, frames=16, pixels=10_000, live_bytes=1 << 20)
    with serving(chat, name="tiny", most_tokens=4, limits=limits) as (url, service):
        with httpx.Client(base_url=url, timeout=60) as client:
            yield client, service


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture
def session(client):
    """The path of a session of one frame a second, which is closed at the end."""
    opened = client.post(URL, json={"fps": 1.0})
    assert opened.status_code == 201
    path = f"{URL}/{opened.json()['id']}"
    yield path
    client.delete(path)


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(8))


def png(frame: torch.Tensor) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def push(client, path: str, frame: torch.Tensor, time: float) -> bool:
    answer = client.post(f"{path}/frames", params={"time": time}, content=png(frame))
    assert answer.status_code == 200, answer.text
    return answer.json()["kept"]


def error(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


@pytest.mark.parametrize("fields", [{}, {"window": "whole"}, {"branch": False, "frames": 2}])
def test_answers_are_those_of_a_session_in_python(client, chat, fields):
    opened = client.post(URL, json=fields)
    assert opened.status_code == 201
    path, own = f"{URL}/{opened.json()['id']}", LiveSession(chat, **fields)
    for number, frame in enumerate(pictures(11)):
        assert push(client, path, frame, number / 4)
        own.push(frame, number / 4)
    answer = client.post(f"{path}/ask", json={"question": QUESTION})
    assert answer.status_code == 200, answer.text
    expected = own.ask(QUESTION, 4)
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"].strip() == expected.reply.text
    assert body["usage"]["video_frames"] == [expected.view.frames]
    assert body["usage"]["prompt_tokens"] == expected.reply.prompt
    assert answer.headers["x-live-span"] == "{:.3f},{:.3f}".format(*expected.view.span)
    streamed = client.post(f"{path}/ask", json={"question": QUESTION, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-live-span"] == answer.headers["x-live-span"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert client.delete(path).json() == {"id": opened.json()["id"], "object": "live.session", "deleted": True}
    assert error(client.post(f"{path}/ask", json={"question": QUESTION}), 404)["code"] == "session_not_found"


def test_frames_that_are_not_wanted_are_not_decoded(client, session):
    assert push(client, session, pictures(1)[0], 0.0)
    skipped = client.post(f"{session}/frames", params={"time": 0.5}, content=b"no picture")
    assert skipped.json() == {"kept": False}
    assert push(client, session, pictures(1)[0], 1.0)
    usage = client.post(f"{session}/ask", json={"question": QUESTION, "max_tokens": 1}).json()["usage"]
    assert (usage["video_frames"], usage["completion_tokens"]) == ([2], 1)


def test_time_stamps_may_be_left_out(client, session):
    assert client.post(f"{session}/frames", content=png(pictures(1)[0])).json() == {"kept": True}


def test_bad_frames_and_times_are_refused_and_the_session_goes_on(client, session):
    assert (
        "no frame was pushed yet" in error(client.post(f"{session}/ask", json={"question": QUESTION}), 400)["message"]
    )
    frames = f"{session}/frames"
    assert push(client, session, pictures(1)[0], 10.0)
    for content in (b"", b"no picture", png(pictures(1)[0])[:60]):
        body = error(client.post(frames, params={"time": 20}, content=content), 400)
        assert body["code"] == "invalid_media"
        assert body["message"].startswith("the frame cannot be used: ")
        assert "/" not in body["message"]
    large = png(torch.zeros(3, 200, 200, dtype=torch.uint8))
    assert "limit" in error(client.post(frames, params={"time": 20}, content=large), 400)["message"]
    backwards = error(client.post(frames, params={"time": 9}, content=png(pictures(1)[0])), 400)
    assert (backwards["param"], "backwards" in backwards["message"]) == ("time", True)
    for value in ("nan", "inf", "x", "1e300", "-1e300"):
        assert error(client.post(frames, params={"time": value}, content=b""), 400)["param"] == "time"
    assert push(client, session, pictures(1)[0], 20.0)


def test_bad_requests(client, session):
    for fields, param in (
        ({"window": "last"}, "window"),
        ({"frames": 0}, "frames"),
        ({"frames": 17}, "frames"),
        ({"fps": 0.0}, "fps"),
        ({"size": 3}, "size"),
    ):
        assert error(client.post(URL, json=fields), 400)["param"] == param
    assert push(client, session, pictures(1)[0], 0.0)
    for body, param in (
        ({}, "question"),
        ({"question": ""}, "question"),
        ({"question": "x", "n": 2}, "n"),
        ({"question": "x", "temperature": 9.0}, "temperature"),
        ({"question": "x", "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"question": "x", "stream_options": {}}, "stream_options"),
    ):
        assert error(client.post(f"{session}/ask", json=body), 400)["param"] == param
    for words in (3000, 300_000):
        too_long = error(client.post(f"{session}/ask", json={"question": "w20 " * words}), 400)
        assert too_long["code"] == "context_length_exceeded"
    for method, path in (("POST", "frames"), ("POST", "ask"), ("DELETE", "")):
        body = {"json": {"question": "x"}} if path == "ask" else {}
        answer = client.request(method, f"{URL}/unknown/{path}".rstrip("/"), **body)
        assert error(answer, 404)["code"] == "session_not_found"


def test_sessions_are_bounded_in_number_and_memory(client):
    keys = [client.post(URL, json={}).json()["id"] for _ in range(3)]
    refused = client.post(URL, json={})
    assert error(refused, 429)["code"] == "busy"
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/metrics").text.count("live_sessions") > 0
    for key in keys:
        assert client.delete(f"{URL}/{key}").status_code == 200
    assert client.post(URL, json={}).status_code == 201


def test_idle_sessions_end_without_another_request(chat):
    limits = Limits(live_idle=0.3, live_bytes=100_000)
    with serving(chat, api_key="key", limits=limits) as (url, service):
        with httpx.Client(base_url=url, headers={"Authorization": "Bearer key"}) as client:
            key = client.post(URL, json={}).json()["id"]
            until = time.monotonic() + 20
            while "live_sessions 0.0" not in service.metrics.text().decode():
                assert time.monotonic() < until
                time.sleep(0.1)
            assert client.delete(f"{URL}/{key}").status_code == 404
            big = client.post(URL, json={"frames": 128})
            assert "more than the limit of 100,000 bytes" in error(big, 400)["message"]
        assert error(httpx.post(f"{url}{URL}", json={}), 401)["code"] == "invalid_api_key"


def test_the_server_answers_others_while_a_frame_is_encoded(client, chat, monkeypatch, session):
    begun, go_on, run_tower = threading.Event(), threading.Event(), chat.branch.tower.run

    def wait(*arguments):
        begun.set()
        assert go_on.wait(60)
        return run_tower(*arguments)

    monkeypatch.setattr(chat.branch.tower, "run", wait)
    with ThreadPoolExecutor() as pool:
        try:
            first = pool.submit(push, client, session, pictures(1)[0], 0.0)
            assert begun.wait(60)
            second = pool.submit(push, client, session, pictures(1)[0], 5.0)
            assert client.get("/health").status_code == 200
            assert error(client.delete(f"{URL}/unknown"), 404)
            opened = client.post(URL, json={}).json()["id"]  # it looks at all open sessions
            assert client.delete(f"{URL}/{opened}").status_code == 200
            assert not first.done()
        finally:
            go_on.set()
        assert first.result() and second.result()


def test_sessions_share_one_timer(chat, monkeypatch):
    begun, drop_later = [], LiveSessions._drop_later
    monkeypatch.setattr(LiveSessions, "_drop_later", lambda sessions: begun.append(drop_later(sessions)))
    with serving(chat, limits=Limits(live_idle=600.0)) as (url, _), httpx.Client(base_url=url) as client:
        for _ in range(4):
            assert client.delete(f"{URL}/{client.post(URL, json={}).json()['id']}").status_code == 200
    assert len(begun) == 1
