"""What the server reads for a client, and what it refuses: data URLs, files, hosts, sizes, keys."""

import asyncio
import os
import threading
import time
from dataclasses import replace
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import about, clip, data_url, mini, serving

from bt_adapter.data import VideoError, read_video
from bt_adapter.data.stream import FrameStream
from bt_adapter.serve.decoding import DecodingTime, MediaDecoder
from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.fetch import Downloader, is_public
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.media import Media, MediaError, read_allowed_file, read_data_url
from bt_adapter.serve.requests import FrameChoice

LIMITS = Limits(body=300_000, bodies=500_000, media=150_000, pixels=200 * 200, frames=16, visuals=3)

TIME = DecodingTime(60.0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowed")
    (folder / "clip.mp4").write_bytes(clip(0).read_bytes())
    with serving(mini(), "secret", limits=LIMITS, media_path=folder) as (url, service):
        yield url, service, folder


def post(server, body=None, key="secret", **options):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    options = options or {"json": {"model": "mini", "max_tokens": 1} | body}
    options["headers"] = headers | options.get("headers", {})
    return httpx.post(f"{server[0]}/v1/chat/completions", timeout=60, **options)


def refused(server, url, kind="video"):
    answer = post(server, {"messages": about(url, kind=kind)})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == f"messages[0].content[0].{kind}_url"
    return answer.json()["error"]["message"]


def picture(width, height, seed=0, form="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    with BytesIO() as file:
        Image.fromarray(pixels).save(file, form)
        return file.getvalue()


def jpegs(pictures):
    return "data:video/jpeg;base64," + ",".join(data_url(one).partition(",")[2] for one in pictures)


def test_key_and_size_of_the_body(server):
    body = {"messages": about(data_url(clip(0)))}
    assert post(server, body).status_code == 200
    for key in (None, "wrong", "secret2", "secre"):
        answer = post(server, body, key)
        assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(f"{server[0]}/health").status_code == 200
    assert httpx.get(f"{server[0]}/v1/models").status_code == 401
    large = b'{"model": "' + b"x" * 300_000 + b'"}'
    for content in (large, (large[i : i + 4096] for i in range(0, len(large), 4096))):  # the second has no length
        answer = post(server, content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and "300,000 bytes" in answer.json()["error"]["message"]
    assert post(server, body).status_code == 200


@pytest.mark.parametrize(
    "values", ['"messages": [' + "0," * 100_001 + "0]", '"logit_bias": ' + "[" * 100_001, '"x": [' + "{}," * 60_000]
)
def test_a_body_of_very_many_values_is_not_parsed(server, values):
    """400 KB of them took a second of the event loop's time; bodies of 64 MB would take minutes and gigabytes."""
    content = f'{{"model": "mini", {values}}}'.encode()
    answer = post(server, content=content[:299_000], headers={"Content-Type": "application/json"})
    assert answer.status_code == 413 and "100,000 values" in answer.json()["error"]["message"]


def test_bodies_together_are_limited(server):
    """Two uploads that never end hold their bytes; a third request is told to come again, until one is closed."""

    def slow(sent, go_on):
        yield b'{"model": "' + b"x" * 240_000
        sent.set()
        go_on.wait(30)

    go_on, threads = threading.Event(), []
    for _ in range(2):
        sent = threading.Event()
        options = {"content": slow(sent, go_on), "headers": {"Content-Type": "application/json"}}
        threads.append(threading.Thread(target=lambda options=options: post(server, **options)))
        threads[-1].start()
        assert sent.wait(30)
    body = {"messages": about(data_url(clip(0))), "user": "x" * 100_000}
    for _ in range(50):
        answer = post(server, body)
        if answer.status_code == 429:
            break
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert answer.status_code == 429 and int(answer.headers["Retry-After"]) >= 1
    assert post(server, body).status_code == 200


def test_files_only_below_the_allowed_folder(server, tmp_path, monkeypatch):
    folder = server[2]
    answer = post(server, {"messages": about((folder / "clip.mp4").as_uri())})
    assert answer.status_code == 200 and answer.json()["usage"]["video_frames"] == [8]
    (tmp_path / "secret.mp4").write_bytes(clip(1).read_bytes())
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (folder / "up").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.mp4")
    hidden = [
        folder / "missing.mp4", tmp_path / "secret.mp4", folder / "link.mp4", folder / "up" / "secret.mp4", folder,
        folder / "pipe.mp4",
    ]  # fmt: skip
    urls = [path.as_uri() for path in hidden] + [
        f"{folder.as_uri()}/../{tmp_path.name}/secret.mp4", f"{folder.as_uri()}/%2e%2e/{tmp_path.name}/secret.mp4",
        f"{folder.as_uri()}/clip%00.mp4", "file:///etc/passwd",
    ]  # fmt: skip
    messages = {refused(server, url) for url in urls}
    assert messages == {"the video cannot be used: there is no such file below the allowed folder"}
    assert "without host" in refused(server, f"file://host{folder}/clip.mp4")
    with pytest.raises(MediaError, match="--allowed-media-path"):
        read_allowed_file((folder / "clip.mp4").as_uri(), None, 1000)
    monkeypatch.chdir(folder)
    assert "file:///PATH" in refused(server, "file:clip.mp4")
    with pytest.raises(MediaError, match="larger than the limit of 10 bytes"):
        read_allowed_file((folder / "clip.mp4").as_uri(), folder, 10)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "must begin with"),
        ("http://example.org/a.mp4", "must begin with"),
        ("https://example.org/a.mp4", "--allowed-media-domain"),
        ("javascript:alert(1)", "must begin with"),
        ("data:video/mp4,abc", "must begin with data:TYPE;base64,"),
        ("data:video/mp4;base64,", "is empty"),
        ("data:video/mp4;base64,@@@@", "not valid base64"),
        ("data:video/mp4;base64,YWJj", "cannot be read as a video"),
        ("data:video/jpeg;base64,YWJj,YWJj", "cannot be read as an image"),
        ("data:video/jpeg;base64,,", "is empty"),
        ("data:video/mp4;base64," + "A" * 250_000, "150,000 bytes"),
    ],
)
def test_addresses_that_are_refused(server, url, words):
    message = refused(server, url)
    assert words in message and "<bytes>" not in message


def test_frames_that_came_as_pictures(server):
    pictures = [picture(40, 32, seed) for seed in range(5)]
    answer = post(server, {"messages": about(jpegs(pictures))})
    assert answer.status_code == 200 and answer.json()["usage"]["video_frames"] == [5]
    answer = post(server, {"messages": about(jpegs(pictures)), "num_frames": 2})
    assert answer.json()["usage"]["video_frames"] == [2]
    answer = post(server, {"messages": about(jpegs(pictures)), "fps": 2})
    assert answer.status_code == 400 and "times are not known" in answer.json()["error"]["message"]
    assert "at most 16" in refused(server, jpegs(pictures[:1] * 17))


def test_pixels_and_number_of_visuals(server):
    assert "40,000" in refused(server, data_url(picture(201, 200), "image/jpeg"), "image")
    assert "40,000" in refused(server, jpegs([picture(201, 200)]))
    assert post(server, {"messages": about(data_url(picture(200, 200)), kind="image")}).status_code == 200
    part = about(data_url(clip(0)))[0]["content"]
    answer = post(server, {"messages": [{"role": "user", "content": part[:1] * 4 + part[1:]}]})
    assert answer.status_code == 400 and "3 stills and videos" in answer.json()["error"]["message"]
    # a PNG of a few kilobytes that holds 400 million pixels is refused by its header
    bomb = BytesIO()
    Image.new("1", (20000, 20000)).save(bomb, "PNG")
    assert "too many pixels" in refused(server, data_url(bomb.getvalue(), "image/png"), "image")


def test_a_rate_that_gives_too_many_frames():
    decoder = MediaDecoder(mini().prepare, mini().images, Limits(frames=4))
    media = Media((clip(0).read_bytes(),))  # 8 frames

    def count(most):
        return sum(len(chunk[0]) for chunk in decoder.video(media, FrameChoice(None, 1000.0, most), True, TIME).chunks)

    assert count(3) == 3 and count(4) == 4
    for most, words in ((None, "1000.0 frames per second give 8"), (5, "max_frames must be at most 4")):
        with pytest.raises(MediaError, match=words):
            count(most)
    with pytest.raises(VideoError, match="20 frames were asked for, but the video has 8"):
        MediaDecoder(mini().prepare, mini().images, Limits()).video(media, FrameChoice(20), False, TIME)


@pytest.mark.parametrize(
    "head",
    [
        "data:;base64,", "data:text/plain;base64,", "DATA:Video/MP4;BASE64,", "data:video/webm;codecs=vp9,opus;base64,",
        'data:video/mp4;codecs="avc1.42E01E, mp4a.40.2";base64,',
    ],
)  # fmt: skip
def test_heads_of_data_urls(head):
    """The second last is what browsers write for what they record."""
    assert read_data_url(f"{head}YWJj", 3) == Media((b"abc",))


def test_a_picture_that_is_decoded_for_very_long_is_given_up():
    """A progressive JPEG whose last scan, of 22 bytes and some milliseconds, is repeated: 64 MB would take hours."""
    with BytesIO() as file:
        Image.new("L", (2900, 2900), 128).save(file, "JPEG", progressive=True)
        whole = file.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    media = Media((whole[:-2] + scan * 20_000 + whole[-2:],))
    decoder = MediaDecoder(mini().prepare, mini().images, Limits())
    begin = time.monotonic()
    with pytest.raises(VideoError, match="longer than the limit of 0.05 seconds"):
        decoder.still(media, DecodingTime(0.05))
    with pytest.raises(VideoError, match="longer than the limit of 0.05 seconds"):
        decoder.video(replace(media, frames=True), FrameChoice(), True, DecodingTime(0.05))
    assert time.monotonic() - begin < 30
    assert decoder.still(Media((whole,)), DecodingTime(60.0)).pixels.shape == (3, 2900, 2900)


def test_frames_are_shown_as_the_model_sees_them():
    chat = mini()
    decoder = MediaDecoder(chat.prepare, chat.images, Limits())
    video = decoder.video(Media((clip(0).read_bytes(),)), FrameChoice(4), True, TIME, show=True)
    shown = np.stack([np.asarray(Image.open(BytesIO(picture))) for picture in video.pictures]).astype(float)
    seen = chat.images.crop(read_video(clip(0), 4).frames).permute(0, 2, 3, 1).numpy()
    assert shown.shape == seen.shape and np.abs(shown - seen).mean() < 4  # JPEG


def test_decoding_time_is_limited():
    content = clip(0).read_bytes()
    for cancelled, words in ((False, "longer than the limit of 1e-09 seconds"), (True, "was cancelled")):
        timer = DecodingTime(1e-9)
        if cancelled:
            timer.cancelled.set()
        with pytest.raises(VideoError, match=words):
            list(FrameStream(content, 4, check=timer.check))
    timer = DecodingTime(60.0)
    frames = list(FrameStream(content, 4, check=timer.check, threads=1))
    assert (frames[0] == read_video(content, 4).frames).all()


def test_a_data_url_of_exactly_the_limit():
    url = "data:image/png;base64,"
    assert read_data_url(url + "YWJj", 3).pieces == (b"abc",)
    with pytest.raises(MediaError, match="limit of 3 bytes"):
        read_data_url(url + "YWJjYWJj", 3)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("127.0.0.1", False),
        ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False),
        ("::", False), ("fe80::1", False), ("fe80::1%eth0", False), ("fd00::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:93.184.216.34", True), ("64:ff9b::7f00:1", False),
        ("64:ff9b::5db8:d822", True), ("2002:7f00:1::", False), ("localhost", False), ("", False),
        ("::127.0.0.1", False), ("64:ff9b:1::7f00:1", False), ("::ffff:0:127.0.0.1", False), ("fec0::1", False),
    ],
)  # fmt: skip
def test_public_addresses(address, public):
    assert is_public(address) == public


def reply(content):
    return httpx.Response(200, stream=httpx.ByteStream(content))


def test_a_download_counts_its_bytes_as_they_come():
    sizes = []

    async def resolve(host, port):
        return ["93.184.216.34"]

    stream = httpx.MockTransport(lambda request: reply(b"x" * 1000))
    downloader = Downloader(("media.org",), 2000, 5, resolve, stream)
    asyncio.run(downloader.get("https://media.org/a", sizes.append))
    assert sum(sizes) == 1000

    def full(size):
        raise ApiError(429, "full")

    with pytest.raises(ApiError, match="full"):
        asyncio.run(downloader.get("https://media.org/a", full))


def fetch(answers, url="https://media.org/a.mp4", addresses=("93.184.216.34",), most=1000, domains=("media.org",)):
    """Download from a host that gives the answers in turn; returns the content and the requests."""
    asked, turns = [], iter(answers)

    async def resolve(host, port):
        return list(addresses)

    def handle(request):
        asked.append(request)
        return next(turns)

    downloader = Downloader(domains, most, 5, resolve, httpx.MockTransport(handle))
    return asyncio.run(downloader.get(url)), asked


def test_the_checked_address_is_dialled_under_the_hosts_name():
    content, (request,) = fetch([reply(b"abc")], "https://MEDIA.org/a.mp4?x=1")
    assert content == b"abc" and str(request.url) == "https://93.184.216.34/a.mp4?x=1"
    assert request.headers["host"] == "media.org" and request.extensions["sni_hostname"] == "media.org"
    _, (request,) = fetch([reply(b"abc")], addresses=("2606:2800:220:1:248:1893:25c8:1946",))
    assert request.url.host == "2606:2800:220:1:248:1893:25c8:1946"


def test_redirects_stay_on_the_host():
    again = httpx.Response(302, headers={"Location": "/b.mp4"})
    content, asked = fetch([again, reply(b"b")])
    assert content == b"b" and [request.url.path for request in asked] == ["/a.mp4", "/b.mp4"]
    for location in ("https://other.org/", "http://media.org/", "https://media.org:8443/", "//127.0.0.1/", "file:///x"):
        with pytest.raises(MediaError, match="not follow|must begin with https|not among"):
            fetch([httpx.Response(302, headers={"Location": location})])
    with pytest.raises(MediaError, match="too often"):
        fetch([again] * 4)


@pytest.mark.parametrize(
    ("answer", "options", "words"),
    [
        (reply(b"x" * 1001), {}, "1,000 bytes"),
        (reply(b""), {}, "empty"),
        (httpx.Response(404), {}, "status 404"),
        (httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"x")), {}, "compressed"),
        (None, {"addresses": ("93.184.216.34", "127.0.0.1")}, "public internet"),
        (None, {"addresses": ()}, "public internet"),
        (None, {"url": "https://other.org/a"}, "not among"),
        (None, {"url": "https://media.org:444/a"}, "not among"),
        (None, {"url": "https://user@media.org/a"}, "user name"),
        (None, {"url": "https://media.org@other.org/a"}, "user name"),
        (None, {"url": "https://media.org:99999/a"}, "not valid"),
        (None, {"url": "https://[::1/a"}, "not valid"),
        (None, {"domains": ()}, "--allowed-media-domain"),
    ],
)
def test_downloads_that_are_refused(answer, options, words):
    with pytest.raises(MediaError, match=words) as error:
        fetch([answer], **options)
    assert "127.0.0.1" not in str(error.value) and "93.184" not in str(error.value)
