"""The small stack's CLIP, which ``bench/miniature/clip.py`` trains from scratch on captioned stills."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from . import weights_folder


def load_clip(folder: str | os.PathLike[str] | None = None) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """Load the trained small CLIP in float32 and evaluation mode, and its tokenizer.

    Args:
        folder: where it was saved; None: the small stack's weights.

    Raises:
        MiniError: those are not installed. FileNotFoundError: the folder holds no weights.
    """
    name, folder = ("mini", weights_folder("clip")) if folder is None else (str(folder), Path(folder))
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no model.safetensors, the weights of a CLIP")
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).float()
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    model.name_or_path = name
    return model.eval(), load_tokenizer(folder)


def load_tokenizer(folder: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerFast:
    """Load the tokenizer of the small CLIP alone; arguments and errors as for :func:`load_clip`."""
    return PreTrainedTokenizerFast.from_pretrained(weights_folder("clip") if folder is None else folder)
