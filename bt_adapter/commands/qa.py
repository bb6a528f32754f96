"""``bt-adapter eval qa``."""

from __future__ import annotations

from bt_adapter.qa.settings import Qa
from bt_adapter.training.loop import until_stopped


def run(command: Qa) -> int:
    """Check the options, then evaluate. Returns 0, or 143 where judging was stopped and can be resumed."""
    command.check()
    from bt_adapter.qa.run import evaluate_qa

    return until_stopped(lambda: evaluate_qa(command))
