"""``bt-adapter pretrain``."""

from __future__ import annotations

from bt_adapter.errors import CommandError
from bt_adapter.pretrain.recipe import Recipe, SettingsT, from_yaml
from bt_adapter.training.loop import until_stopped


def defaults(argv: list[str], default: SettingsT) -> tuple[SettingsT, list[str]]:
    """``default`` with the options of ``--config FILE`` where one is given, and the arguments without it.

    Raises CommandError: ``--config`` comes twice or without a file, or the file is wrong.
    """
    rest, files = [], []
    words = iter(argv)
    for word in words:
        if word == "--config":
            files.append(next(words, ""))
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            rest.append(word)
    if len(files) > 1 or "" in files:
        raise CommandError(f"--config must be given once, with a file, but the files given are {files}")
    return (from_yaml(files[0], default) if files else default), rest


def run(recipe: Recipe) -> int:
    """Pretrain. Returns 0, or 143 where the run was stopped and can be resumed."""
    from bt_adapter.pretrain.run import pretrain

    return until_stopped(lambda: pretrain(recipe))
