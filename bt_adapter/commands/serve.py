"""``bt-adapter serve``."""

from __future__ import annotations

import importlib.util
import os

from bt_adapter.errors import CommandError
from bt_adapter.serve.settings import Serve


def run(command: Serve) -> int:
    """Check the options before a model is loaded, then serve. Returns the exit code."""
    command.check()
    for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
        if importlib.util.find_spec(package) is None:
            raise CommandError(f"serving needs the package {package}: pip install 'bt-adapter[serve]'")
    with_page = not command.no_page and importlib.util.find_spec("gradio") is not None
    if command.page and not with_page:
        raise CommandError("--page needs the package gradio: pip install 'bt-adapter[page]'")
    # Idle threads must not spin: beside other work on the cores, an answer takes several times as long. OpenMP reads
    # this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from bt_adapter.serve.run import run_serve

    if not with_page:
        return run_serve(command)
    from bt_adapter.page.mount import add_page

    return run_serve(command, add_page)
