"""The branch inside a video chat model together with the model's vision tower, in their current state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.chat.families import Family, family_of
from bt_adapter.chat.families.called_tower import CalledTower
from bt_adapter.chat.families.pairing import is_shared, join_tower, share_tower
from bt_adapter.chat.families.wrapped import unwrapped
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.branch import Branch
from bt_adapter.model.time_steps import Long
from bt_adapter.progress import Progress

# Per thread (or task): whether the branch of an attachment is enabled, by the attachment's id.
_SWITCHED: ContextVar[Mapping[int, bool]] = ContextVar("branch_enabled", default=MappingProxyType({}))


class Attachment:
    """The video encoder of a chat model: its branch with its own vision tower.

    Args:
        family: the chat model's; the branch is registered as ``bt_adapter`` in its `home`.
        model: the branch and a tower whose modules share the chat model's weights.
        undo: the state that `detach` restores; None for a model constructed as a video chat model.
    """

    def __init__(self, family: Family, model: BTAdapterVisionModel, undo: Any = None) -> None:
        self.family, self.undo = family, undo
        self._model = model

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Enable or disable the branch for this thread's videos within the context."""
        token = _SWITCHED.set({**_SWITCHED.get(), id(self): enabled})
        try:
            yield
        finally:
            _SWITCHED.reset(token)

    @property
    def enabled(self) -> bool:
        """Whether this thread's videos go through the branch by default."""
        return _SWITCHED.get().get(id(self), self.family.home.config.use_branch)

    def encode(
        self,
        pixel_values: Tensor,
        progress: Progress | None = None,
        long: Long = "average",
        branch: bool | None = None,
    ) -> Tensor:
        """Encode videos ``[B, T, 3, h, w]`` as the tokens ``[B, P+1, D]`` that the projector or Q-Former reads.

        branch: None: :attr:`enabled`. progress, long: see ``BTAdapterVisionModel.video_tokens``.
        """
        branch = self.enabled if branch is None else branch
        return self.family.video_tokens(self.model(), pixel_values, branch=branch, progress=progress, long=long)

    def model(self) -> BTAdapterVisionModel:
        """Return the currently active branch with the currently active tower.

        It is always the same model as long as nothing was replaced or wrapped after the branch was attached.
        """
        family, model, wrapper = self.family, self._model, self.family.home.bt_adapter
        branch = unwrapped(wrapper, Branch)
        if branch is None:
            raise TypeError(f"bt_adapter must be a branch, or a wrapper around one, but is {type(wrapper).__name__}")
        tower: Any = model.tower
        if self.why_tower_is_called() is not None:
            tower = CalledTower(family, family.vision_tower, model.tower)
        elif not is_shared(model.tower, family):
            share_tower(model.tower, family)
        if tower is model.tower and wrapper is model.branch:
            return model
        view: BTAdapterVisionModel = copy.copy(model)
        view._modules = {"branch": branch}
        if isinstance(tower, nn.Module):
            view._modules["tower"] = tower
        else:
            object.__setattr__(view, "tower", tower)
        view.branch_wrapper = None if wrapper is branch else [wrapper]
        return view

    def why_tower_is_called(self) -> str | None:
        """Return why the chat model's tower must be called as a module, not computed from its weights, or None."""
        if torch.is_grad_enabled() and self.family.tower_learns():
            return "asks for gradients"
        return self.family.why_not_plain()


def attachment_of(chat: Any) -> Attachment:
    """Return the attachment of a chat model, or of LLaVA's inner model.

    Raises:
        TypeError: ``chat`` belongs to no supported family. ValueError: it has no branch.
    """
    family = family_of(chat)
    found = find_attachment(family)
    if found is None:
        raise ValueError("image_chat_model has no branch: call attach(image_chat_model, branch) first")
    return found


def find_attachment(family: Family) -> Attachment | None:
    """Return the attachment of a chat model, or None if it has no branch."""
    home = family.home
    if getattr(home, "bt_adapter", None) is None:
        return None
    found = home.__dict__.get("_attachment")
    if found is None:  # a model loaded or constructed as a video chat model
        branch: Any = unwrapped(home.bt_adapter, Branch)
        name = (home.config.bt_adapter or {}).get("tower_name")
        found = home.__dict__["_attachment"] = Attachment(family, join_tower(family, branch, name))
    return found
