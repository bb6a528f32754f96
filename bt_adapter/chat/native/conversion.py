"""Convert an image chat model to a video chat model and back, in place and with the same weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from bt_adapter.chat.families import Family
from bt_adapter.chat.native.config import VIDEO_FIELDS
from bt_adapter.chat.native.modeling import INNER_CLASSES, NATIVE_CLASSES, NOT_SAVED, WHOLE, derive
from bt_adapter.model.branch import Branch


class ImageModel(NamedTuple):
    """The configuration of an image chat model, and the classes of its outer and inner model."""

    config: Any
    classes: dict[Any, type]


@cache
def _native_class(image_class: type, native: type) -> type:
    """Return the video chat model's class for an image chat model's class.

    A subclass of the family's class, such as ``fully_shard`` makes, keeps its additions.
    """
    return native if image_class in native.__mro__ else derive(native, image_class)


def to_video_model(family: Family, branch: Branch, tower_name: str | None, fields: dict[str, Any]) -> ImageModel:
    """Convert ``family.chat`` to a video chat model with this branch, in place; no weight is copied.

    fields: values of the configuration's `VideoFields` that differ from the defaults.

    Returns the argument of `to_image_model`, which undoes the conversion.
    """
    native = NATIVE_CLASSES[family.name]
    before = ImageModel(family.chat.config, {module: type(module) for module in _modules(family)})
    config = copy.copy(family.chat.config)  # a shallow copy: the sub-configurations stay the same objects
    config.__class__ = native.config_class
    config.__dict__ |= VIDEO_FIELDS | fields
    config.bt_adapter = describe(branch, tower_name)
    wanted = {
        module: _native_class(image_class, native if module is family.chat else INNER_CLASSES[family.name])
        for module, image_class in before.classes.items()
    }
    _change(family, config, wanted)
    _set_attributes(family, True)
    family.home.bt_adapter = branch
    return before


def to_image_model(family: Family, before: ImageModel) -> None:
    """Undo `to_video_model`."""
    del family.home.bt_adapter
    family.home.__dict__.pop("_attachment", None)
    _change(family, before.config, before.classes)
    _set_attributes(family, False)


def image_model_of(family: Family) -> ImageModel:
    """Return the image chat model's classes and configuration for a model that was loaded as a video chat model."""
    config = copy.copy(family.chat.config)
    config.__class__ = family.model_class.config_class  # type: ignore[attr-defined]
    for name in VIDEO_FIELDS:
        config.__dict__.pop(name, None)
    classes: Any = (family.model_class, family.inner_class)
    return ImageModel(config, dict(zip(_modules(family), classes, strict=False)))


def video_fields(family: Family) -> dict[str, Any]:
    """Read the `VideoFields` of a chat model's configuration; empty for an image chat model."""
    config = family.chat.config
    return {name: getattr(config, name) for name in VIDEO_FIELDS if hasattr(config, name)}


def describe(branch: Branch, tower_name: str | None) -> dict[str, Any]:
    """Make the value of the configuration's field ``bt_adapter``."""
    about = {"branch": branch.config.to_dict(), "layers": len(branch.temporal)}
    return about if tower_name is None else about | {"tower_name": tower_name}


def _set_attributes(family: Family, has_branch: bool) -> None:
    """Set the instance attributes of transformers that name unsplittable layers and tensors that are not saved."""
    for module in _modules(family):
        for attribute, ours in (("_no_split_modules", WHOLE), ("_keys_to_ignore_on_save", NOT_SAVED)):
            names = set(getattr(module, attribute, None) or ())
            setattr(module, attribute, names | set(ours) if has_branch else names - set(ours))


def _modules(family: Family) -> list[nn.Module]:
    """List the chat model and, if there is one, its inner model, which takes the pixels."""
    return [family.chat] if family.home is family.chat else [family.chat, family.home]


def _change(family: Family, config: Any, classes: Mapping[Any, type]) -> None:
    old = family.chat.config
    for module, wanted in classes.items():
        if module.config is old:
            module.config = config
        module.__class__ = wanted
        if "_old_forward" in module.__dict__:  # accelerate wraps a stored forward: store the new class's
            module._old_forward = wanted.forward.__get__(module)  # type: ignore[attr-defined]
