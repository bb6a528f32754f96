"""One writer a folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from bt_adapter.errors import CommandError


def lock(folder: Path) -> IO[str]:
    """Keep other processes out of a folder, which is made, until what is returned is closed.

    Raises:
        CommandError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written: {error}") from error
    try:
        # of this process alone: a lock by flock would live on in its decoding processes when it is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise CommandError(f"--out {folder} is in use: another run writes there") from error
    except OSError:  # a file system without locks
        pass
    return file
