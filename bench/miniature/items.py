"""Fashion-MNIST items the scenes are composed of.

Eight of the ten classes that can be told apart at scene resolution: Coat and Shirt overlap with Pullover and T-shirt
and are left out. Three splits without a common image:

- ``train``: the 48,000 training images of the eight classes;
- ``test``: the test images but for the shipped ones (7,680), used for trials and for the figures printed in training;
- ``shipped``: the first 40 test images of each class (320), in ``items.npz`` beside this file
  (MIT licence, Zalando SE), used for evaluation.

``train`` and ``test`` need Debian's package ``dataset-fashion-mnist``; ``shipped`` needs nothing.
``python bench/miniature/items.py`` makes ``items.npz``.
"""

from __future__ import annotations

import argparse
import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ITEMS_FILE = Path(__file__).resolve().parent / "items.npz"
FOLDER = Path("/usr/share/datasets/fashion-mnist")
ITEMS = ("t-shirt", "trouser", "pullover", "dress", "sandal", "sneaker", "bag", "boot")
SOURCE_CLASSES = (0, 1, 2, 3, 5, 7, 8, 9)  # Fashion-MNIST's own number of each
SHIPPED_PER_CLASS = 40


@dataclass(frozen=True)
class Items:
    """images uint8 [N, 28, 28] sorted by class, labels int64 [N], starts and counts int64 [8] of each class."""

    images: torch.Tensor
    labels: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def draw(self, classes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One random image of each class in classes [n] -> uint8 [n, 28, 28]."""
        place = torch.rand(len(classes), generator=generator) * self.counts[classes]
        return self.images[self.starts[classes] + place.long()]


def load_items(split: str = "shipped", folder: str | os.PathLike[str] | None = None) -> Items:
    """Load a split ("train", "test" or "shipped").

    folder: where the ``*-ubyte.gz`` files lie (default: where Debian's package puts them).
    Raises ValueError for another split, FileNotFoundError naming the package when the files are not there.
    """
    if split == "shipped":
        with np.load(ITEMS_FILE) as stored:
            return _items(stored["images"], stored["labels"])
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train', 'test' or 'shipped'")
    images, labels, shipped = _read(Path(folder or FOLDER), "train" if split == "train" else "t10k")
    if split == "train":
        return _items(images, labels)
    return _items(images[~shipped], labels[~shipped])


def write_shipped(path: str | os.PathLike[str] = ITEMS_FILE, folder: str | os.PathLike[str] | None = None) -> None:
    """Write the shipped split to an .npz file."""
    images, labels, shipped = _read(Path(folder or FOLDER), "t10k")
    temporary = Path(path).with_suffix(".tmp.npz")
    np.savez_compressed(temporary, images=images[shipped], labels=labels[shipped].astype(np.uint8))
    os.replace(temporary, path)


def _items(images: np.ndarray, labels: np.ndarray) -> Items:
    order = np.argsort(labels, kind="stable")
    counts = torch.from_numpy(np.bincount(labels, minlength=len(ITEMS)))
    return Items(
        images=torch.from_numpy(images[order].copy()),
        labels=torch.from_numpy(labels[order].astype(np.int64)),
        starts=counts.cumsum(0) - counts,
        counts=counts,
    )


def _read(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and own labels of the eight classes, and which of them are the first 40 of their class."""
    images = _idx(folder / f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    source = _idx(folder / f"{prefix}-labels-idx1-ubyte.gz", 8)
    own = np.full(10, -1)
    own[list(SOURCE_CLASSES)] = np.arange(len(ITEMS))
    kept = own[source] >= 0
    images, labels = images[kept], own[source][kept]
    first = np.zeros(len(labels), dtype=bool)
    for item in range(len(ITEMS)):
        first[np.flatnonzero(labels == item)[:SHIPPED_PER_CLASS]] = True
    return images, labels, first


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: install Debian's package dataset-fashion-mnist, or pass the folder that holds "
            "Fashion-MNIST's four *-ubyte.gz files"
        )
    with gzip.open(path) as stream:
        return np.frombuffer(stream.read(), dtype=np.uint8, offset=header)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write items.npz, the shipped test items.")
    parser.add_argument("--folder", default=None, help=f"Fashion-MNIST's files (default {FOLDER})")
    parser.add_argument("--out", default=str(ITEMS_FILE))
    arguments = parser.parse_args()
    write_shipped(arguments.out, arguments.folder)
    print(f"{arguments.out}: {os.path.getsize(arguments.out)} bytes")


if __name__ == "__main__":
    main()
