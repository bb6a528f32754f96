"""The mini stack: a small CLIP, branch and chat parts, trained by commands in this folder.

The trained weights are data of their own package, ``bt-adapter-mini`` (folder ``mini/`` of a checkout).
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from bt_adapter.errors import CommandError

HERE = Path(__file__).resolve().parent
ITEMS_FILE = HERE / "items.npz"
WEIGHTS_PACKAGE = "bt_adapter_mini"
CHECKOUT_WEIGHTS = HERE.parents[1] / "mini" / WEIGHTS_PACKAGE / "weights"


def weights_folder(part: str | os.PathLike[str]) -> Path:
    """Folder of one part of the mini stack's weights: "clip", "branch", "projector", "tuned" or "control".

    A checkout's own folder comes first, so that what the training commands write there is what runs; then that of the
    installed package ``bt-adapter-mini``. The part itself need not be there.

    Raises:
        CommandError: the weights are not installed; says what to install.
    """
    if CHECKOUT_WEIGHTS.is_dir():
        return CHECKOUT_WEIGHTS / part
    package = find_spec(WEIGHTS_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        return Path(folder) / "weights" / part
    raise CommandError(
        "the small stack's weights come in the package bt-adapter-mini, which is not installed: "
        "pip install 'bt-adapter[mini]'"
    )


def folder_argument(text: str) -> Path:
    """A folder given on the command line: "mini:clip" for a part of the mini stack's weights, else a path."""
    kind, colon, part = text.partition(":")
    return weights_folder(part) if colon and kind == "mini" else Path(text)
