"""Groups of options in ``--help``, and options that have another name now."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from bt_adapter.errors import CommandError
from bt_adapter.training.settings import option


@dataclass(frozen=True)
class ConfigFile:
    """Options that come from a file."""

    config: Annotated[Path | None, arg(metavar="FILE")] = None
    """YAML file of options, written as here or with underscores; options on the command line override it."""


def group_classes(command: type) -> Iterator[type]:
    """The bases of a command's class that are groups of options: those with a ``help_group`` of their own."""
    for base in reversed(command.__bases__):
        if "help_group" in vars(base):
            yield base
        else:
            yield from group_classes(base)


def grouped(command: type, default: Any = None, config: bool = False) -> type:
    """A dataclass with one nested dataclass for each group of a command's options, which tyro shows as a group.

    Args:
        command: class of a command whose options all stand in groups. default: an instance with the default values;
            None: those of the class. config: whether the command takes ``--config``.
    """
    groups: list[Any] = [("file", ConfigFile, field(default=ConfigFile()))] if config else []
    for group in group_classes(command):
        values = None if default is None else {item.name: getattr(default, item.name) for item in fields(group)}
        groups.append((vars(group)["help_group"], group, *([] if values is None else [field(default=group(**values))])))
    made = make_dataclass(command.__name__, groups, frozen=True, namespace={"command": command})
    made.__doc__ = inspect.getdoc(command)
    return made


def ungrouped(parsed: Any) -> Any:
    """The command that was parsed as :func:`grouped`; any other command as it is."""
    command = getattr(type(parsed), "command", None)
    if command is None:
        return parsed
    names = {item.name for item in fields(command)}
    values = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    return command(**{name: value for name, value in values.items() if name in names})


def check_names(command: type, words: Sequence[str]) -> None:
    """Raise CommandError for an option under its former name, naming the present one.

    Args:
        command: its ``renamed`` maps former names of fields to present ones. words: of the command line.
    """
    renamed = getattr(command, "renamed", {})
    defaults = {item.name: item.default for item in fields(command)}
    for word in words:
        name = word.partition("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and name in renamed:
            now = option(("no_" if defaults[renamed[name]] is True else "") + renamed[name])
            raise CommandError(f"{option(name)} is called {now} now")
