"""Features of clips on disk: an evaluation that was killed goes on where it was, and a second one decodes nothing.

``FOLDER/<fingerprint>/`` holds one safetensors file for each batch that was computed. The fingerprint stands for all
that a feature depends on beside the clip, and each feature has its clip's identity beside it, so an entry that is out
of date has another name and is never found.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bt_adapter.data.clips import Clip, Member


@dataclass(frozen=True)
class Feature:
    """What is known of a clip: a unit vector for each view, float32 ``[views, F]``; whether its file is damaged."""

    views: Tensor
    truncated: bool


class FeatureCache:
    """Features under one fingerprint. Several processes may write to one folder at the same time.

    Args:
        folder: None: nothing is stored.
        about: JSON values: all that a feature depends on, beside the clip.

    Attributes:
        folder: of this fingerprint. damaged: files in it that could not be read.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.folder, self.about = None if folder is None else folder / digest(about), about
        self.damaged: list[Path] = []
        self._found: dict[str, Feature] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            self._read(path)

    def get(self, clip: str) -> Feature | None:
        """The feature of the clip of this identity, where it is known."""
        return self._found.get(clip)

    def add(self, features: Mapping[str, Feature]) -> None:
        """Store features by the identity of their clips; they are on disk when this returns."""
        if self.folder is None or not features:
            return
        if not (self.folder / "about.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / "about.json", (json.dumps(self.about, indent=2) + "\n").encode())
        tensors = {
            "views": torch.stack([feature.views for feature in features.values()]),
            "truncated": torch.tensor([feature.truncated for feature in features.values()]),
        }
        content = save(tensors, metadata={"clips": json.dumps(list(features))})
        _write(self.folder / f"{uuid.uuid4().hex}.safetensors", content)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                clips = json.loads(file.metadata()["clips"])
                views, truncated = file.get_tensor("views"), file.get_tensor("truncated").tolist()
        except SafetensorError:  # a crash of the machine: its clips are computed again
            self.damaged.append(path)
            return
        self._found |= {clip: Feature(*pair) for clip, *pair in zip(clips, views, truncated, strict=True)}


def identity(clip: Clip) -> str:
    """What tells a clip's content from any other's: file, size and time of change, place in a shard, and its part.

    Raises:
        OSError: the file is not there.
    """
    source = clip.source
    path = source.path if isinstance(source, Member) else source
    state = os.stat(path)
    place = (source.offset, source.size) if isinstance(source, Member) else ()
    return digest([os.path.abspath(path), state.st_size, state.st_mtime_ns, *place, clip.start, clip.end])


def digest(value: Any) -> str:
    """A name, 32 characters long, for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.writing")
    temporary.write_bytes(content)
    os.replace(temporary, path)
