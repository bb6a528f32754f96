"""``bt-adapter live``."""

from __future__ import annotations

from bt_adapter.live.settings import LiveChat


def run(command: LiveChat) -> int:
    """Check the options before a model is loaded, then watch. Returns the exit code."""
    command.check()
    from bt_adapter.live.run import run_live

    return run_live(command)
