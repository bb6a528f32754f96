"""Writes the similarities behind retrieval metrics to a file, to compare two systems query by query or to score
choices among a few captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from bt_adapter.data.clips import Clip
from bt_adapter.eval.retrieval import Scores
from bt_adapter.files import writing


def write_similarities(path: Path, scores: Scores, clips: Sequence[Clip], settings: dict[str, Any]) -> None:
    """Write the similarity of every caption to every clip atomically.

    Both formats hold the arrays ``scores``, float32 ``[Q, V]``, whose row q has the q-th caption's similarity to each
    clip, and ``clip_of_caption``, int64 ``[Q]``, the correct column for each caption. The lists ``captions`` (of
    length Q) and ``clips`` (V keys), and the object ``settings``, are JSON texts: metadata entries in .safetensors,
    arrays of one text each in .npz.

    Args:
        path: file to write, named .safetensors or .npz. scores: scores of the clips.
        clips: the V compared clips with their captions, without skipped clips.
        settings: JSON values that the similarities depend on.
    """
    arrays = {  # contiguous: the safetensors writer ignores strides
        "scores": scores.cosines[scores.text].float().cpu().contiguous().numpy(),
        "clip_of_caption": scores.video.cpu().contiguous().numpy(),
    }
    captions = [caption for clip in clips for caption in clip.captions]
    lists = {"captions": captions, "clips": [clip.key for clip in clips], "settings": settings}
    texts = {name: json.dumps(value) for name, value in lists.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path) as temporary, open(temporary, "wb") as file:
        if path.suffix == ".npz":
            contents: dict[str, Any] = {**arrays, **{name: np.array(text) for name, text in texts.items()}}
            np.savez(file, **contents)
        else:
            file.write(save(arrays, texts))


def read_settings(path: Path) -> Any:
    """Read the settings from a file of similarities. Raises ValueError if it is no such file."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return json.loads(str(file["settings"]))
        with safe_open(path, "np") as file:
            return json.loads(file.metadata()["settings"])
    except Exception as error:  # the readers raise SafetensorError, KeyError, BadZipFile, TypeError ...
        raise ValueError(f"{path} holds no similarities ({error})") from error
