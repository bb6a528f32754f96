"""The branch and the tower of a chat model as they are at this call, whatever has been put in or around them since."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from bt_adapter.branch import Branch
from bt_adapter.chat.called_tower import CalledTower
from bt_adapter.chat.families import Family
from bt_adapter.chat.pairing import is_shared, share_tower
from bt_adapter.chat.wrapped import unwrapped
from bt_adapter.model import BTAdapterVisionModel


def why_tower_is_called(family: Family, forward: object = None) -> str | None:
    """Say why the chat model's tower must be called and not computed from its weights, or None: it need not.

    forward: the function that is known to stand in for the tower's own, if one does.
    """
    if torch.is_grad_enabled() and family.tower_learns():
        return "asks for gradients"
    return family.why_not_plain(forward)


def current_model(
    family: Family,
    model: BTAdapterVisionModel,
    wrapper: nn.Module,
    forward: object = None,
    call: Callable[..., Any] | None = None,
) -> BTAdapterVisionModel:
    """The branch that runs now beside the tower that runs now.

    Args:
        family: of the chat model.
        model: beside the chat model's tower; returned as it is where nothing was replaced or wrapped, and given the
            chat model's weights anew where those were.
        wrapper: what stands in the branch's place in the chat model.
        forward: as for `why_tower_is_called`.
        call: how to call the tower, where it must be; None: the tower itself.

    Raises:
        TypeError: there is no branch in ``wrapper``.
    """
    branch = unwrapped(wrapper, Branch)
    if branch is None:
        raise TypeError(f"bt_adapter must be a branch, or a wrapper around one, but is {type(wrapper).__name__}")
    tower: Any = model.tower
    if why_tower_is_called(family, forward) is not None:
        tower = CalledTower(family, call or family.vision_tower, model.tower)
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
