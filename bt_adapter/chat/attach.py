"""A branch attached to an image chat model, which then takes videos (arXiv 2309.15785, section 3.3)."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.chat.branch_files import load_branch
from bt_adapter.chat.families import Family, Visuals, family_of
from bt_adapter.chat.pairing import beside, check_shapes, check_values, is_shared, share_tower
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.progress import Progress
from bt_adapter.time_steps import Long


def attach(
    image_chat_model: Any, branch: BTAdapterVisionModel | str | os.PathLike[str], require_same_tower: bool = True
) -> Any:
    """Let an image chat model take videos: ``pixel_values`` of ``[B, T, 3, h, w]`` beside stills of ``[B, 3, h, w]``.

    A video becomes as many tokens whatever T is (``family_of(model).video_length``): ``video_tokens`` through the
    model's own projector or Q-Former, in the place of image tokens. Stills take the path they took before, token for
    token; ``generate`` works unchanged. Stills and videos together, or videos of different length, come as `Visuals`;
    every image token of a prompt is filled, in order. The chat model's vision tower and the branch's are then one set
    of weights, the chat model's, frozen. What learns is registered as ``bt_adapter`` in the chat model (LLaVA-like: in
    its ``model``): it follows ``to`` and ``train`` and is among ``parameters()``; what video tokens never reach (the
    branch's last layer, its output gate and alignment head) is frozen. Save it with
    ``attached_branch(model).save_pretrained(folder)``: transformers' own ``save_pretrained`` writes it too, but its
    ``from_pretrained`` does not take it back. `detach` takes it off.

    Args:
        image_chat_model: LLaVA-1.5, LLaVA-NeXT or ViP-LLaVA with a CLIP tower, BLIP-2 or InstructBLIP; changed in
            place. docs/chat-models.md says what differs.
        branch: a model; a folder of `BTAdapterVisionModel.save_pretrained`, or the hub name of one; or a published
            checkpoint. Its learned part is moved to the tower's device and dtype.
        require_same_tower: False: a branch trained beside another CLIP of the same shape, or at another resolution
            (CLIP-L/14 at 224 px beside CLIP-L/14-336), is attached with a warning. The same CLIP at another resolution
            needs no leave: the chat model's position table serves.

    Returns:
        The same chat model.

    Raises:
        TypeError: ``image_chat_model`` is none of these, or ``branch`` nothing of the above.
        FileNotFoundError: there is no such branch.
        ValueError: branch and chat model do not match; the message lists in what.
    """
    family = family_of(image_chat_model)
    tensors, _ = family.tower()  # TypeError unless it is a CLIP
    before = {p: p.requires_grad for p in family.vision_tower.parameters()}
    if (attached := _find(family)) is not None:
        before = attached.asked_gradients
    if isinstance(branch, (str, os.PathLike)):
        branch = load_branch(branch, family, require_same_tower)
    elif not isinstance(branch, BTAdapterVisionModel):
        raise TypeError(f"branch must be a BTAdapterVisionModel, a folder or a file, but is {type(branch).__name__}")
    check_shapes(branch.vision_config, branch.config.depth, family)
    check_values(branch.tower, family, require_same_tower)
    if branch.stored_features:  # its tower has no embeddings
        branch = beside(family, branch.branch, branch.tower_name)
    else:
        share_tower(branch.tower, family)
    branch.tower_name = branch.tower_name or getattr(family.vision_tower, "name_or_path", None) or None

    detach(image_chat_model)
    family.vision_tower.requires_grad_(False)
    place = tensors["class_embedding"]
    owner, method = family.hook
    home = _home(family)
    branch.branch.to(device=place.device, dtype=place.dtype).train(home.training)
    freeze_unreached(branch)
    home.bt_adapter = branch.branch
    setattr(owner, method, _Visuals(family, branch, before, owner.__dict__.get(method)))
    return image_chat_model


def attached_branch(image_chat_model: Any) -> BTAdapterVisionModel:
    """The attached branch with its tower. Raises ValueError when none is attached."""
    return _attached(image_chat_model).branch


def detach(image_chat_model: Any) -> Any:
    """Take the branch off; the chat model is as before `attach`. Does nothing when none is attached."""
    family = family_of(image_chat_model)
    attached = _find(family)
    if attached is not None:
        for parameter, asked in attached.asked_gradients.items():
            parameter.requires_grad_(asked)
        owner, method = family.hook
        delattr(owner, method)
        if attached.replaced is not None:
            setattr(owner, method, attached.replaced)
        del _home(family).bt_adapter
    return image_chat_model


@contextmanager
def branch_enabled(image_chat_model: Any, enabled: bool = True) -> Iterator[None]:
    """Within the context, videos go through the branch or (False) past it.

    Past it, a video's tokens are the mean over its frames of tower layer L-2's tokens, P patches and CLS: what
    ``video_tokens`` is made of but for the branch, and what an image model without any sense of time can see.
    """
    attached = _attached(image_chat_model)
    before, attached.enabled = attached.enabled, enabled
    try:
        yield
    finally:
        attached.enabled = before


def video_tokens(
    image_chat_model: Any, pixel_values: Tensor, progress: Progress | None = None, long: Long = "average"
) -> Tensor:
    """Tokens of videos ``[B, T, 3, h, w]`` before the projector or Q-Former, ``[B, P+1, D]``, CLS last.

    ``family_of(model).project`` makes the language model's embeddings of them. Heeds `branch_enabled`. ViP-LLaVA: the
    tokens of its tower layers side by side. progress, long: as for ``BTAdapterVisionModel.video_tokens``.
    """
    return _attached(image_chat_model).encode(pixel_values, progress, long)


class _Visuals:
    """Stands in for the method through which a chat model sees: videos by the branch, stills by its own method."""

    def __init__(
        self,
        family: Family,
        branch: BTAdapterVisionModel,
        before: dict[nn.Parameter, bool],
        replaced: Callable[..., Any] | None,
    ) -> None:
        self.family, self.branch, self.enabled = family, branch, True
        self.asked_gradients = before  # of the chat model's tower, for `detach`
        self.replaced = replaced  # what stood in for the method before, as accelerate's hooks do
        self.__signature__ = inspect.signature(self._own())  # generate reads off it which arguments to hand over

    def __call__(self, pixel_values: Any, *args: Any, progress: Progress | None = None, **kwargs: Any) -> Any:
        family = self.family
        if isinstance(pixel_values, Tensor):
            if not family.takes_videos(pixel_values, args, kwargs):
                return self._own()(pixel_values, *args, **kwargs)
            output = family.output(list(family.videos(self.encode(pixel_values, progress))))
        elif isinstance(pixel_values, (list, tuple)):
            output = family.output(self._sort(Visuals.of(pixel_values), kwargs))
        else:
            raise TypeError(f"pixel_values must be a tensor or Visuals, but is {type(pixel_values).__name__}")
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    def encode(self, pixel_values: Tensor, progress: Progress | None = None, long: Long = "average") -> Tensor:
        """Videos ``[B, T, 3, h, w]`` to the tokens the projector or Q-Former reads."""
        if not is_shared(self.branch.tower, self.family):
            share_tower(self.branch.tower, self.family)
        return self.family.video_tokens(self.branch, pixel_values, branch=self.enabled, progress=progress, long=long)

    def _sort(self, visuals: Visuals, kwargs: dict[str, Any]) -> list[Tensor]:
        """Features of each in order; stills in one batch, videos of one length in one."""
        kwargs = {name: value for name, value in kwargs.items() if name != "image_sizes"} | {"return_dict": True}
        features: list[Any] = [None] * len(visuals)
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(visuals):
            groups.setdefault(item.shape if visuals.is_video(i) else None, []).append(i)
        for shape, places in groups.items():
            items = [visuals[i] for i in places]
            if shape is None:
                found = self.family.stills(self._own(), items, [visuals.image_sizes[i] for i in places], kwargs)
            else:
                found = list(self.family.videos(self.encode(torch.stack(items))))
            for i, feature in zip(places, found, strict=True):
                features[i] = feature
        return features

    def _own(self) -> Callable[..., Any]:
        owner, method = self.family.hook
        return self.replaced or MethodType(getattr(type(owner), method), owner)


def _home(family: Family) -> nn.Module:
    """Where the branch is registered."""
    return getattr(family.chat, "model", family.chat)


def _find(family: Family) -> _Visuals | None:
    owner, method = family.hook
    found = owner.__dict__.get(method)
    return found if isinstance(found, _Visuals) else None


def _attached(chat: Any) -> _Visuals:
    attached = _find(family_of(chat))
    if attached is None:
        raise ValueError("image_chat_model has no branch: attach(image_chat_model, branch) comes first")
    return attached


def freeze_unreached(branch: BTAdapterVisionModel) -> None:
    """Video tokens run neither the branch's last layer nor what reads its end: DDP would wait for their gradients."""
    last = branch.config.depth - 1
    unreached = (f"temporal.{last}.", f"spatial.{last}.", "output_gate", "alignment_head.")
    for name, parameter in branch.branch.named_parameters():
        if name.startswith(unreached):
            parameter.requires_grad_(False)
