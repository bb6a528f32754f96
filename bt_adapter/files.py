"""Write files and folders atomically: they are complete or do not exist."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from bt_adapter.errors import CommandError

VERSION = "0.1.0"  # of this package, recorded in the files that it writes


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary file and rename it to ``path``: a kill leaves the old file or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def replace_folder(aside: Path, folder: Path) -> None:
    """Rename a finished folder to its final name; an existing folder of that name is removed only after that."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_text(path: Path) -> str:
    """Read a UTF-8 file. Raises CommandError with the line and byte of an invalid character."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CommandError(f"{path}, line {line}: not UTF-8 ({error.reason} at byte {error.start})") from error
