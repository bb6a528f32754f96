"""The command ``bt-adapter``.

Nothing heavy is imported before the arguments are read, so ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from bt_adapter.commands import answer, chat, convert, demo, eval, export, pretrain, qa, shards, tune
from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.terminal import prepare_output
from bt_adapter.tune.recipe import TuneRecipe

DESCRIPTION = "Video for image chat models: chat, pretraining of the branch, zero-shot evaluation, and the demo."


# Which part of this package runs a command, by the type that holds its arguments.
RUN = {
    answer.Answer: answer, qa.Qa: qa,
    chat.Chat: chat, convert.Convert: convert, demo.Demo: demo, export.Export: export,
    Recipe: pretrain, TuneRecipe: tune,
    eval.Retrieval: eval, eval.Recognition: eval, shards.Shards: shards,
}  # fmt: skip


def commands(recipe: Recipe, tuning: TuneRecipe) -> Any:
    """The type of every command's arguments; ``recipe``, ``tuning``: the defaults of pretraining and of tuning."""
    return (
        Annotated[chat.Chat, subcommand("chat")]
        | Annotated[answer.Answer, subcommand("answer")]
        | Annotated[convert.Convert, subcommand("convert")]
        | Annotated[export.Export, subcommand("export")]
        | Annotated[demo.Demo, subcommand("demo")]
        | Annotated[Recipe, subcommand("pretrain", default=recipe)]
        | Annotated[TuneRecipe, subcommand("tune", default=tuning)]
        | eval.COMMANDS
        | Annotated[shards.Shards, subcommand("shards")]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 2 after printing one line on what was wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_output()
    try:
        recipe, argv = pretrain.defaults(argv, Recipe()) if argv[:1] == ["pretrain"] else (Recipe(), argv)
        tuning, argv = pretrain.defaults(argv, TuneRecipe()) if argv[:1] == ["tune"] else (TuneRecipe(), argv)
        command = tyro.cli(
            commands(recipe, tuning),
            args=argv,
            prog="bt-adapter",
            description=DESCRIPTION,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        return RUN[type(command)].run(command)
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
    from bt_adapter.mini import MiniError

    return isinstance(error, (CheckpointError, VideoError, MiniError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
