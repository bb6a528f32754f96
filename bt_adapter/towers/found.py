"""The vision tower of a loaded image model, under this package's names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bt_adapter.config import TowerConfig


@dataclass(frozen=True)
class FoundTower:
    """A vision tower as it was found in an image model.

    Attributes:
        name: by which the image model was loaded; None: it is not known.
        tensors: the parameters of ``bt_adapter.tower.Tower`` by name. The image model's own, or views of them, but for
            those that are only there after arithmetic (``changed``).
        config: of the tower.
        changed: names of tensors that are copies, because the image model holds their numbers in another form.
    """

    name: str | None
    tensors: dict[str, Tensor]
    config: TowerConfig
    changed: frozenset[str] = frozenset()
