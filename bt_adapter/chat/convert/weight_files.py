"""Find the weight files of a model's folder, and open them one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from bt_adapter.errors import CheckpointError
from bt_adapter.model.published_files import read_tensors


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a model's folder in order: safetensors files if there are any, else torch pickles.

    Raises:
        CheckpointError: there is none, or a file named in the index is missing.
    """
    for pattern, index in (
        ("model*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        files = sorted(folder.glob(pattern))
        named = _named(folder / index)
        if lacking := sorted(named - {file.name for file in files}):
            raise CheckpointError(f"{folder / index} names {', '.join(lacking)}, which is missing")
        if files:
            return [file for file in files if not named or file.name in named]
    raise CheckpointError(f"{folder} holds neither model*.safetensors nor pytorch_model*.bin")


@contextmanager
def open_weights(path: Path) -> Iterator[Mapping[str, Tensor]]:
    """Open a file as a mapping of tensors by name, each read on access; pickles with ``weights_only=True``.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged, would run code, or holds objects other than tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "pt") as file:
                yield _Lazy(file)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a safetensors file, or is damaged: {error}") from error
        return
    yield read_tensors(path)


class _Lazy(Mapping[str, Tensor]):
    def __init__(self, file: Any) -> None:
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _named(index: Path) -> set[str]:
    """Return the file names in an index; empty if it does not exist."""
    if not index.is_file():
        return set()
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index} is damaged: {error}") from error
