"""Live streams on loopback for tests: MPEG-TS over http at its own pace, which can be silent, end, and come back."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np

RATE = 25


def shade(number: int) -> int:
    """Grey value of frame ``number``, which survives compression: 8 steps apart."""
    return 16 + 8 * (number % 25)


def number_of(pixels) -> int:
    """Frame number modulo 25 of decoded pixels."""
    return round((float(pixels.float().mean()) - 16) / 8)


def transport_stream(frames: int, first: int = 0, size: tuple[int, int] = (64, 48)) -> list[bytes]:
    """MPEG-TS of grey frames at 25 a second, a list of the bytes of each frame; time stamps begin at ``first``."""
    width, height = size
    file = io.BytesIO()
    pieces: list[bytes] = []
    with av.open(file, "w", format="mpegts", options={"pat_period": "0.2"}) as container:
        stream = container.add_stream("mpeg1video", RATE)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 5
        stream.options = {"bf": "0"}
        for number in range(frames):
            grey = np.full((height, width, 3), shade(number), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
            pieces.append(_written(file))
        container.mux(stream.encode(None))
    pieces.append(_written(file))
    return pieces


def picture(number: int, size: tuple[int, int] = (64, 48), pixel_format: str = "yuvj420p") -> bytes:
    """One part of a multipart response: a grey JPEG file. ``PICTURES`` is the response's content type."""
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height = size
    encoder.pix_fmt, encoder.time_base = pixel_format, Fraction(1, RATE)
    frame = av.VideoFrame.from_ndarray(np.full((*size[::-1], 3), shade(number), np.uint8), format="rgb24")
    jpeg = b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
    return b"--b\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)


PICTURES = "multipart/x-mixed-replace; boundary=b"


def _written(file: io.BytesIO) -> bytes:
    content = file.getvalue()
    file.seek(0)
    file.truncate()
    return content


class Streamer:
    """An http server of a stream: each request gets the pieces from the start, one in 1/25 s.

    Attributes:
        url: to request. requests: number so far.
        silent_after, end_after: number of pieces after which the server sends nothing more, or ends the response.
    """

    def __init__(self, pieces: list[bytes], port: int, kind: str = "video/mp2t") -> None:
        self.pieces, self.requests = pieces, 0
        self.silent_after: int | None = None
        self.end_after: int | None = None
        self.killed = threading.Event()
        self.sockets: list[socket.socket] = []
        streamer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                streamer.requests += 1
                streamer.sockets.append(self.connection)
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.end_headers()
                streamer.send(self.wfile)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/live.ts"

    def send(self, file) -> None:
        begin = time.monotonic()
        for number, piece in enumerate(self.pieces):
            if number == self.silent_after:
                self.killed.wait(30)
            if self.killed.wait(max(0.0, begin + number / RATE - time.monotonic())) or number == self.end_after:
                return
            try:
                file.write(piece)
                file.flush()
            except OSError:
                return


@contextmanager
def streaming(pieces: list[bytes], port: int = 0, **options) -> Iterator[Streamer]:
    """Run a `Streamer`; at the end it is killed with all its connections."""
    streamer = Streamer(pieces, port, **options)
    thread = threading.Thread(target=streamer.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield streamer
    finally:
        streamer.killed.set()
        streamer.server.shutdown()
        streamer.server.server_close()
        for connection in streamer.sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            connection.close()
        thread.join()
