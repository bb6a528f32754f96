"""An image chat model made a video chat model in place, over the same weights, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from torch import nn

from bt_adapter.branch import Branch
from bt_adapter.chat.families import Family
from bt_adapter.native.config import VIDEO_FIELDS
from bt_adapter.native.modeling import INNER_CLASSES, NATIVE_CLASSES, NOT_SAVED, WHOLE, derive


class ImageModel(NamedTuple):
    """The configuration of an image chat model, and the classes of it and of the model inside it."""

    config: Any
    classes: dict[Any, type]


@cache
def _native_class(image_class: type, native: type) -> type:
    """The video chat model's class for an image chat model's.

    A class derived from the family's own, as ``fully_shard`` makes one, keeps what it adds.
    """
    return native if image_class in native.__mro__ else derive(native, image_class)


def to_video_model(family: Family, branch: Branch, tower_name: str | None, fields: dict[str, Any]) -> ImageModel:
    """Make ``family.chat`` a video chat model with this branch, in place: no weight is copied.

    fields: values of the configuration's `VideoFields` that are no defaults.

    Returns what `to_image_model` wants.
    """
    native = NATIVE_CLASSES[family.name]
    before = ImageModel(family.chat.config, {module: type(module) for module in _modules(family)})
    config = copy.copy(family.chat.config)  # the parts' configurations stay the very same objects
    config.__class__ = native.config_class
    config.__dict__ |= VIDEO_FIELDS | fields
    config.bt_adapter = describe(branch, tower_name)
    wanted = {
        module: _native_class(image_class, native if module is family.chat else INNER_CLASSES[family.name])
        for module, image_class in before.classes.items()
    }
    _change(family, config, wanted)
    _note_branch(family, True)
    family.home.bt_adapter = branch
    return before


def to_image_model(family: Family, before: ImageModel) -> None:
    """Undo `to_video_model`."""
    del family.home.bt_adapter
    family.home.__dict__.pop("_attachment", None)
    _change(family, before.config, before.classes)
    _note_branch(family, False)


def image_model_of(family: Family) -> ImageModel:
    """The image chat model inside a video chat model that was loaded as one."""
    config = copy.copy(family.chat.config)
    config.__class__ = family.model_class.config_class  # type: ignore[attr-defined]
    for name in VIDEO_FIELDS:
        config.__dict__.pop(name, None)
    classes: Any = (family.model_class, family.inner_class)
    return ImageModel(config, dict(zip(_modules(family), classes, strict=False)))


def video_fields(family: Family) -> dict[str, Any]:
    """What the configuration of a chat model says of videos; nothing where it is an image chat model."""
    config = family.chat.config
    return {name: getattr(config, name) for name in VIDEO_FIELDS if hasattr(config, name)}


def describe(branch: Branch, tower_name: str | None) -> dict[str, Any]:
    """The configuration's ``bt_adapter``."""
    about = {"branch": branch.config.to_dict(), "layers": len(branch.temporal)}
    return about if tower_name is None else about | {"tower_name": tower_name}


def _note_branch(family: Family, there: bool) -> None:
    """Tell a model, as transformers does when it makes one, which layers stay on one device and what is not saved."""
    for module in _modules(family):
        for attribute, own in (("_no_split_modules", WHOLE), ("_keys_to_ignore_on_save", NOT_SAVED)):
            noted = set(getattr(module, attribute, None) or ())
            setattr(module, attribute, noted | set(own) if there else noted - set(own))


def _modules(family: Family) -> list[nn.Module]:
    """The chat model and, where there is one, the model inside it that takes the pixels."""
    return [family.chat] if family.home is family.chat else [family.chat, family.home]


def _change(family: Family, config: Any, classes: Mapping[Any, type]) -> None:
    old = family.chat.config
    for module, wanted in classes.items():
        if module.config is old:
            module.config = config
        module.__class__ = wanted
        if "_old_forward" in module.__dict__:  # accelerate keeps the forward that it wraps: let it be the new class's
            module._old_forward = wanted.forward.__get__(module)  # type: ignore[attr-defined]
