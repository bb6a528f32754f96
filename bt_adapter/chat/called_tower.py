"""A chat model's own vision tower run by calling it, where its weights alone do not say what it computes.

Videos usually run ``bt_adapter.tower.Tower`` on the chat model's weights. Where a layer of the chat model's tower was
replaced or wrapped (adapters, hooks, quantised, sharded or offloaded weights), they run the tower as stills do.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from bt_adapter.chat.families import Family
from bt_adapter.progress import nothing
from bt_adapter.tower import Tower


class CalledTower:
    """Takes the place of a `Tower` for the videos of one call.

    Args:
        family: of the chat model.
        call: the chat model's tower: normalised images ``[n, 3, h, w]`` to an output with ``hidden_states``.
        tower: the `Tower` whose place it takes: its configuration, chunk, and what a chat model's tower lacks.
    """

    first_layer = 0
    is_fp8 = False

    def __init__(self, family: Family, call: Callable[..., Any], tower: Tower) -> None:
        self.family, self._call, self.tower = family, call, tower
        self.config, self.chunk, self.layers = tower.config, tower.chunk, tower.layers
        # what `run` found beyond the layer it was asked for, in order, and the tokens last handed out
        self._next: list[Tensor] = []
        self._last: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the tower takes images."""
        return self.family.tower_place()[1]

    @property
    def device(self) -> None:
        """None: wherever the images are; what wraps the tower may move them."""
        return None

    @property
    def position(self) -> Tensor:
        """The table of places, ``[1+P, D]``."""
        return self.family.position_table()

    @property
    def final_norm(self) -> Any:
        """As the replaced tower's: video tokens do not reach it."""
        return self.tower.final_norm

    def project(self, tokens: Tensor) -> Tensor:
        """As the replaced tower's."""
        return self.tower.project(tokens)

    def fingerprint(self) -> dict[str, float]:
        """As the replaced tower's."""
        return self.tower.fingerprint()

    def chunks(self, images: int) -> int:
        """As the replaced tower's."""
        return self.tower.chunks(images)

    def run(self, images: Tensor, stop: int, done: Callable[[], None] = nothing) -> Tensor:
        """Normalised images ``[n, 3, h, w]`` to the input of layer ``stop``, a chunk at a time: ``[n, 1+P, D]``.

        The whole tower runs, as it does for stills; what the layers from ``stop`` on give is kept for
        :meth:`run_layer`. Gradients flow where the images or a parameter of the tower ask for one.
        """
        # the layers' numbers and not counts from the end: the chat model's files may leave the last layer out
        wanted = range(stop, self.config.num_hidden_layers - self.family.layers_removed + 1)
        found: list[list[Tensor]] = [[] for _ in wanted]
        _let_record(self.family.vision_tower)
        with torch.set_grad_enabled(self._learns(images)):
            for piece in images.split(self.chunk):
                states = getattr(self._call(piece, output_hidden_states=True), "hidden_states", None)
                if states is None or len(states) <= wanted[-1]:
                    count = "none" if states is None else len(states)
                    raise ValueError(
                        "image_chat_model's vision tower must give the states of its layers for "
                        f"output_hidden_states=True ({wanted[-1] + 1} with their input), but gives {count}"
                    )
                for place, layer in enumerate(wanted):
                    found[place].append(states[layer])
                for _ in range(stop):
                    done()
            state, *self._next = (torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found)
        self._last = state
        return state

    def run_layer(self, layer: int, x: Tensor, done: Callable[[], None] = nothing) -> Tensor:
        """Output of layer ``layer`` (0-based) on ``[n, 1+P, D]``."""
        for _ in range(self.chunks(len(x))):
            done()
        if self._next and self._last is not None and x.data_ptr() == self._last.data_ptr():
            self._last = self._next.pop(0)
            return self._last
        # tokens that were stored: this layer alone is called
        self._next, self._last = [], None
        with torch.set_grad_enabled(self._learns(x)):
            return torch.cat([self.family.call_layer(layer, piece) for piece in x.split(self.chunk)])

    def _learns(self, images: Tensor) -> bool:
        return torch.is_grad_enabled() and (images.requires_grad or self.family.tower_learns())


def _let_record(tower: Any) -> None:
    """Let transformers find what a tower can record when its class was derived at run time, as FSDP2 does."""
    with suppress(ImportError):
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

        if not _CAN_RECORD_REGISTRY.get(tower) and hasattr(tower, "_can_record_outputs"):
            _CAN_RECORD_REGISTRY[tower] = tower._can_record_outputs
