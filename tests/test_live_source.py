"""Live sources: order and times of frames, outages, stalls, clock jumps, slow programs, and clean ends."""

import socket
import threading
import time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import video_files
from live_streams import PICTURES, RATE, number_of, picture, shade, streaming, transport_stream
from rtsp_server import camera

from bt_adapter import LiveSource
from bt_adapter.data import VideoError, read_video, write_video
from bt_adapter.live.clock import StreamClock


def take(source: LiveSource, count: int) -> list:
    """The first frames of a source, which is then closed."""
    found = []
    with source:
        for frame in source:
            found.append(frame)
            if len(found) == count:
                break
    return found


def numbers(frames: list) -> list[int]:
    return [number_of(frame.pixels) for frame in frames]


def write_numbered(path, frames: int, fps: int = 25) -> None:
    grey = torch.tensor([shade(number) for number in range(frames)], dtype=torch.uint8)
    write_video(path, grey[:, None, None, None].expand(-1, 3, 48, 64).contiguous(), fps=fps)


def rest_of_lost(source: LiveSource, frames) -> list:
    """Wait until a source has noticed its loss, and return the frames that had arrived before."""
    until = time.monotonic() + 20
    while source.counts.lost == 0:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.4)
    return [next(frames) for _ in range(len(source._frames))]


def is_ascending(values: list[float]) -> bool:
    return all(b >= a for a, b in zip(values, values[1:], strict=False))


def test_frames_of_a_stream_in_order_with_their_times():
    with streaming(transport_stream(60)) as streamer:
        source = LiveSource(streamer.url, fps=12.5, buffer=99)
        found = take(source, 10)
    assert numbers(found) == list(range(0, 20, 2))
    assert [frame.time for frame in found] == pytest.approx([0.08 * i for i in range(10)], abs=1e-3)
    assert found[0].pixels.shape == (3, 48, 64)
    assert found[0].pixels.dtype == torch.uint8
    assert source.counts.thinned >= 9
    assert source.counts.lost == source.counts.damaged == source.counts.jumps == 0


def test_a_source_that_was_killed_is_found_again():
    pieces = transport_stream(80)
    found, source = [], None
    with streaming(pieces) as streamer:
        port = streamer.server.server_address[1]
        source = LiveSource(streamer.url, read_timeout=2, give_up=20, buffer=99)
        frames = iter(source)
        found += [next(frames) for _ in range(20)]
    found += rest_of_lost(source, frames)
    before = len(found)
    with streaming(pieces, port):
        found += [next(frames) for _ in range(20)]
        frames.close()
    assert source.counts.lost >= 1
    assert numbers(found[before:]) == list(range(20))
    times = [frame.time for frame in found]
    assert is_ascending(times)
    assert times[before] - times[before - 1] > 0.3  # the outage counts
    assert not source._thread.is_alive()


def test_a_stalled_source_is_opened_again():
    with streaming(transport_stream(80)) as streamer:
        streamer.silent_after = 20
        source = LiveSource(streamer.url, read_timeout=0.4, give_up=20, buffer=99)
        found = take(source, 30)
    assert source.counts.lost >= 1
    assert streamer.requests >= 2
    assert numbers(found)[:15] == list(range(15))
    assert is_ascending([frame.time for frame in found])


def test_an_outage_without_end_is_given_up():
    with streaming(transport_stream(30)) as streamer:
        streamer.end_after = 20
        source = LiveSource(streamer.url, read_timeout=1, give_up=1.0, open_timeout=0.5)
        frames = iter(source)
        for _ in range(10):
            next(frames)
    begin = time.monotonic()
    with pytest.raises(VideoError, match=r"given up after \d+ s without a frame"):
        for _ in frames:
            pass
    assert time.monotonic() - begin < 5
    assert source.counts.lost >= 1


def test_a_source_that_never_was_there_is_refused_at_once_without_its_password():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = time.monotonic()
    with pytest.raises(VideoError, match="http://127.0.0.1") as raised:
        take(LiveSource(f"http://user:secret@127.0.0.1:{port}/live.ts"), 1)
    assert "secret" not in str(raised.value)
    assert "cannot be opened" in str(raised.value)
    assert time.monotonic() - begin < 5


def test_a_server_that_accepts_and_says_nothing_is_refused_within_the_timeout():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        begin = time.monotonic()
        with pytest.raises(VideoError, match=r"cannot be opened within 0\.5 s"):
            take(LiveSource(f"http://127.0.0.1:{server.getsockname()[1]}/", open_timeout=0.5), 1)
        assert time.monotonic() - begin < 4


def test_clock_jumps_are_survived():
    pieces = transport_stream(20, first=1000) + transport_stream(20) + transport_stream(20, first=50_000)
    with streaming(pieces) as streamer:
        source = LiveSource(streamer.url, buffer=99)
        found = take(source, 55)
    times = [frame.time for frame in found]
    assert is_ascending(times)
    assert source.counts.jumps == 2
    assert times[-1] < 8
    assert sorted(set(numbers(found))) == list(range(20))


@pytest.mark.parametrize("stamps", ["wall", "none"])
def test_stream_clock(stamps):
    clock = StreamClock(max_gap=5)
    rows = [  # time stamp, arrival, expected time
        (100.0, 50.0, 0.0),
        (100.5, 50.1, 0.5),
        (100.5, 50.2, 0.5),  # the same stamp twice
        (104.0, 50.3, 4.0),  # within the gap
        (3.0, 50.5, 4.2),  # backwards
        (3.5, 51.0, 4.7),
        (900.0, 51.25, 4.95),  # far ahead
        (None, 51.5, 5.2),
        (901.0, 52.0, 5.7),
    ]
    if stamps == "wall":
        for stamp, arrival, expected in rows:
            assert clock.advance(stamp, arrival) == pytest.approx(expected)
        assert clock.jumps == 2
        clock.restart()
        assert clock.advance(0.0, 62.0) == pytest.approx(15.7)
        assert clock.jumps == 2
    else:  # a file that is read as fast as possible
        assert [clock.advance(stamp, None) for stamp in (7.0, 7.1, 7.2, 0.0, 0.1)] == pytest.approx(
            [0.0, 0.1, 0.2, 0.3, 0.4]
        )
        assert clock.jumps == 1


def test_time_stamps_that_stand_still_do_not_stop_the_stream():
    for creep in (0.0, 1e-5):
        clock = StreamClock(max_gap=5)
        times = [clock.advance(7.0 + creep * number, 50 + number / 2) for number in range(40)]
        assert times[10] == pytest.approx(0, abs=1e-3)
        assert times[-1] - times[11] == pytest.approx(14, abs=1e-3)  # by the wall clock
        assert is_ascending(times)
        assert clock.jumps == 1
        after = [clock.advance(9.0 + number / 10, 70 + number / 10) for number in range(3)]
        assert [b - times[-1] for b in after] == pytest.approx([2.0, 2.1, 2.2], abs=1e-3)
        assert clock.jumps == 1
    slow = StreamClock(max_gap=5)  # one frame in ten seconds
    assert [slow.advance(10.0 * number, 10.0 * number) for number in range(4)] == [0, 10, 20, 30]
    assert slow.jumps == 0


def test_a_slow_program_gets_the_newest_frames():
    with streaming(transport_stream(60)) as streamer:
        source = LiveSource(streamer.url, buffer=1)
        found = []
        with source:
            for frame in source:
                found.append(frame)
                time.sleep(0.3)
                if frame.time > 1.2:
                    break
    assert len(found) >= 2
    assert source.counts.dropped >= 10
    assert 0 <= source.counts.decoded - source.counts.dropped - len(found) <= 2  # all that is not taken is counted
    assert found[-1].time / (len(found) - 1) > 0.15


def test_a_file_at_its_own_pace_ends_by_itself(tmp_path):
    write_numbered(tmp_path / "clip.mp4", 25)
    begin = time.monotonic()
    with LiveSource(tmp_path / "clip.mp4", buffer=99) as source:
        found = list(source)
    assert 0.9 < time.monotonic() - begin < 4
    assert numbers(found) == list(range(25))
    assert source.counts.lost == 0
    assert not source._thread.is_alive()


def test_a_file_as_fast_as_possible_loses_no_frame(tmp_path):
    write_numbered(tmp_path / "clip.mp4", 60)
    source = LiveSource(tmp_path / "clip.mp4", pace=False, buffer=1)
    found = [frame for frame in source if time.sleep(0.001) is None]
    expected = read_video(tmp_path / "clip.mp4", frames=60).frames
    assert torch.equal(torch.stack([frame.pixels for frame in found]), expected)
    assert [frame.time for frame in found] == pytest.approx([i / 25 for i in range(60)], abs=1e-3)
    assert source.counts.dropped == 0
    with pytest.raises(ValueError, match="only once"):
        list(source)


@pytest.mark.parametrize("sound_first", [False, True])
def test_a_file_with_sound_is_read_to_its_last_frame(tmp_path, sound_first):
    """The packet that ends a stream says stream 0, whichever it ends; the last frames are those that were held back."""
    path = tmp_path / "sound.mp4"
    video_files.mux(path, video_files.numbered(16), range(0, 1600, 100), audio=0.5, sound_first=sound_first)
    with LiveSource(path, pace=False, buffer=16) as source:
        found = torch.stack([frame.pixels for frame in source])
    assert video_files.numbers(found) == list(range(16))


@contextmanager
def serving(folder, playlist=None):
    """Serve a folder over http; ``playlist`` makes the text of /running.m3u8 at each request. Yields the URL."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def do_GET(self):
            if self.path != "/running.m3u8":
                super().do_GET()
                return
            text = playlist().encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.apple.mpegurl")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n"


def test_a_finished_playlist_ends_by_itself(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.ts").write_bytes(b"".join(transport_stream(25, first=25 * number)))
    segments = "".join(f"#EXTINF:1.0,\n{number}.ts\n" for number in range(2))
    (tmp_path / "live.m3u8").write_text(f"{HLS}{segments}#EXT-X-ENDLIST\n")
    (tmp_path / "bad.m3u8").write_text(f"{HLS}#EXTINF:1.0,\nfile://{tmp_path}/0.ts\n#EXT-X-ENDLIST\n")
    with serving(tmp_path) as url:
        begin = time.monotonic()
        source = LiveSource(f"{url}/live.m3u8", buffer=99)
        found = list(source)
        assert time.monotonic() - begin > 1.5  # not as fast as the segments arrive
        with pytest.raises(VideoError):
            list(LiveSource(f"{url}/bad.m3u8", open_timeout=2))  # a playlist on the network opens no local file
    assert numbers(found) == 2 * list(range(25))
    assert source.counts.lost == 0


def test_a_recording_over_http_can_be_held_to_its_times(tmp_path):
    write_numbered(tmp_path / "clip.mp4", 25)
    with serving(tmp_path) as url:
        begin = time.monotonic()
        source = LiveSource(f"{url}/clip.mp4", buffer=99, pace=True)
        assert numbers(list(source)) == list(range(25))
        assert time.monotonic() - begin > 0.9
    assert source.counts.lost == 0


def test_a_running_playlist_keeps_up(tmp_path):
    for number in range(20):
        (tmp_path / f"{number}.ts").write_bytes(b"".join(transport_stream(10, first=10 * number)))
    began = time.monotonic()

    def playlist() -> str:
        """Three segments of 0.4 s, the newest of which has just ended."""
        ended = min(20, 3 + int((time.monotonic() - began) / 0.4))
        names = "".join(f"#EXTINF:0.4,\n{number}.ts\n" for number in range(ended - 3, ended))
        return f"{HLS}#EXT-X-MEDIA-SEQUENCE:{ended - 3}\n{names}"

    with serving(tmp_path, playlist) as url:
        source = LiveSource(f"{url}/running.m3u8", buffer=99, read_timeout=3)
        found = take(source, 60)
    assert is_ascending([frame.time for frame in found])
    assert 2 < found[-1].time < 6
    assert source.counts.lost == 0


def test_a_camera_that_is_switched_off_and_on_again():
    pieces = transport_stream(90)
    with camera(pieces) as server:
        port = server.server_address[1]
        source = LiveSource(server.url, buffer=99, read_timeout=2, give_up=20)
        frames = iter(source)
        found = [next(frames) for _ in range(15)]
        assert server.asked[:4] == ["OPTIONS", "DESCRIBE", "SETUP", "PLAY"]
    found += rest_of_lost(source, frames)
    before = len(found)
    with camera(pieces, port):
        found += [next(frames) for _ in range(15)]
        frames.close()
    assert numbers(found[:10]) == list(range(10))
    assert numbers(found[before:])[:10] == list(range(10))
    assert is_ascending([frame.time for frame in found])
    assert source.counts.lost >= 1
    assert "secret" not in source.name


def test_pictures_over_http_have_the_times_of_their_arrival():
    with streaming([picture(n) for n in range(40)], kind=PICTURES) as streamer:
        found = take(LiveSource(streamer.url, buffer=99), 25)
    assert numbers(found) == list(range(25))
    assert is_ascending([frame.time for frame in found])


def test_a_stream_that_changes_its_size_and_pixel_format_goes_on():
    kinds = [((64, 48), "yuvj420p"), ((96, 64), "yuvj444p"), ((32, 32), "yuvj422p"), ((640, 480), "yuvj420p")]
    pieces = [picture(number, *kinds[number // 5 % 4]) for number in range(100)]
    with streaming(pieces, kind=PICTURES) as streamer:
        source = LiveSource(streamer.url, buffer=99)
        found = take(source, 20)
    assert numbers(found) == list(range(20))
    assert [tuple(frame.pixels.shape[1:]) for frame in found[::5]] == [(48, 64), (64, 96), (32, 32), (480, 640)]
    assert source.counts.lost == source.counts.damaged == 0
    with streaming(pieces, kind=PICTURES) as streamer:  # what is too large is never decoded
        source = LiveSource(streamer.url, buffer=99, max_pixels=100_000, give_up=20)
        found = take(source, 30)
    assert max(frame.pixels[0].numel() for frame in found) == 96 * 64
    assert source.counts.lost >= 1


@pytest.mark.parametrize("content", [[b""], [b"<html>sorry</html>"] * 500, [bytes(188)] * 500])
def test_what_is_no_video_is_refused_within_the_timeout(content):
    begin = time.monotonic()
    with streaming(content) as streamer, pytest.raises(VideoError, match="cannot be opened"):
        take(LiveSource(streamer.url, open_timeout=1), 1)
    assert time.monotonic() - begin < 6


def test_packets_over_udp():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = threading.Event()

    def send() -> None:
        pieces = transport_stream(200)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
            for piece in pieces:
                for start in range(0, len(piece), 1316):
                    out.sendto(piece[start : start + 1316], ("127.0.0.1", port))
                if stop.wait(1 / RATE):
                    return

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    found = take(LiveSource(f"udp://127.0.0.1:{port}", buffer=99), 20)
    stop.set()
    thread.join()
    shown = numbers(found)
    assert [(n - shown[0]) % 25 for n in shown] == list(range(20))


def test_a_device_by_its_format():
    found = take(LiveSource("testsrc=size=64x48:rate=25", format="lavfi"), 3)
    assert found[0].pixels.shape == (3, 48, 64)


def test_damaged_packets_are_counted_and_survived():
    pieces = transport_stream(60)
    for number in range(21, 24):
        pieces[number] = pieces[number][:60] + bytes(len(pieces[number]) - 60)
    with streaming(pieces) as streamer:
        found = take(LiveSource(streamer.url, buffer=99), 45)
    assert numbers(found)[-5:] == [(numbers(found)[-1] - 4 + i) % 25 for i in range(5)]


def test_large_frames_are_refused_or_reduced(tmp_path):
    write_video(tmp_path / "wide.mp4", torch.zeros(3, 3, 640, 1280, dtype=torch.uint8), fps=25)
    with pytest.raises(VideoError, match="wide.mp4.*1280 x 640 pixels are larger than the limit of 100,000"):
        list(LiveSource(tmp_path / "wide.mp4", max_pixels=100_000))
    assert next(iter(LiveSource(tmp_path / "wide.mp4", side=48))).pixels.shape == (3, 192, 384)


def test_bad_arguments(tmp_path):
    for options, message in (
        ({"fps": 0}, "fps must be a number above 0, but is 0"),
        ({"read_timeout": float("inf")}, "read_timeout must be a number above 0"),
        ({"give_up": -1}, "give_up must be a number above 0, but is -1"),
        ({"fps": "4"}, "fps must be a number above 0, but is '4'"),
        ({"open_timeout": None}, "open_timeout must be a number above 0, but is None"),
        ({"max_pixels": 0}, "max_pixels must be"),
        ({"buffer": 0}, "buffer must be"),
        ({"max_gap": 0}, "max_gap must be"),
        ({"side": 0}, "side must be"),
    ):
        with pytest.raises(ValueError, match=message):
            LiveSource("http://127.0.0.1/", **options)
    for options, message in (
        ({"pace": "slow"}, "pace must be a bool or None, but is 'slow'"),
        ({"format": 3}, "format must be the name of a format, but is 3"),
        ({"options": {"video_size": 3}}, "options must be a mapping of names to texts"),
        ({"options": "size"}, "options must be a mapping of names to texts"),
    ):
        with pytest.raises(TypeError, match=message):
            LiveSource("http://127.0.0.1/", **options)
    with pytest.raises(ValueError, match="a URL of http, .*but its scheme is 'concat'"):
        LiveSource("concat://a|b")
    with pytest.raises(VideoError, match="no such file"):
        LiveSource(tmp_path / "missing.mp4")
    (tmp_path / "text.mp4").write_text("this is no video " * 99)
    with pytest.raises(VideoError, match=r"text.mp4: cannot be opened"):
        list(LiveSource(tmp_path / "text.mp4"))


def test_closed_by_another_thread():
    with streaming(transport_stream(60)) as streamer:
        source = LiveSource(streamer.url)
        threading.Timer(0.6, source.close).start()
        found = list(source)
    assert 1 <= len(found) < 40
