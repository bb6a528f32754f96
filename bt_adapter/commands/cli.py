"""The command ``bt-adapter``.

Nothing heavy is imported before the arguments are read, so ``--help`` and wrong arguments are answered at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from bt_adapter.chat.settings import Answer, Chat
from bt_adapter.commands import answer, chat, convert, demo, eval, export, live, pretrain, qa, serve, shards, tune
from bt_adapter.commands.groups import check_names, grouped, ungrouped
from bt_adapter.errors import CommandError
from bt_adapter.eval.settings import Recognition, Retrieval
from bt_adapter.live.settings import LiveChat
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.progress import prepare_output
from bt_adapter.qa.settings import Qa
from bt_adapter.serve.settings import Serve
from bt_adapter.tune.recipe import TuneRecipe

DESCRIPTION = (
    "Video for image chat models: chat, a server, pretraining of the branch, zero-shot evaluation, and the demo. "
    "bt-adapter --version prints the version."
)


# the module that runs each command, by the class of its options
RUN = {
    Answer: answer, Qa: qa, Serve: serve,
    Chat: chat, LiveChat: live, convert.Convert: convert, demo.Demo: demo, export.Export: export,
    Recipe: pretrain, TuneRecipe: tune,
    Retrieval: eval, Recognition: eval, shards.Shards: shards,
}  # fmt: skip
# the commands of which options have another name now, by their words on the command line
RENAMED: dict[tuple[str, ...], type] = {
    ("chat",): Chat, ("answer",): Answer, ("export",): export.Export, ("pretrain",): Recipe,
    ("tune",): TuneRecipe, ("eval", "retrieval"): Retrieval, ("eval", "recognition"): Recognition,
    ("eval", "qa"): Qa,
}  # fmt: skip


def parse(argv: list[str]) -> Any:
    """The command that the arguments name, with its options.

    Raises:
        CommandError: ``--config`` or its file is wrong, or an option has another name now.
        SystemExit: the arguments are wrong otherwise, or ask for help, which was printed.
    """
    for words in (argv[:1], argv[:2]):
        if command := RENAMED.get(tuple(words)):
            check_names(command, argv[len(words) :])
    recipe, argv = pretrain.defaults(argv, Recipe()) if argv[:1] == ["pretrain"] else (Recipe(), argv)
    tuning, argv = pretrain.defaults(argv, TuneRecipe()) if argv[:1] == ["tune"] else (TuneRecipe(), argv)
    commands: Any = (
        Annotated[grouped(Chat), subcommand("chat")]
        | Annotated[grouped(Answer), subcommand("answer")]
        | Annotated[grouped(LiveChat), subcommand("live")]
        | Annotated[grouped(Serve), subcommand("serve")]
        | Annotated[convert.Convert, subcommand("convert")]
        | Annotated[export.Export, subcommand("export")]
        | Annotated[demo.Demo, subcommand("demo")]
        | Annotated[grouped(Recipe, recipe, config=True), subcommand("pretrain")]
        | Annotated[grouped(TuneRecipe, tuning, config=True), subcommand("tune")]
        | eval.COMMANDS
        | Annotated[shards.Shards, subcommand("shards")]
    )
    markers = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes)
    return ungrouped(tyro.cli(commands, args=argv, prog="bt-adapter", description=DESCRIPTION, config=markers))


def main(argv: list[str] | None = None) -> int:
    """Run a command line; None: that of the process. Returns 0, or 2 after printing one line about an error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    prepare_output()
    try:
        if argv == ["--version"]:
            print(f"bt-adapter {version('bt-adapter')}")
            return 0
        command = parse(argv)
        return RUN[type(command)].run(command)
    except KeyboardInterrupt:
        print("bt-adapter: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_input_error(error):
            raise
        print(f"bt-adapter: {_one_line(error)}", file=sys.stderr)
        return 2


def _is_input_error(error: Exception) -> bool:
    """Whether an error is about bad input or a missing part, and no fault of this program."""
    if isinstance(error, (CommandError, OSError)):
        return True
    from bt_adapter.data import VideoError
    from bt_adapter.errors import CheckpointError
    from bt_adapter.mini import MiniError

    return isinstance(error, (CheckpointError, VideoError, MiniError))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
