"""Run the server of ``bt-adapter serve``."""

from __future__ import annotations

import asyncio
import ipaddress
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
_BY_THEMSELVES = 0.6  # share of it in which requests may end as usual


def run_serve(command: Serve, extend: Extend | None = None) -> int:
    """Load the model and serve it until the process gets SIGINT or SIGTERM. Returns the exit code.

    extend: adds the page, which this folder does not know; None: there is none.
    """
    notes = make_console(stderr=True)
    api_key = find_key(command.api_key)
    listener = bind(command.host, command.port)  # before the model is loaded, so that a port in use is told early
    torch.set_num_threads(command.threads or default_threads(os.cpu_count() or 1))
    say_choices(notes, command.chat_model())
    options = service_options(command)
    with notes.status("loading the model"):
        chat = load(command.chat_model())
    service = Service(chat, options)
    host, port = listener.getsockname()[:2]
    is_local = ipaddress.ip_address(host.partition("%")[0]).is_loopback
    app = make_app(service, api_key, local=is_local and api_key is None)
    if extend is not None:
        with notes.status("loading the page"):
            extend(app, service, api_key)
    config = uvicorn.Config(
        app, log_level="info" if command.access_log else "warning", access_log=command.access_log,
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS, server_header=False, ws="none",
        http="h11",  # it bounds the headers of a request, whose bytes are held before any check
    )  # fmt: skip
    shown = f"[{host}]" if ":" in host else host
    page = "" if extend is None else f", and a page at http://{shown}:{port}/"
    ready = f"serving {command.name} at http://{shown}:{port}/v1{page}"
    if api_key is None and not is_local:
        say(notes, f"everyone who reaches {host} may ask: there is no --api-key")
    try:
        listener.listen()  # another server may have begun to while the model was loaded
    except OSError as error:
        raise _cannot_listen(command.host, command.port, error) from error
    Server(config, lambda: say(notes, ready), service.stop).run(sockets=[listener])
    return 0


def find_key(given: str | None) -> str | None:
    """Return the API key of the option or else of the environment; None: there is none. Raises CommandError.

    An empty key is refused: a variable that was not set must not open the server.
    """
    name, key = "--api-key", given
    if given is None:
        name, key = API_KEY_VARIABLE, os.environ.get(API_KEY_VARIABLE)
    if key is not None and (not key or key != key.strip() or not key.isprintable()):
        raise CommandError(f"{name} must be a key without white space around it, and not empty")
    return key


class Server(uvicorn.Server):
    """A server that calls a function once it accepts connections, and ends requests in progress with an error.

    on_end: ends them; called after a part of the time that requests have to end by themselves when the server stops.
    """

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_end: Callable[[], None]) -> None:
        super().__init__(config)
        self.on_ready, self.on_end = on_ready, on_end

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self.started:
            self.on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop listening, and wait for requests in progress."""
        seconds = _BY_THEMSELVES * (self.config.timeout_graceful_shutdown or 0)
        ending = asyncio.get_running_loop().call_later(seconds, self.on_end)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


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
        raise _cannot_listen(host, port, error) from error
    return listener


def _cannot_listen(host: str, port: int, error: OSError) -> CommandError:
    return CommandError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})")


def default_threads(cores: int) -> int:
    """Return the number of the model's threads on a machine of so many cores."""
    return max(1, min(4, cores // 2))
