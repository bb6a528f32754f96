"""A small RTSP server on loopback: MPEG-TS in RTP, interleaved in the connection, as cameras send over TCP."""

from __future__ import annotations

import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from live_streams import RATE

SDP = """v=0
o=- 0 0 IN IP4 127.0.0.1
s=camera
c=IN IP4 0.0.0.0
t=0 0
m=video 0 RTP/AVP 33
a=rtpmap:33 MP2T/90000
a=control:track
""".replace("\n", "\r\n")
PACKET = 7 * 188  # bytes of transport stream in an RTP packet


class Camera(socketserver.ThreadingTCPServer):
    """Sends the pieces of a stream, one in 1/25 s, to each client that plays it, and then says goodbye.

    Attributes:
        asked: methods of the requests, in order. dropped: ends all connections when set.
    """

    allow_reuse_address = daemon_threads = True

    def __init__(self, pieces: list[bytes], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.pieces, self.asked, self.dropped = pieces, [], threading.Event()
        self.url = f"rtsp://user:secret@127.0.0.1:{self.server_address[1]}/camera"


class _Handler(socketserver.StreamRequestHandler):
    server: Camera

    def handle(self) -> None:
        with suppress(OSError):  # the client has gone
            self._answer()

    def _answer(self) -> None:
        while not self.server.dropped.is_set() and (head := self._read_head()):
            method, url = head[0].split()[:2]
            self.server.asked.append(method)
            number = next(line.split(":")[1].strip() for line in head if line.lower().startswith("cseq:"))
            more, body = {
                "OPTIONS": ("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n", ""),
                "DESCRIBE": (f"Content-Base: {url}/\r\nContent-Type: application/sdp\r\n", SDP),
                "SETUP": ("Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n", ""),
            }.get(method, ("", ""))
            reply = (
                f"RTSP/1.0 200 OK\r\nCSeq: {number}\r\nSession: 1\r\n{more}Content-Length: {len(body)}\r\n\r\n{body}"
            )
            self.wfile.write(reply.encode())
            if method == "PLAY":
                threading.Thread(target=self._play, daemon=True).start()
            if method == "TEARDOWN":
                return

    def _read_head(self) -> list[str]:
        """The lines of a request; packets of the client's statistics are passed over."""
        lines: list[str] = []
        while line := self.rfile.readline():
            if not lines and line.startswith(b"$"):
                continue
            if not line.strip():
                return lines
            lines.append(line.decode("latin-1").strip())
        return []

    def _play(self) -> None:
        begin, sequence = time.monotonic(), 0
        with suppress(OSError):
            for number, piece in enumerate(self.server.pieces):
                if self.server.dropped.wait(max(0.0, begin + number / RATE - time.monotonic())):
                    break
                for start in range(0, len(piece), PACKET):
                    content = piece[start : start + PACKET]
                    rtp = struct.pack("!BBHII", 0x80, 33, sequence & 0xFFFF, number * 90_000 // RATE, 7) + content
                    self.wfile.write(struct.pack("!BBH", ord("$"), 0, len(rtp)) + rtp)
                    sequence += 1
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def camera(pieces: list[bytes], port: int = 0) -> Iterator[Camera]:
    """Run a `Camera`; at the end its connections are dropped."""
    server = Camera(pieces, port)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.dropped.set()
        server.shutdown()
        server.server_close()
        thread.join()
