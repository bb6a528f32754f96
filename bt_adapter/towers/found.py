"""Defines the vision tower read from an image model, under this package's names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bt_adapter.towers.config import TowerConfig


@dataclass(frozen=True)
class FoundTower:
    """A vision tower read from an image model.

    Attributes:
        name: name that the image model was loaded from; None: unknown.
        tensors: the parameters of ``towers.tower.Tower`` by name. They share memory with the image model, except
            those in ``changed``.
        config: configuration of the tower.
        changed: names of tensors that are copies, because the image model stores their values in another form.
    """

    name: str | None
    tensors: dict[str, Tensor]
    config: TowerConfig
    changed: frozenset[str] = frozenset()
