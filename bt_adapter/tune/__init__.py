"""Video instruction tuning of a chat model with a branch (arXiv 2309.15785, section 3.3).

``recipe`` (options) → ``conversations`` and ``tokens`` (reading) → ``features`` and ``batches`` (input of a step) →
``step`` and ``loss`` (its gradients) → ``run`` (the loop) → ``parts`` (trained parameters, written). `load` reads them
with ``bt_adapter.chat.tuned``. Importing this package does not import torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from bt_adapter.chat.model_folders import is_tuned

if TYPE_CHECKING:
    import torch

    from bt_adapter.chat.engine import VideoChat

__all__ = ["is_tuned", "load"]


def load(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | VideoChat | None = None,
    branch: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoChat:
    """Load the chat model that a tuning run made; adapters are merged into the language model.

    Args:
        folder: ``OUT/tuned`` of a run, or one of its checkpoints.
        model: the chat model it was tuned from: a folder or hub name, or a :class:`VideoChat`, which is modified. None:
            the one ``tuned.json`` names.
        branch: replaces the branch that the folder holds; where it holds none, because the branch was frozen, it must
            be the one the model was tuned with. None: the folder's own, or the one ``tuned.json`` names.
        device: "cpu", "cuda", "cuda:1". dtype: None for the stored one. options: of ``VideoChat.load``.

    Raises:
        FileNotFoundError: a file or a model is missing; the message names it and the argument to give.
        CheckpointError: a file is damaged, the branch is not the one tuned, or the model has other shapes. Another chat
            model of the same shapes is not detected.
    """
    from bt_adapter.chat.engine import VideoChat
    from bt_adapter.chat.loading import LoadOptions
    from bt_adapter.chat.tuned import load_tuned

    given = model.model if isinstance(model, VideoChat) else model
    chat, processor = load_tuned(folder, given, branch, LoadOptions(device, dtype, **options))
    return model if isinstance(model, VideoChat) else VideoChat(chat, processor)
