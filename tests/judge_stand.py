"""A judge on loopback for tests, which fails, stalls and talks nonsense as it is told."""

import http.server
import json
import re
import threading
import time

import pytest


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
