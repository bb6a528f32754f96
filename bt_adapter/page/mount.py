"""Add the page to the server's application."""

from __future__ import annotations

import os

from fastapi import FastAPI
from starlette.middleware import Middleware

from bt_adapter.page.gate import PageGate
from bt_adapter.serve.limits import MEBIBYTE
from bt_adapter.serve.service import Service


def add_page(app: FastAPI, service: Service, api_key: str | None = None) -> None:
    """Add the page at ``/`` to the application of a service, after its own routes.

    Args:
        app: of ``bt_adapter.serve.app.make_app``, not started yet. service: its service.
        api_key: the server's key, which the page asks for as its password; None: the page is open.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    from bt_adapter.page.layout import build, example_clips

    limits = service.options.limits
    page = build(service, app.state.live_sessions).queue(
        max_size=limits.waiting, default_concurrency_limit=limits.waiting, api_open=False
    )
    gate = Middleware(PageGate, api_key=api_key, most=max(limits.body, limits.media + MEBIBYTE))
    gr.mount_gradio_app(
        app, page, "/", footer_links=[], run_history=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False, show_error=False, max_file_size=limits.media,
        allowed_paths=[str(path) for path, *_ in example_clips()], app_kwargs={"middleware": [gate]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
