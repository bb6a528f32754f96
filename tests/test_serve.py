"""The server, asked by OpenAI's own client: answers, streams, frames, errors."""

import httpx
import pytest
import torch
from serving import QUESTION, about, clip, data_url, mini, openai, serving

from bt_adapter.chat.engine import read
from bt_adapter.chat.watch import Sampling, encode_image, watch
from bt_adapter.commands import cli
from bt_adapter.data.stream import FrameStream
from bt_adapter.errors import CommandError
from bt_adapter.serve.run import bind, find_key, run_serve
from bt_adapter.serve.settings import Serve

LETTER = [{"role": "user", "content": "x"}]
FPS_2 = len(FrameStream(clip(0), fps=2.0))


@pytest.fixture(scope="module")
def server():
    with serving(mini(), local=True) as (url, service):
        yield url, service


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages, **options):
    return client.chat.completions.create(model="mini", messages=messages, **options)


def engine_answer(path, frames=8, question=QUESTION):
    chat = mini()
    conversation = chat.converse()
    conversation.add(watch(chat, path, Sampling(frames, repeat=True)))
    return conversation.ask(question).text


@pytest.mark.parametrize("number", [0, 1])
def test_answers_are_the_engines_and_a_second_question_decodes_nothing(client, server, number):
    metrics = server[1].metrics.cache
    misses = metrics.labels("miss")._value.get()
    for question in (QUESTION, "What is it?"):
        answer = ask(client, about(data_url(clip(number)), question))
        assert answer.choices[0].message.content == engine_answer(clip(number), question=question)
        assert answer.choices[0].finish_reason == "stop" and answer.model == "mini"
        usage = answer.usage
        assert usage.video_frames == [8] and usage.visual_tokens == 37
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > 40
    assert metrics.labels("miss")._value.get() == misses + 1


def test_streamed_pieces_are_the_answer(client):
    whole = ask(client, about(data_url(clip(0))))
    chunks = list(ask(client, about(data_url(clip(0))), stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert len(pieces) > 2 and "".join(pieces) == whole.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "stop" and not chunks[-2].choices[0].delta.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in ask(client, about(data_url(clip(0))), stream=True))


@pytest.mark.parametrize(
    ("fields", "frames"),
    [
        ({"num_frames": 5}, 5),
        ({"fps": 2.0}, FPS_2),
        ({"fps": 100, "max_frames": 6}, 6),
        ({"max_frames": 4}, 4),
        ({"max_frames": 100}, 8),
        ({"media_io_kwargs": {"video": {"num_frames": 3}}}, 3),
        ({"media_io_kwargs": {"video": {"num_frames": 2, "fps": 100.0}}}, 2),
        ({"mm_processor_kwargs": {"num_frames": 7}}, 7),
        ({"num_frames": 50}, 50),  # the clip has 8: frames repeat
    ],
)
def test_frames_are_those_that_the_request_asks_for(client, fields, frames):
    assert ask(client, about(data_url(clip(0))), max_tokens=1, extra_body=fields).usage.video_frames == [frames]


def test_an_answer_about_other_frames_is_the_engines(client):
    answer = ask(client, about(data_url(clip(0))), extra_body={"num_frames": 5})
    assert answer.choices[0].message.content == engine_answer(clip(0), 5)


def test_branch_off_is_the_mean_of_the_frames(client):
    chat = mini()
    expected = chat.ask(chat.encode(read(clip(0), 8, side=chat.images.largest_side), branch=False), QUESTION).text
    assert ask(client, about(data_url(clip(0))), extra_body={"branch": False}).choices[0].message.content == expected
    assert expected != engine_answer(clip(0))


def test_stills_videos_text_and_earlier_turns(client, tmp_path):
    from PIL import Image

    frame = read(clip(3), 1).frames[0]
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "still.png")
    chat = mini()
    conversation = chat.converse()
    conversation.add(encode_image(chat, tmp_path / "still.png"))
    first = conversation.ask("What is it?").text
    conversation.add(watch(chat, clip(2), Sampling(8, repeat=True)))
    second = conversation.ask(QUESTION).text

    messages = about(data_url(tmp_path / "still.png", "image/png"), "What is it?", "image")
    assert ask(client, messages).choices[0].message.content == first
    messages += [{"role": "assistant", "content": first}, *about(data_url(clip(2)))]
    answer = ask(client, messages)
    assert answer.choices[0].message.content == second and answer.usage.video_frames == [8]
    text = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Hello"}]
    with_system, without = (ask(client, messages, max_tokens=2).usage for messages in (text, text[1:]))
    assert with_system.completion_tokens == 2 and with_system.prompt_tokens > without.prompt_tokens


def test_places_of_visuals_within_text(client):
    part = about(data_url(clip(0)))[0]["content"][0]
    texts = [{"type": "text", "text": text} for text in ("Look:", QUESTION)]
    answer = ask(client, [{"role": "user", "content": [texts[0], part, texts[1]]}])
    chat = mini()
    conversation = chat.converse()
    conversation.add(watch(chat, clip(0), Sampling(8, repeat=True)))
    reply = conversation.ask(f"Look:<video>{QUESTION}")
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (reply.text, reply.prompt)


def test_length_stop_and_sampling(client):
    messages = about(data_url(clip(0)))
    whole = ask(client, messages).choices[0].message.content
    assert whole == "It is moving left."
    short = ask(client, messages, max_completion_tokens=2).choices[0]
    assert (short.message.content, short.finish_reason) == ("It is", "length")
    stopped = ask(client, messages, stop=["zebra", " left"]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("It is moving", "stop")
    text = [{"role": "user", "content": "Tell me about the sea."}]
    drawn = [
        ask(client, text, temperature=1.5, seed=seed, max_tokens=12).choices[0].message.content for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = ask(client, text, max_tokens=12).choices[0].message.content
    assert ask(client, text, temperature=2.0, top_p=1e-9, max_tokens=12).choices[0].message.content == greedy


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2}, "n", "only as 1"),
        ({"logprobs": True}, "logprobs", "only as False"),
        ({"tools": [{}]}, "tools", "only as"),
        ({"frames": 3}, "frames", "is not supported"),
        ({"num_frames": 0}, "num_frames", "greater than or equal to 1"),
        ({"num_frames": "8"}, "num_frames", "integer"),
        ({"num_frames": 129}, "num_frames", "at most 128"),
        ({"num_frames": 9, "max_frames": 8}, "num_frames", "num_frames is 9, but max_frames is 8"),
        ({"num_frames": 9, "media_io_kwargs": {"video": {"num_frames": 8}}}, "num_frames", "several times"),
        ({"fps": 0}, "fps", "greater than 0"),
        ({"media_io_kwargs": {"video": {"speed": 2}}}, "media_io_kwargs.video.speed", "is not supported"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": 9000}, "messages", "context is 8192"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "in turn"),
        ({"messages": [*LETTER, {"role": "assistant", "content": "It"}]}, "messages", "in turn"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1 item"),
        ({"messages": LETTER * 2001}, "messages", "at most 2000 items"),
        ({"stop": ["a"] * 9}, "stop", "at most 8 items"),
        ({"stop": "a" * 501}, "stop", "at most 500"),
        ({"store": True}, "store", "only as False"),
        ({"service_tier": "priority"}, "service_tier", "only as 'auto' or 'default'"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages", "empty"),
        ({"messages": [{"role": "user", "content": "<image>"}]}, "messages", "<image>"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_name(server, fields, param, words):
    body = {"model": "mini", "messages": about(data_url(clip(0)))} | fields
    answer = httpx.post(f"{server[0]}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"], error


def test_errors_have_openais_shape_and_classes(client, server):
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.chat.completions.create(model="other", messages=about(data_url(clip(0))))
    with pytest.raises(openai.BadRequestError, match="video cannot be used"):
        ask(client, about(data_url(b"no video")))
    for path, status in (("/nothing", 404), ("/v1/nothing", 404), ("/v1/chat/completions", 405)):
        answer = httpx.get(server[0] + path)
        assert answer.status_code == status and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    answer = httpx.post(f"{server[0]}/v1/chat/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]
    for content, kind in ((b"{}", "text/plain"), (b"[]", "application/json"), (b"null", "application/json")):
        answer = httpx.post(f"{server[0]}/v1/chat/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400 and "a JSON object, sent with" in answer.json()["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_models_health_version_metrics(client, server):
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini") == next(iter(client.models.list()))
    assert httpx.get(f"{server[0]}/health").json() == {"status": "ok"}
    assert httpx.get(f"{server[0]}/version").json()["version"]
    text = httpx.get(f"{server[0]}/metrics").text
    assert 'bt_adapter_requests_total{path="/v1/models",status="200"}' in text and "bt_adapter_batch_size" in text
    assert httpx.get(f"{server[0]}/health", headers={"X-Request-Id": "mine"}).headers["X-Request-Id"] == "mine"
    assert httpx.get(f"{server[0]}/health", headers={"X-Request-Id": "<x>"}).headers["X-Request-Id"] != "<x>"


def test_a_local_server_answers_to_no_other_name(server):
    """The name of a site whose page is open in a browser of this machine may come to stand for 127.0.0.1."""
    for host, status in (
        ("localhost:80", 200), ("LOCALHOST.", 200), ("[::1]:8000", 200), ("10.0.0.1", 200), ("evil.org", 403),
        ("127.0.0.1.evil.org:80", 403), ("localhost.evil.org", 403), ("", 403),
    ):  # fmt: skip
        answer = httpx.get(f"{server[0]}/v1/models", headers={"Host": host})
        assert answer.status_code == status, host
        assert status == 200 or answer.json()["error"]["code"] == "host_not_allowed"
    origin = {"Origin": "https://evil.org", "Access-Control-Request-Method": "POST"}
    for method, path in (
        ("OPTIONS", "/v1/chat/completions"),
        ("GET", "/v1/models"),
    ):  # a browser then withholds answers
        answer = httpx.request(method, f"{server[0]}{path}", headers=origin)
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_a_port_that_another_server_took_meanwhile_is_told(monkeypatch):
    """Two servers may both reserve a port before one of them listens."""
    first = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    listening = bind("127.0.0.1", port)
    listening.listen()
    monkeypatch.setattr("bt_adapter.serve.run.bind", lambda host, port: first)
    monkeypatch.setattr("bt_adapter.serve.run.load", lambda model: mini())
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    try:
        with pytest.raises(CommandError, match=rf"--port {port}: cannot listen there \(Address already in use\)"):
            run_serve(Serve(port=port))
        with pytest.raises(CommandError, match="cannot listen there"):
            bind("127.0.0.1", port)
    finally:
        first.close()
        listening.close()


def test_an_empty_key_does_not_open_the_server(monkeypatch):
    monkeypatch.setenv("BT_ADAPTER_API_KEY", "")
    assert find_key("given") == "given"
    for given, name in ((None, "BT_ADAPTER_API_KEY"), ("", "--api-key"), (" a", "--api-key"), ("a\n", "--api-key")):
        with pytest.raises(CommandError, match=f"{name} must be a key without white space"):
            find_key(given)
    monkeypatch.delenv("BT_ADAPTER_API_KEY")
    assert find_key(None) is None


def test_options_of_the_command(capsys, tmp_path):
    for arguments, message in (
        (("--api-key", ""), "--api-key"),
        (("--port", "70000"), "--port"),
        (("--allowed-media-path", str(tmp_path / "no")), "no such folder"),
        (("--allowed-media-domain", "https://x.org"), "expected HOST"),
        (("--frames", "200", "--port", "0"), "--max-frames"),
        ((str(tmp_path),), "--branch"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        assert message in capsys.readouterr().err
