"""Lock a folder, so that only one run writes to it."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from bt_adapter.errors import CommandError


def lock(folder: Path) -> IO[str]:
    """Create a folder and lock it against other processes until the returned file is closed.

    Raises:
        CommandError: another process has locked it, or it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise CommandError(f"--out {folder} cannot be written: {error}") from error
    try:
        # a lock of this process only: flock's would survive in its decoding processes if it is killed
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise CommandError(f"--out {folder} is in use: another run writes there") from error
    except OSError:  # a file system without locks
        pass
    return file
