"""Text files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to a temporary name beside ``path`` and rename it: a kill leaves the old file or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
