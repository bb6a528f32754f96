"""Errors that the command line prints as one line."""


class CommandError(Exception):
    """An error that the user can correct: printed without a traceback, exit code 2."""


class CheckpointError(ValueError):
    """An error of a checkpoint that cannot be loaded; the message lists what does not fit."""
