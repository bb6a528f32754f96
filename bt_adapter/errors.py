"""Errors the command line shows as one line."""


class CommandError(Exception):
    """Something the user can put right: shown without a traceback, exit code 2."""
