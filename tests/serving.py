"""A server in a thread of the test process, on a free port of the loopback interface, with the small stack."""

from __future__ import annotations

import base64
import functools
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_chat import mini_is_there

from bt_adapter.chat.engine import VideoChat
from bt_adapter.mini import data_folder

for package in ("fastapi", "prometheus_client", "uvicorn"):
    pytest.importorskip(package, reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="OpenAI's client is not installed")
if missing := mini_is_there():
    pytest.skip(missing, allow_module_level=True)

import uvicorn  # noqa: E402

from bt_adapter.serve.app import make_app  # noqa: E402
from bt_adapter.serve.run import Extend, Server  # noqa: E402
from bt_adapter.serve.service import Service, ServiceOptions  # noqa: E402

QUESTION = "How is it moving?"


@functools.cache
def mini() -> VideoChat:
    return VideoChat.mini()


@contextmanager
def serving(
    chat: VideoChat, api_key: str | None = None, extend: Extend | None = None, local: bool = False, **options: Any
) -> Iterator[tuple[str, Service]]:
    """Serve within the context; yields the address without a path, and the service. local: see `make_app`."""
    service = Service(chat, ServiceOptions(**options))
    app = make_app(service, api_key, local)
    if extend is not None:
        extend(app, service, api_key)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1)
    server = Server(config, lambda: None, service.stop)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive() and not service.model.alive


def clip(number: int) -> Path:
    return sorted((data_folder() / "clips").glob("*.mp4"))[number]


def data_url(content: bytes | Path, kind: str = "video/mp4") -> str:
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def about(url: str, text: str = QUESTION, kind: str = "video") -> list[dict[str, Any]]:
    """Messages that ask a question about one video or still."""
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": text}]}]
