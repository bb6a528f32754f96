"""``bt-adapter chat``."""

from __future__ import annotations

from bt_adapter.chat.settings import Chat


def run(command: Chat) -> int:
    """Check the options before a model is loaded, then chat. Returns the exit code."""
    command.check()
    from bt_adapter.chat.session import run_chat

    return run_chat(command)
