"""Errors the command line shows as one line."""


class CommandError(Exception):
    """Something the user can put right: shown without a traceback, exit code 2."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message says what does not fit."""
