"""Video instruction tuning of a chat model with a branch (arXiv 2309.15785, section 3.3).

``recipe`` (what is asked for) → ``conversations`` and ``tokens`` (what is read) → ``features`` and ``batches`` (what a
step sees) → ``step`` and ``loss`` (its gradients) → ``run`` (the loop) → ``parts`` (what is written) → ``load``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from bt_adapter.chat.engine import VideoChat

ABOUT = "tuned.json"


def is_tuned(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds what a tuning run learned."""
    return (Path(folder) / ABOUT).is_file()


def load(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | VideoChat | None = None,
    branch: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    **options: Any,
) -> VideoChat:
    """The chat model that a tuning run made, with everything in place; adapters are merged into the language model.

    Args:
        folder: ``OUT/tuned`` of a run, or one of its checkpoints.
        model: the chat model it was tuned from: a folder or hub name, or a :class:`VideoChat`, which is changed. None:
            the one ``tuned.json`` names.
        branch: takes the place of the branch that the folder holds; where it holds none, because the branch did not
            learn, it must be the one it was tuned with. None: the folder's own, or the one ``tuned.json`` names.
        device: "cpu", "cuda", "cuda:1". dtype: None for what the model was stored in. options: of ``VideoChat.load``.

    Raises:
        FileNotFoundError: a file or a model is not there; the message says which and what to give.
        CheckpointError: a file is damaged, the branch is another than the one tuned, or the model has other shapes.
            Another chat model of the same shapes is not told from it.
    """
    from bt_adapter.tune.loading import load_tuned

    return load_tuned(folder, model, branch, device, dtype, **options)
