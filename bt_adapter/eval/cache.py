"""Caches features of clips on disk, so that a killed evaluation resumes and a repeated one decodes nothing.

``FOLDER/<fingerprint>/`` holds one safetensors file per computed batch. The fingerprint is a hash of everything that a
feature depends on besides the clip, and each feature is stored under its clip's identity, so an outdated entry is never
found.
"""

from __future__ import annotations

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

from bt_adapter import files
from bt_adapter.data.clips import Clip, Member
from bt_adapter.files import write_bytes, write_json


@dataclass(frozen=True)
class Feature:
    """Unit vectors of a clip's views, float32 ``[views, F]``, and whether its file is damaged or truncated."""

    views: Tensor
    truncated: bool


class FeatureCache:
    """Cache of the features under one fingerprint; several processes may write to one folder at the same time.

    Args:
        folder: folder of the cache; None: nothing is stored.
        about: JSON values: everything that a feature depends on besides the clip.

    Attributes:
        folder: subfolder of this fingerprint, or None. damaged: unreadable files in it.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.folder, self.about = None if folder is None else folder / digest(about), about
        self.damaged: list[Path] = []
        self._found: dict[str, Feature] = {}
        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            self._read(path)

    def get(self, clip: str) -> Feature | None:
        """Return the cached feature of the clip with this identity, or None."""
        return self._found.get(clip)

    def add(self, features: Mapping[str, Feature]) -> None:
        """Write features to disk by the identity of their clips."""
        if self.folder is None or not features:
            return
        if not (self.folder / "about.json").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "about.json", self.about)
        tensors = {
            "views": torch.stack([feature.views for feature in features.values()]),
            "truncated": torch.tensor([feature.truncated for feature in features.values()]),
        }
        content = save(tensors, metadata={"clips": json.dumps(list(features))})
        write_bytes(self.folder / f"{uuid.uuid4().hex}.safetensors", content)

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                clips = json.loads(file.metadata()["clips"])
                views, truncated = file.get_tensor("views"), file.get_tensor("truncated").tolist()
        except SafetensorError:  # damaged by a machine crash: its clips are computed again
            self.damaged.append(path)
            return
        self._found |= {clip: Feature(*pair) for clip, *pair in zip(clips, views, truncated, strict=True)}


def identity(clip: Clip) -> str:
    """Return a hash that identifies a clip's content: path, size, modification time, offset in a shard and range.

    Raises:
        OSError: the file is missing.
    """
    source = clip.source
    path = source.path if isinstance(source, Member) else source
    state = os.stat(path)
    place = (source.offset, source.size) if isinstance(source, Member) else ()
    return digest([os.path.abspath(path), state.st_size, state.st_mtime_ns, *place, clip.start, clip.end])


def digest(value: Any) -> str:
    """Hash a JSON value to 32 hexadecimal characters."""
    return files.digest([json.dumps(value, sort_keys=True).encode()], 32, "sha256")
