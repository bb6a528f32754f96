"""A plug-in for lmms-eval that evaluates the chat models of this package: ``lmms-eval --model bt_adapter``.

lmms-eval finds :func:`manifest` by the entry point group ``lmms_eval.models``. Nothing else of the package imports this
folder, and this module imports lmms-eval only when lmms-eval itself calls :func:`manifest`.
"""

from __future__ import annotations

from typing import Any

NAME = "bt_adapter"
"""Name of the model in lmms-eval's ``--model``."""


def manifest() -> Any:
    """Return the description by which lmms-eval finds the model's two classes, a ``ModelManifest``.

    The class for chat messages is the default; ``--force_simple`` selects the one for a text and a list of visuals.
    """
    from lmms_eval.models.registry_v2 import ModelManifest

    models = f"{__name__}.models"
    return ModelManifest(NAME, f"{models}.BTAdapterSimple", f"{models}.BTAdapterChat")
