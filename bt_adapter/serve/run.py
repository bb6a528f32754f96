"""Run the server of ``bt-adapter serve``."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import replace

import torch
import uvicorn
from fastapi import FastAPI

from bt_adapter.chat.session import load, sampling_of, say_choices
from bt_adapter.errors import CommandError
from bt_adapter.progress import make_console, say
from bt_adapter.serve.app import make_app
from bt_adapter.serve.limits import MEBIBYTE, Limits
from bt_adapter.serve.service import Service, ServiceOptions
from bt_adapter.serve.settings import Serve

Extend = Callable[[FastAPI, Service, str | None], None]
"""Adds routes to an application, given its service and the API key."""
API_KEY_VARIABLE = "BT_ADAPTER_API_KEY"
_SHUTDOWN_SECONDS = 5


def run_serve(command: Serve, extend: Extend | None = None) -> int:
    """Load the model and serve it until the process gets SIGINT or SIGTERM. Returns the exit code.

    extend: adds the page, which this folder does not know; None: there is none.
    """
    notes = make_console(stderr=True)
    listener = bind(command.host, command.port)  # before the model is loaded, so that a port in use is told early
    torch.set_num_threads(command.threads or default_threads(os.cpu_count() or 1))
    say_choices(notes, command.chat_model())
    options = service_options(command)
    with notes.status("loading the model"):
        chat = load(command.chat_model())
    service = Service(chat, options)
    api_key = command.api_key or os.environ.get(API_KEY_VARIABLE) or None
    app = make_app(service, api_key)
    if extend is not None:
        with notes.status("loading the page"):
            extend(app, service, api_key)
    config = uvicorn.Config(
        app, log_level="info" if command.access_log else "warning", access_log=command.access_log,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS, server_header=False,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    page = "" if extend is None else f", and a page at http://{shown}:{port}/"
    ready = f"serving {command.name} at http://{shown}:{port}/v1{page}"
    _Server(config, lambda: say(notes, ready)).run(sockets=[listener])
    return 0


class _Server(uvicorn.Server):
    """A server that calls a function once it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.on_ready()


def service_options(command: Serve) -> ServiceOptions:
    """Return the settings of the service of a command line. Raises CommandError."""
    sampling = replace(sampling_of(command.chat_model()), repeat=not command.no_repeat)
    if sampling.fps is None and sampling.frames > command.max_frames:
        raise CommandError(f"videos are sampled at {sampling.frames} frames, but --max-frames is {command.max_frames}")
    limits = Limits(
        body=command.max_body_mb * MEBIBYTE,
        bodies=8 * command.max_body_mb * MEBIBYTE,
        media=command.max_media_mb * MEBIBYTE,
        pixels=command.max_pixels,
        frames=command.max_frames,
        visuals=command.max_visuals,
        seconds=command.decode_seconds,
        waiting=command.max_waiting,
        live_sessions=command.live_sessions,
        live_bytes=command.live_mb * MEBIBYTE,
        live_idle=command.live_idle,
    )
    return ServiceOptions(
        command.name,
        sampling,
        command.max_new_tokens,
        command.batch_size,
        command.decoders,
        command.cache_mb * MEBIBYTE,
        limits,
        command.allowed_media_path,
        command.allowed_media_domain,
    )


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address to listen on. Raises CommandError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise CommandError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from error
    return listener


def default_threads(cores: int) -> int:
    """Return the number of the model's threads on a machine of so many cores."""
    return max(1, min(4, cores // 2))
