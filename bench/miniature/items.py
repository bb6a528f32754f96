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

import gzip
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
    """images uint8 [N, 28, 28] sorted by class, starts and counts int64 [8] of each class."""

    images: torch.Tensor
    starts: torch.Tensor
    counts: torch.Tensor

    def draw(self, classes: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """One random image of each class in classes [n] -> uint8 [n, 28, 28]."""
        place = torch.rand(len(classes), generator=generator) * self.counts[classes]
        return self.images[self.starts[classes] + place.long()]


def load_items(split: str = "shipped") -> Items:
    """Load a split ("train", "test" or "shipped").

    Raises ValueError for another split, FileNotFoundError naming the package when its files are not there.
    """
    if split == "shipped":
        with np.load(ITEMS_FILE) as stored:
            return _items(stored["images"], stored["labels"])
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train', 'test' or 'shipped'")
    images, labels, shipped = _read("train" if split == "train" else "t10k")
    kept = ~shipped | (split == "train")
    return _items(images[kept], labels[kept])


def _items(images: np.ndarray, labels: np.ndarray) -> Items:
    counts = torch.from_numpy(np.bincount(labels, minlength=len(ITEMS)))
    return Items(torch.from_numpy(images[np.argsort(labels, kind="stable")]), counts.cumsum(0) - counts, counts)


def _read(prefix: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images and own labels of the eight classes, and which of them are the first 40 of their class."""
    images = _idx(f"{prefix}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
    source = _idx(f"{prefix}-labels-idx1-ubyte.gz", 8)
    is_kind = source[:, None] == np.array(SOURCE_CLASSES)
    first = (is_kind & (is_kind.cumsum(0) <= SHIPPED_PER_CLASS)).any(1)
    kept = is_kind.any(1)
    return images[kept], is_kind.argmax(1)[kept], first[kept]


def _idx(name: str, header: int) -> np.ndarray:
    try:
        return np.frombuffer(gzip.decompress((FOLDER / name).read_bytes()), dtype=np.uint8, offset=header)
    except FileNotFoundError as error:
        advice = "install Debian's package dataset-fashion-mnist"
        raise FileNotFoundError(f"{FOLDER / name} is not there: {advice}") from error


if __name__ == "__main__":
    images, labels, shipped = _read("t10k")
    np.savez_compressed(ITEMS_FILE, images=images[shipped], labels=labels[shipped].astype(np.uint8))
