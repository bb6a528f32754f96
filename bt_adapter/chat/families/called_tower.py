"""Run a chat model's vision tower by calling its modules, where they compute more than their plain weights do.

Videos usually run ``towers.tower.Tower`` on the chat model's weights. If a layer of the chat model's tower was
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
from bt_adapter.towers.tower import Tower


class CalledTower:
    """A substitute for a `Tower` during one call that calls the chat model's own vision tower.

    Args:
        family: the chat model's.
        call: the chat model's tower: normalised images ``[n, 3, h, w]`` to an output with ``hidden_states``.
        tower: the replaced `Tower`: provides the configuration, chunk size, and parts a chat model's tower lacks.
    """

    first_layer = 0
    is_fp8 = False

    def __init__(self, family: Family, call: Callable[..., Any], tower: Tower) -> None:
        self.family, self._call, self.tower = family, call, tower
        self.config, self.chunk, self.layers = tower.config, tower.chunk, tower.layers
        # outputs of the layers after the one `run` returned, in order, and the tokens last returned
        self._next: list[Tensor] = []
        self._last: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the images that the tower accepts."""
        return self.family.tower_place()[1]

    @property
    def device(self) -> None:
        """None, because a wrapper of the tower may move images to any device."""
        return None

    @property
    def position(self) -> Tensor:
        """The position embeddings, ``[1+P, D]``."""
        return self.family.position_table()

    @property
    def final_norm(self) -> Any:
        """The replaced tower's final norm; video tokens do not use it."""
        return self.tower.final_norm

    def project(self, tokens: Tensor) -> Tensor:
        """Project tokens with the replaced tower."""
        return self.tower.project(tokens)

    def fingerprint(self) -> dict[str, float]:
        """Return the replaced tower's fingerprint."""
        return self.tower.fingerprint()

    def chunks(self, images: int) -> int:
        """Return the replaced tower's number of chunks for so many images."""
        return self.tower.chunks(images)

    def run(self, images: Tensor, stop: int, done: Callable[[], None] = nothing) -> Tensor:
        """Compute the input of layer ``stop``, ``[n, 1+P, D]``, of images ``[n, 3, h, w]``, a chunk at a time.

        The whole tower runs, as it does for stills; the outputs of the layers from ``stop`` on are kept for
        :meth:`run_layer`. Gradients flow where the images or a parameter of the tower require one.
        """
        # indices from the start, not from the end, because the chat model's files may lack the last layer
        wanted = range(stop, self.config.num_hidden_layers - self.family.layers_removed + 1)
        found: list[list[Tensor]] = [[] for _ in wanted]
        _let_record(self.family.vision_tower)
        with torch.set_grad_enabled(self._needs_gradients(images)):
            for piece in images.split(self.chunk):
                states = getattr(self._call(piece, output_hidden_states=True), "hidden_states", None)
                if states is None or len(states) <= wanted[-1]:
                    count = "none" if states is None else len(states)
                    raise ValueError(
                        "image_chat_model's vision tower must return the states of its layers for "
                        f"output_hidden_states=True ({wanted[-1] + 1} with their input), but returns {count}"
                    )
                for place, layer in enumerate(wanted):
                    found[place].append(states[layer])
                for _ in range(stop):
                    done()
            state, *self._next = (torch.cat(pieces) if len(pieces) > 1 else pieces[0] for pieces in found)
        self._last = state
        return state

    def run_layer(self, layer: int, x: Tensor, done: Callable[[], None] = nothing) -> Tensor:
        """Compute the output of layer ``layer`` (0-based) on ``[n, 1+P, D]``."""
        for _ in range(self.chunks(len(x))):
            done()
        if self._next and self._last is not None and x.data_ptr() == self._last.data_ptr():
            self._last = self._next.pop(0)
            return self._last
        # tokens from elsewhere (stored features): only this layer is called
        self._next, self._last = [], None
        with torch.set_grad_enabled(self._needs_gradients(x)):
            return torch.cat([self.family.call_layer(layer, piece) for piece in x.split(self.chunk)])

    def _needs_gradients(self, images: Tensor) -> bool:
        return torch.is_grad_enabled() and (images.requires_grad or self.family.tower_learns())


def _let_record(tower: Any) -> None:
    """Register the recordable outputs of a tower whose class was derived at run time, as FSDP2 does."""
    with suppress(ImportError):
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

        if not _CAN_RECORD_REGISTRY.get(tower) and hasattr(tower, "_can_record_outputs"):
            _CAN_RECORD_REGISTRY[tower] = tower._can_record_outputs
