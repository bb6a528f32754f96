"""``bt-adapter eval``."""

from __future__ import annotations

from typing import Annotated, Any

from tyro.conf import subcommand

from bt_adapter.commands.groups import grouped
from bt_adapter.eval.settings import Evaluation, Recognition, Retrieval
from bt_adapter.qa.settings import Qa

COMMANDS: Any = Annotated[
    Annotated[grouped(Retrieval), subcommand("retrieval")]
    | Annotated[grouped(Recognition), subcommand("recognition")]
    | Annotated[grouped(Qa), subcommand("qa")],
    subcommand("eval", description="Zero-shot evaluation: text-to-video retrieval, action recognition, questions."),
]


def run(command: Evaluation) -> int:
    """Check the options, then evaluate. Returns the exit code."""
    command.check()
    from bt_adapter.eval.run import evaluate

    return evaluate(command)
