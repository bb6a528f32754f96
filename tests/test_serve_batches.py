"""Requests of one moment are one batch, each answered as if alone; full queues, clients that go, a killed server."""

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import torch
from chat_models import FAMILIES, make_branch, make_chat
from PIL import Image
from serving import QUESTION, about, clip, data_url, mini, openai, serving
from test_chat import make_tokenizer

from bt_adapter.chat.attach import attach
from bt_adapter.chat.engine import VideoChat, read
from bt_adapter.chat.families import family_of
from bt_adapter.chat.watch import EncodedVisual, Sampling, encode_image, watch
from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.rows import AnswerText, Decoding, Row, Sampler
from bt_adapter.serve.sharing import SharedWork
from bt_adapter.serve.tokens import Seen, TokenCache

LONG = [{"role": "user", "content": "Tell me a long story about a ship."}]


@pytest.fixture(scope="module")
def server():
    with serving(mini(), limits=Limits(waiting=5)) as (url, service):
        yield url, service


@contextmanager
def client_of(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield lambda messages, **options: client.chat.completions.create(model="mini", messages=messages, **options)


@contextmanager
def model_held(service):
    """Let the model's thread wait until the context ends."""
    go_on = threading.Event()
    future = service.model.run(go_on.wait)
    try:
        yield
    finally:
        go_on.set()
        future.result(30)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def test_requests_of_one_moment_are_one_batch_and_answered_as_if_alone(server):
    url, service = server
    asked = [
        {"messages": about(data_url(clip(0)))},
        {"messages": about(data_url(clip(1)), "What is it?"), "max_tokens": 3},
        {"messages": LONG, "max_tokens": 9},
        {"messages": LONG, "max_tokens": 5, "temperature": 1.0, "seed": 7},
        {"messages": about(data_url(clip(0)), f"Look at it for a while. {QUESTION}"), "stop": "mov"},
    ]
    batches = service.metrics.batch_size

    def counted():
        return batches._sum.get(), sum(bucket.get() for bucket in batches._buckets)

    begin = counted()
    with client_of(url) as ask:
        alone = [ask(**one).choices[0] for one in asked]
        wait_for(lambda: counted() == (begin[0] + 5, begin[1] + 5))  # counted after the answer was told
        with ThreadPoolExecutor(5) as pool, model_held(service):
            together = [pool.submit(ask, **one) for one in asked]
            wait_for(lambda: service.model.waiting == 5)
        assert [future.result().choices[0] for future in together] == alone
    wait_for(lambda: counted() == (begin[0] + 10, begin[1] + 6))
    assert len({choice.message.content for choice in alone}) >= 4 and alone[1].finish_reason == "length"


def test_a_batch_waits_a_little_for_a_request_that_is_being_prepared(server, monkeypatch):
    url, service = server
    batches = service.metrics.batch_size
    begin = batches._sum.get(), sum(bucket.get() for bucket in batches._buckets)
    monkeypatch.setattr(service.model, "seconds", 100.0)  # 10 seconds of patience
    monkeypatch.setattr(service.model, "expected", lambda: 2)
    with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, LONG, max_tokens=1)
        wait_for(lambda: service.model.waiting == 1)
        assert pool.submit(ask, LONG, max_tokens=2).result() and first.result()
    wait_for(lambda: batches._sum.get() == begin[0] + 2)
    assert sum(bucket.get() for bucket in batches._buckets) == begin[1] + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_its_engine(family, tmp_path):
    torch.manual_seed(0)
    model, tokenizer = make_chat(family), make_tokenizer()
    family_of(model).generator.generation_config.min_new_tokens = 5
    further = {"qformer_tokenizer": tokenizer} if family == "instructblip" else {}
    engine = VideoChat(attach(model, make_branch(model)), tokenizer, **further)
    still = tmp_path / "still.png"
    Image.fromarray(read(clip(1), 1).frames[0].permute(1, 2, 0).numpy()).save(still)
    with serving(engine, name="small", most_tokens=5, sampling=Sampling(4)) as (url, service):
        for path, kind in ((clip(0), "video"), (still, "image"), (clip(0), "video")):
            for question in ("how is it moving ?", "left or right w20 ?"):
                conversation = engine.converse()
                seen = watch(engine, path, Sampling(4)) if kind == "video" else encode_image(engine, path)
                conversation.add(seen)
                expected = conversation.ask(question, 5).text
                body = {"model": "small", "messages": about(data_url(path), question, kind)}
                answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
                assert answer["choices"][0]["message"]["content"] == expected
        assert service.cache.size > 0 and service.metrics.cache.labels("miss")._value.get() == 2


def test_a_full_queue_answers_429_with_a_time(server):
    url, service = server
    with client_of(url) as ask, ThreadPoolExecutor(5) as pool:
        with model_held(service):
            waiting = [pool.submit(ask, LONG, max_tokens=1) for _ in range(5)]
            wait_for(lambda: service.admitted == 5)
            with pytest.raises(openai.RateLimitError) as error:
                ask(LONG, max_tokens=1)
        assert int(error.value.response.headers["Retry-After"]) >= 1 and error.value.code == "busy"
        assert all(future.result() for future in waiting)
        wait_for(lambda: service.admitted == 0)
        assert ask(LONG, max_tokens=1)


def test_the_same_video_of_two_requests_is_decoded_once(server):
    url, service = server
    cache = service.metrics.cache
    before = {result: cache.labels(result)._value.get() for result in ("miss", "shared")}
    with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
        with model_held(service):
            both = [pool.submit(ask, about(data_url(clip(5))), max_tokens=2) for _ in range(2)]
            wait_for(lambda: cache.labels("shared")._value.get() == before["shared"] + 1)
        assert both[0].result().choices == both[1].result().choices
    assert cache.labels("miss")._value.get() == before["miss"] + 1


def test_the_same_video_with_and_without_the_branch_is_decoded_once(server, monkeypatch):
    url, service = server
    decoded, decode = [], service.decoder.video
    monkeypatch.setattr(service.decoder, "video", lambda *options: decoded.append(options) or decode(*options))
    with client_of(url) as ask, ThreadPoolExecutor(2) as pool:
        with model_held(service):
            both = [
                pool.submit(ask, about(data_url(clip(6))), max_tokens=2, extra_body={"branch": branch})
                for branch in (True, False)
            ]
            wait_for(lambda: len(service._encoding._running) == 2 and service.decoded._value == 2)
        assert all(future.result() for future in both)
    assert len(decoded) == 1


def test_few_decoded_videos_wait_for_the_model(server, monkeypatch):
    """While the model is busy, decoding stops after some visuals, and goes on with it."""
    url, service = server
    done, decode = [], service.decoder.video
    monkeypatch.setattr(service.decoder, "video", lambda *options: done.append(decode(*options)) or done[-1])
    part = [
        about(data_url(clip(0).read_bytes() + bytes([0, 0, 0, 9]) + b"free" + bytes([n])))[0]["content"][0]
        for n in range(6)
    ]
    content = [*part, {"type": "text", "text": QUESTION}]
    with client_of(url) as ask, ThreadPoolExecutor(1) as pool:
        with model_held(service):
            answer = pool.submit(ask, [{"role": "user", "content": content}], max_tokens=1)
            wait_for(lambda: len(done) == 4)
            time.sleep(0.3)
            assert len(done) == 4
        assert answer.result().usage.video_frames == [8] * 6
    assert len(done) == 6


def test_files_and_downloads_are_limited_together(server, monkeypatch):
    """The bytes of bodies and of files that are read are one sum."""
    url, service = server
    with service.held.account() as hold, service.held.account() as other:
        hold(service.held.most - 10)
        with pytest.raises(ApiError, match="too many large requests") as error:
            other(11)
        assert error.value.status == 429
        other(10)
    assert service.held.size == 0


@pytest.fixture
def held(monkeypatch):
    """An event that is set when an answer has come to its fifth token, where it is held until it is cancelled."""
    put, held = Row.put, threading.Event()

    def put_and_hold(row, token):
        if row.tokens == 4:
            held.set()
            row.cancelled.wait(60)
        put(row, token)

    monkeypatch.setattr(Row, "put", put_and_hold)
    return held


def test_a_client_that_goes_ends_its_answer(server, held):
    url, service = server
    generated, cancelled = service.metrics.answer_tokens._value, service.metrics.cancelled._value
    begin, gone = generated.get(), cancelled.get()
    body = {"model": "mini", "messages": LONG, "max_tokens": 2000}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        assert sum(next(lines).startswith("data: ") for _ in range(4)) >= 2
        assert held.wait(60)
    wait_for(lambda: service.admitted == 0 and generated.get() > begin)
    assert generated.get() == begin + 5 and cancelled.get() == gone + 1

    held.clear()
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    assert held.wait(60)
    connection.close()
    wait_for(lambda: service.admitted == 0 and generated.get() > begin + 5)
    assert generated.get() == begin + 10 and cancelled.get() == gone + 2
    with client_of(url) as ask:
        assert ask(LONG, max_tokens=1)


def test_an_error_of_the_model_is_told_to_clients(server, monkeypatch):
    url, service = server

    def fail(*arguments):
        raise RuntimeError("/a/path of this machine")

    monkeypatch.setattr("bt_adapter.serve.joining.batch_prompts", fail)
    answer = httpx.post(f"{url}/v1/chat/completions", json={"model": "mini", "messages": LONG}, timeout=60)
    assert answer.status_code == 500 and "/a/path" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    with client_of(url) as ask, pytest.raises(openai.APIError, match="failed to answer"):
        list(ask(LONG, stream=True))


def test_a_server_that_stops_ends_its_answers_with_an_error(held):
    def listen(url, stream):
        body = {"model": "mini", "messages": LONG, "max_tokens": 2000, "stream": stream}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)

    with ThreadPoolExecutor(2) as pool:
        with serving(mini()) as (url, _):
            heard = [pool.submit(listen, url, stream) for stream in (True, False)]
            assert held.wait(60)
        streamed, whole = (one.result(60) for one in heard)
    assert streamed.text.rstrip().endswith('"code":"stopping"}}') and "[DONE]" not in streamed.text
    assert '"finish_reason":"' not in streamed.text
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "stopping"


def test_a_killed_server_leaves_an_error_and_no_process(tmp_path):
    """The command itself: it prints its address, streams, and dies in the middle of an answer."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "bt_adapter.commands", "serve", "--no-page", "--port", "0", "--threads", "1"]
    server = subprocess.Popen(
        [*command, "--dtype", "float32"], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        assert server.stderr is not None
        url = next(line.rpartition(" ")[2].strip() for line in server.stderr if line.startswith("serving mini at"))
        body = {"model": "mini", "messages": LONG, "max_tokens": 2000, "stream": True}
        body |= {"temperature": 2.0, "seed": 0}  # so hot that it rambles: it is not done when the server dies
        with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert all(next(lines).startswith("data: {") for _ in range(3))
            os.kill(server.pid, signal.SIGKILL)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        server.wait(30)
        members = [pid for pid in os.listdir("/proc") if pid.isdigit() and _group(pid) == server.pid]
        assert members == []
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def _group(pid):
    try:
        return os.getpgid(int(pid))
    except ProcessLookupError:
        return None


@pytest.mark.parametrize(
    ("pieces", "stop", "text", "found"),
    [
        (["It is", " moving ", " left. "], (), "It is moving  left.", False),
        (["  \n a", " b", " \n"], (), "a b", False),
        (["one two", " three"], ("two",), "one", True),
        (["ab", "cd", "ef"], ("bcde",), "a", True),
        (["ab", "cd", "xf"], ("bcde",), "abcdxf", False),
        (["ab", "c"], ("cd", "bcx"), "abc", False),
    ],
)
def test_text_of_an_answer(pieces, stop, text, found):
    said = []
    answer = AnswerText(stop, said.append)
    assert any([answer.add(piece) for piece in pieces]) == found
    answer.end()
    assert "".join(said) == answer.said == text


def test_a_long_stop_text_costs_no_more_than_what_is_held_back():
    answer = AnswerText(("a" * 10**7 + "b",), lambda text: None)
    begin = time.process_time()
    for _ in range(100):
        answer.add("a")
    assert time.process_time() - begin < 1


def test_draws_follow_the_distribution():
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for top_p, kept in ((1.0, 4), (0.8, 2)):
        draw = Sampler(Decoding(1, 1.0, top_p, 0))
        counts = torch.bincount(torch.stack([draw(scores).argmax() for _ in range(4000)]), minlength=4) / 4000
        expected = torch.where(torch.arange(4) < kept, scores.exp(), 0)
        assert (counts - expected / expected.sum()).abs().max() < 0.03
        assert (counts[kept:] == 0).all()


def test_the_cache_holds_no_more_than_its_bytes():
    visual = EncodedVisual("video", torch.zeros(1, 1))
    cache = TokenCache(100)
    for name, size in (("a", 40), ("b", 40), ("c", 20)):
        cache.put(name, Seen(visual, (), size))
    assert cache.get("a") is not None and (len(cache), cache.size) == (3, 100)
    cache.put("d", Seen(visual, (), 30))  # b was used the longest time ago
    assert cache.get("b") is None and cache.get("a") is not None and cache.size == 90
    cache.put("e", Seen(visual, (), 101))
    assert cache.get("e") is None and len(cache) == 3
    cache.put("a", Seen(visual, (), 10))
    assert cache.size == 60


def test_shared_work_ends_with_its_last_user():
    async def run():
        shared, begun, ended = SharedWork(), asyncio.Event(), []

        async def work(cancelled):
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                ended.append(cancelled.is_set())

        users = [asyncio.create_task(shared.get("key", work)) for _ in range(2)]
        await begun.wait()
        users[0].cancel()
        await asyncio.sleep(0.01)
        assert ended == [] and "key" in shared
        users[1].cancel()
        await asyncio.sleep(0.01)
        assert ended == [True] and "key" not in shared

        async def fail(cancelled):
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await shared.get("key", fail)
        assert "key" not in shared

    asyncio.run(run())
