"""``bt-adapter answer``."""

from __future__ import annotations

from bt_adapter.chat.settings import Answer


def run(command: Answer) -> int:
    """Check the options, then answer. Returns the exit code."""
    command.check()
    from bt_adapter.chat.answer import run_answer

    return run_answer(command)
