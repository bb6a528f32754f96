"""The command ``bt-adapter``.

Nothing heavy is imported before the arguments are read, so ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from bt_adapter.commands import chat, demo, mini
from bt_adapter.errors import CommandError

DESCRIPTION = "Video for image chat models: chat about a video file, show the demo, train the small stack."


def commands(argv: list[str]) -> Any:
    """The type that holds every command's arguments."""
    return (
        Annotated[chat.Chat, subcommand("chat")]
        | Annotated[demo.Demo, subcommand("demo")]
        | Annotated[mini.Mini, subcommand("mini")]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing one line on what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["mini"] and len(argv) > 1 and argv[1] in mini.PARTS:
            return mini.run_part(argv[1], argv[2:])
        command = tyro.cli(
            commands(argv),
            args=argv,
            prog="bt-adapter",
            description=DESCRIPTION,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        home: ModuleType = sys.modules[type(command).__module__]
        return home.run(command)
    except KeyboardInterrupt:
        print("bt-adapter: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_users(error):
            raise
        print(f"bt-adapter: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Bad input or a missing part, as against a fault of this program."""
    if isinstance(error, (CommandError, OSError)):
        return True
    from bt_adapter.checkpoint import CheckpointError
    from bt_adapter.data import VideoError
    from bt_adapter.mini.language import LanguageModelError

    return isinstance(error, (CheckpointError, VideoError, LanguageModelError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
