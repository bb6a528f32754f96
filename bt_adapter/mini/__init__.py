"""The small stack called "mini": a CLIP, a branch and chat parts that run on a laptop's CPU.

This folder only loads it, and imports nothing else of the package. The trained weights are data of their own package,
``bt-adapter-mini`` (folder ``mini/`` of a checkout); ``bench/miniature`` makes them with the package's own commands.
``bt_adapter.chat.tuned`` reads the stages of its chat model, which are folders of tuning runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

WEIGHTS_PACKAGE = "bt_adapter_mini"
CHECKOUT = Path(__file__).resolve().parents[2] / "mini" / WEIGHTS_PACKAGE


class MiniError(RuntimeError):
    """A part of the small stack is not installed; the message says which and how to install it."""


def weights_folder(part: str | os.PathLike[str]) -> Path:
    """Find the folder of one part of the small stack's weights: "clip", "branch", "image", "tuned" or "control".

    A checkout's own folder comes first, then that of the installed package ``bt-adapter-mini``. The part itself need
    not be there.

    Raises:
        MiniError: the weights are not installed; says what to install.
    """
    return data_folder() / "weights" / part


def data_folder() -> Path:
    """Find the folder that holds the small stack's weights and, beside them, its clips and its stored results.

    Raises:
        MiniError: as :func:`weights_folder`.
    """
    if (CHECKOUT / "weights").is_dir():
        return CHECKOUT
    package = find_spec(WEIGHTS_PACKAGE)
    for folder in (package.submodule_search_locations or ()) if package else ():
        return Path(folder)
    raise MiniError(
        "the small stack's weights come in the package bt-adapter-mini, which is not installed: "
        "pip install 'bt-adapter[mini]'"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers while a part is loaded."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
