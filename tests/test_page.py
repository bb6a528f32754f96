"""The server's page in a real browser: clips, questions, a camera, and what it refuses."""

import http.client
import importlib.util
import os
import re
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from PIL import Image
from serving import QUESTION, about, clip, data_url, mini, serving

from bt_adapter.chat.engine import read
from bt_adapter.commands import cli

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'bt-adapter[page]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from bt_adapter.page.mount import add_page  # noqa: E402

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"there is no browser at {CHROMIUM} (CHROMIUM)")
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
)  # fmt: skip
SECONDS = 60  # of waiting for anything; busy machines are slow
expect = sync_api.expect


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        with serving(mini(), extend=add_page) as (url, service):
            yield url, service, uploads


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser, server):
    """One page for all tests: each begins with another video, and so with an empty conversation."""
    page = new_page(browser, viewport={"width": 1280, "height": 960})
    page.set_default_timeout(SECONDS * 1000)
    expect.set_options(timeout=SECONDS * 1000)
    page.seen, page.failures = [], []
    page.on("request", lambda request: page.seen.append(request.url))
    page.on("pageerror", lambda error: page.failures.append(str(error)))
    page.goto(server[0])
    expect(page.locator("#question textarea")).to_be_visible()
    return page


def new_page(browser, **options):
    """Open a page that notes its open streams of events."""
    page = browser.new_page(**options)
    page.streams = set()
    page.on("request", lambda request: page.streams.add(request) if "/queue/data" in request.url else None)
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: page.streams.discard(request))
    return page


def settle(page):
    """Wait until no stream of events is open: gradio's client loses an event that is sent while one closes."""
    until(lambda: not page.streams, lambda seconds: page.wait_for_timeout(1000 * seconds))  # events come meanwhile


@contextmanager
def held(service):
    """Hold the model's thread within the context."""
    release = threading.Event()
    service.model.run(lambda: release.wait(SECONDS))
    try:
        yield
    finally:
        release.set()


def until(condition, pause=time.sleep):
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        pause(0.05)


def clear_button(page):
    """Find the button that removes the video; a video that cannot be played also has a hidden one of its error."""
    return page.locator("#video .icon-button-wrapper button[aria-label=Clear]")


def clear(page):
    """Remove the video, if there is one."""
    page.get_by_role("tab", name="Clip").click()
    button = clear_button(page)
    if button.is_visible():
        button.click()


def choose(page, path):
    """Upload a file as the video, in place of the one before."""
    clear(page)
    page.locator("#video input[type=file]").set_input_files(path)
    expect(page.locator("#video video")).to_be_visible()
    expect(page.locator("#line-0 textarea")).to_have_value("")


def ask(page, question=QUESTION, name="question", running=False):
    """Ask a question. running: events of an answer or of the camera are still coming."""
    if not running:
        settle(page)
    page.locator(f"#{name} textarea").fill(question)
    page.locator(f"#{name}-ask").click()


def line(page, words, name="line-0"):
    """Wait until the line of times holds words; returns it."""
    field = page.locator(f"#{name} textarea")
    expect(field).to_have_value(re.compile(words))
    return field.input_value()


def answers(page, column=0):
    return [text.strip() for text in page.locator(f"#chat-{column} .bot.message").all_inner_texts()]


def api_answer(server, number, **fields):
    body = {"model": "mini", "messages": about(data_url(clip(number))), **fields}
    answer = httpx.post(f"{server[0]}/v1/chat/completions", json=body, timeout=SECONDS)
    return answer.json()["choices"][0]["message"]["content"]


@needs_chromium
def test_an_uploaded_clip_is_answered_in_pieces_and_its_frames_are_shown(page, server, monkeypatch):
    decoder, decoded = server[1].decoder, []
    decode = decoder.video
    monkeypatch.setattr(decoder, "video", lambda *options: decoded.append(options) or decode(*options))
    choose(page, clip(0))
    page.evaluate(
        """() => { window.pieces = []; new MutationObserver(() => {
            const text = document.querySelector('#chat-0 .bot.message')?.innerText.trim();
            if (text && window.pieces.at(-1) !== text) window.pieces.push(text);
        }).observe(document.querySelector('#chat-0'), {childList: true, subtree: true, characterData: true}) }"""
    )
    ask(page)
    assert re.search(
        r"^8 frames, read in .* s, encoded in .* s · first text after .* s · 6 tokens in", line(page, "tokens in")
    )
    expected = api_answer(server, 0)
    assert answers(page) == [expected] and "left" in expected
    pieces = page.evaluate("window.pieces")
    assert len(pieces) > 2 and pieces[-1] == expected and all(expected.startswith(piece) for piece in pieces)
    assert page.locator("#gallery img").count() == 8
    assert len(decoded) == 2  # the page's question, and that of the API just now, whose frames are not shown


@needs_chromium
def test_further_questions_and_a_still_belong_to_the_same_conversation(page, server, tmp_path):
    choose(page, clip(0))
    ask(page)
    line(page, "tokens in")
    frame = read(clip(3), 1).frames[0]
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(tmp_path / "still.png")
    ask(page, "What is it?")
    expect(page.locator("#chat-0 .bot.message")).to_have_count(2)  # the first answer's line may say the same
    line(page, "8 frames, encoded before.*tokens in")
    page.locator("#stills input[type=file]").set_input_files(tmp_path / "still.png")
    expect(page.locator("#stills").get_by_text("still")).to_have_count(2)
    ask(page, "What is it?")
    assert "8 frames, 1 still, read in" in line(page, "1 still, .*tokens in")
    assert len(answers(page)) == 3
    page.locator("#stills button[aria-label=Clear]").click()


@needs_chromium
def test_what_is_typed_during_an_answer_stays(page, server):
    choose(page, clip(0))
    with held(server[1]):
        ask(page)
        expect(page.locator("#question textarea")).to_have_value("")  # before anything is encoded
        page.locator("#question textarea").fill("What is it?")
    line(page, "tokens in")
    expect(page.locator("#gallery img")).to_have_count(8)
    assert answers(page) == [api_answer(server, 0)]
    expect(page.locator("#question textarea")).to_have_value("What is it?")


@needs_chromium
def test_a_question_during_an_answer_is_told_to_wait(page, server):
    choose(page, clip(0))
    with held(server[1]):
        ask(page)
        expect(page.locator("#question textarea")).to_have_value("")
        ask(page, "What is it?", running=True)
        expect(page.locator(".toast-body").filter(has_text="an answer is still running")).to_be_visible()
    line(page, "tokens in")
    assert answers(page) == [api_answer(server, 0)]
    expect(page.locator("#question textarea")).to_have_value("What is it?")


@needs_chromium
def test_frames_and_the_branch_are_chosen_on_the_page(page, server):
    choose(page, clip(1))
    page.locator("#frames input[type=number]").fill("4")
    page.locator("#frames input[type=number]").press("Tab")
    page.get_by_label("Compare with the branch switched off").check()
    expect(page.locator("#chat-1")).to_be_visible()
    ask(page)
    for column, branch in ((0, True), (1, False)):
        assert line(page, "tokens in", f"line-{column}").startswith("4 frames")
        assert answers(page, column) == [api_answer(server, 1, num_frames=4, branch=branch)]
    expect(page.locator("#gallery img")).to_have_count(4)
    page.get_by_label("Compare with the branch switched off").uncheck()
    page.locator("#frames button[aria-label*=Reset]").click()


@needs_chromium
def test_a_file_that_is_no_video_is_told_without_paths(page, server, tmp_path):
    (tmp_path / "junk.mp4").write_bytes(b"no video at all" * 100)
    clear(page)
    page.locator("#video input[type=file]").set_input_files(tmp_path / "junk.mp4")
    expect(clear_button(page)).to_be_visible()
    ask(page)
    toast = page.locator(".toast-body").filter(has_text="cannot be used")
    expect(toast).to_be_visible()
    told = toast.inner_text() + line(page, "Not answered")
    assert str(server[2]) not in told and "/" not in told and "Traceback" not in told
    assert page.locator("#question textarea").input_value() == QUESTION  # to be asked again
    assert answers(page) == []


@needs_chromium
def test_stop_ends_an_answer_before_the_model_has_begun_it(page, server):
    clear(page)
    page.locator("#question textarea").fill("")
    page.locator("#examples").get_by_text("a green trouser moving up").click()
    expect(page.locator("#video video")).to_be_visible()
    expect(page.locator("#question textarea")).to_have_value(QUESTION)
    cancelled = server[1].metrics.cancelled._value.get()
    stop = page.locator("#question-stop")
    expect(stop).to_be_disabled()
    settle(page)
    with held(server[1]):
        page.locator("#question-ask").click()
        expect(page.locator("#gallery img")).to_have_count(0)
        stop.click()  # as soon as it can be clicked, it stops the answer
        assert line(page, "Stopped").startswith("Stopped")
    expect(stop).to_be_disabled()
    assert answers(page) == []
    ask(page)  # the page answers the next one
    line(page, "tokens in")
    assert len(answers(page)) == 1 and server[1].metrics.cancelled._value.get() >= cancelled


@needs_chromium
def test_a_clip_of_the_webcam_is_answered(page, server):
    for seconds in (3, 15):  # a busy machine's browser may have encoded nothing yet
        clear(page)
        record(page, seconds)
        ask(page)
        if "nothing was recorded" not in line(page, "tokens in|Not answered"):
            break
    assert line(page, "tokens in").startswith("8 frames")
    assert answers(page)[0]


def record(page, seconds):
    """Record the webcam for so many seconds of its own time."""
    page.locator("#video button[aria-label='Capture from camera']").click()
    access = page.locator("#video").get_by_text("Click to Access Webcam")
    button = page.locator("#video button[aria-label='start recording']")  # to stop as well
    expect(access.or_(button)).to_be_visible()
    if access.is_visible():
        access.click()
    button.filter(has_text="Record").click()
    page.evaluate("window.begin = document.querySelector('#video video').currentTime")
    page.wait_for_function(f"document.querySelector('#video video').currentTime > window.begin + {seconds}")
    button.filter(has_text="Stop").click()
    expect(clear_button(page)).to_be_visible()


@needs_chromium
def test_a_live_camera_is_answered(page, server):
    if not frames_come(page, 20):  # a busy machine's browser may give none at all: then in a fresh page
        page.reload()
        assert frames_come(page, SECONDS)
    ask(page, name="live-question", running=True)
    assert re.match(r"[1-8] frames, .* tokens in", line(page, "tokens in", "live-line"))
    assert page.locator("#live-answer textarea").input_value()
    page.locator("#camera button").filter(has_text="Stop").click()


def frames_come(page, seconds):
    """Record the live camera; returns whether three of its frames are taken within so many seconds."""
    settle(page)
    page.get_by_role("tab", name="Live camera").click()
    page.locator("#camera").get_by_text("Click to Access Webcam").click()
    page.locator("#camera button").filter(has_text="Record").click()
    try:
        taken = re.compile(r"([3-9]|\d\d+) were taken")
        expect(page.locator("#live-frames textarea")).to_have_value(taken, timeout=seconds * 1000)
    except AssertionError:
        return False
    return True


@needs_chromium
def test_nothing_was_asked_of_another_host_and_nothing_failed(page, server):
    hosts = {url for url in page.seen if not url.startswith((f"{server[0]}/", f"blob:{server[0]}/", "data:"))}
    assert not hosts and len(page.seen) > 50
    assert page.failures == []


@needs_chromium
def test_a_closed_page_cancels_its_answer(browser, server):
    page = new_page(browser)
    page.goto(server[0])
    cancelled = server[1].metrics.cancelled._value.get()
    with held(server[1]):
        ask(page, "Tell me about the sea.")
        until(lambda: server[1].model.waiting == 1)
        begin = time.monotonic()
        page.close()
        until(lambda: server[1].metrics.cancelled._value.get() > cancelled)
        until(lambda: server[1].admitted == 0)
        assert time.monotonic() - begin < SECONDS / 2  # while the model is still held


def test_the_servers_key_guards_the_page_too():
    with serving(mini(), "secret", add_page) as (url, _):
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            for path in ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/static/x"):
                for auth in (None, ("user", "wrong"), ("secret", "")):
                    answer = client.get(path, auth=auth)
                    assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Basic")
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
            assert client.post("/gradio_api/queue/join", json={}).status_code == 401
            answer = client.get("/", auth=("anyone", "secret"))
            assert answer.status_code == 200 and "connect-src 'self'" in answer.headers["Content-Security-Policy"]
            assert client.get("/v1/models", auth=("anyone", "secret")).status_code == 401
            assert client.get("/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_routes_and_bodies_that_the_page_does_not_need_are_refused(server):
    with httpx.Client(base_url=server[0], timeout=SECONDS) as client:
        for path in (
            "/v1/nothing", "/nothing", "/monitoring", "/gradio_api/proxy=https://example.org/", "/gradio_api/vibe-code",
            "/gradio_api/file=https://example.org/", "/gradio_api/file=//example.org/", "/gradio_api/call/ask",
        ):  # fmt: skip
            answer = client.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["type"] == "not_found_error", path
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 403
        most = server[1].options.limits.media + (1 << 20)
        large = http.client.HTTPConnection(server[0].removeprefix("http://"), timeout=SECONDS)
        large.putrequest("POST", "/gradio_api/upload")
        large.putheader("Content-Length", str(most + 1))
        large.endheaders()
        assert large.getresponse().status == 413
        large.close()
        many = b'{"data": [' + b"0," * 100_001 + b"0]}"
        answer = client.post("/gradio_api/run/predict", content=many, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400 and "/" not in answer.text
        text = client.get("/").text
        assert not re.search(r" at 0x[0-9a-f]{6}", text)  # addresses of the process's memory


def test_no_component_fetches_an_address(server):
    component = {"path": "http://127.0.0.1:1/x.mp4", "meta": {"_type": "gradio.FileData"}}
    with httpx.Client(base_url=server[0], timeout=SECONDS) as client:
        config = client.get("/config").json()
        choose = next(item for item in config["dependencies"] if item["api_name"] == "choose")
        body = {"fn_index": choose["id"], "session_hash": "here", "data": [component, None]}
        answer = client.post("/gradio_api/run/predict", json=body)
    assert answer.status_code == 500 and "not fetched" in answer.text


def test_options_of_the_command(capsys, monkeypatch):
    assert cli.main(["serve", "--page", "--no-page"]) == 2
    assert "contradict" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "gradio" else found(name, *rest)
    )
    assert cli.main(["serve", "--page"]) == 2
    assert "bt-adapter[page]" in capsys.readouterr().err
