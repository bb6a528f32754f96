"""An image chat model made a video chat model in place, over the same weights, and back."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any, NamedTuple

from bt_adapter.branch import Branch
from bt_adapter.chat.families import Family
from bt_adapter.native.modeling import NATIVE_CLASSES, make_native_class


class ImageModel(NamedTuple):
    """What is put back when a branch is taken off: the class and the configuration of the image chat model."""

    model_class: type
    config: Any


@cache
def native_class_of(image_class: type, name: str) -> type:
    """The video chat model's class for an image chat model's.

    A class derived from the family's own, as ``fully_shard`` makes one, keeps what it adds.
    """
    native = NATIVE_CLASSES[name]
    if image_class in native.__mro__:
        return native
    return make_native_class(f"BTAdapter{image_class.__name__}", native, image_class)


def to_video_model(family: Family, branch: Branch, tower_name: str | None) -> ImageModel:
    """Make ``family.chat`` a video chat model with this branch, in place: no weight is copied.

    Returns what `to_image_model` wants.
    """
    chat = family.chat
    before = ImageModel(type(chat), chat.config)
    native: Any = native_class_of(type(chat), family.name)  # type: ignore[arg-type]
    config = copy.copy(chat.config)  # the parts' configurations stay the very same objects
    config.__class__ = native.config_class
    config.bt_adapter = describe(branch, tower_name)
    config.video_token_index, config.use_branch = None, True
    _set_config(family, before.config, config)
    chat.__class__ = native
    _rebind_forward(chat, native)
    family.home.bt_adapter = branch
    return before


def to_image_model(family: Family, before: ImageModel) -> None:
    """Undo `to_video_model`."""
    chat = family.chat
    del family.home.bt_adapter
    chat.__dict__.pop("_branch_view", None)
    _set_config(family, chat.config, before.config)
    chat.__class__ = before.model_class
    _rebind_forward(chat, before.model_class)


def describe(branch: Branch, tower_name: str | None) -> dict[str, Any]:
    """The configuration's ``bt_adapter``."""
    about = {"branch": branch.config.to_dict(), "layers": len(branch.temporal)}
    return about if tower_name is None else about | {"tower_name": tower_name}


def _set_config(family: Family, old: Any, new: Any) -> None:
    for module in (family.chat, family.home):
        if module.config is old:
            module.config = new


def _rebind_forward(chat: Any, model_class: type) -> None:
    """accelerate keeps the forward that it wraps on the module itself: let it be the new class's."""
    if "_old_forward" in chat.__dict__:
        chat._old_forward = model_class.forward.__get__(chat)  # type: ignore[attr-defined]
