"""A branch attached to an image chat model, which then takes videos (arXiv 2309.15785, section 3.3)."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bt_adapter.branch import Branch
from bt_adapter.chat.branch_files import load_branch
from bt_adapter.chat.current import current_model
from bt_adapter.chat.families import Family, Visuals, family_of
from bt_adapter.chat.pairing import beside, check_shapes, check_values, loaded, mirrored, share_tower
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

    Whatever is put into or around the tower or the branch later is heeded: adapters of PEFT (``modules_to_save=
    ["bt_adapter"]`` trains a copy of the branch, and that copy runs), hooks, quantised, offloaded or sharded layers.
    Such layers are called, where plain ones are computed from their weights, which is faster. Gradients reach the
    adapters; where the tower's own weights or the pixels are asked for a gradient, they get one.

    Args:
        image_chat_model: LLaVA-1.5, LLaVA-NeXT or ViP-LLaVA with a CLIP tower, BLIP-2 or InstructBLIP, or a
            ``PeftModel`` around one; changed in place. docs/chat-models.md says what differs.
        branch: a model; a folder of `BTAdapterVisionModel.save_pretrained`, or the hub name of one; or a published
            checkpoint. Its learned part is moved to the tower's device and dtype until `detach`; its own tower is left
            alone.
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
    family.tower()  # TypeError unless it is a CLIP
    with loaded(family):
        if isinstance(branch, (str, os.PathLike)):
            branch = load_branch(branch, family, require_same_tower)
        elif not isinstance(branch, BTAdapterVisionModel):
            found = type(branch).__name__
            raise TypeError(f"branch must be a BTAdapterVisionModel, a folder or a file, but is {found}")
        check_shapes(branch.vision_config, branch.config.depth, family)
        check_values(branch.tower, family, require_same_tower)
    # a branch of stored features has a tower without embeddings
    model = beside(family, branch.branch, branch.tower_name) if branch.stored_features else mirrored(branch)
    model.tower_name = model.tower_name or getattr(family.vision_tower, "name_or_path", None) or None
    attached = _find(family)
    if family.why_not_plain(attached and attached.tower_forward) is None:
        share_tower(model.tower, family)

    detach(image_chat_model)
    owner, method = family.hook
    home = family.home
    device, dtype = family.tower_place()
    before = Before(model.branch, _to_freeze(family))
    for parameter in before.frozen:
        parameter.requires_grad_(False)
    model.branch.to(device=device, dtype=dtype).train(home.training)
    freeze_unreached(model)
    home.bt_adapter = model.branch
    setattr(owner, method, _Visuals(family, model, before, owner.__dict__.get(method)))
    return image_chat_model


def attached_branch(image_chat_model: Any) -> BTAdapterVisionModel:
    """The attached branch with its tower, as they are now. Raises ValueError when none is attached."""
    return _attached(image_chat_model).model()


def detach(image_chat_model: Any) -> Any:
    """Take the branch off; does nothing when none is attached.

    The chat model is as before `attach`, and so is the branch that was given to it: its dtype, device, mode and what
    asks for gradients. What was learnt meanwhile stays in the branch.
    """
    family = family_of(image_chat_model)
    attached = _find(family)
    if attached is not None:
        owner, method = family.hook
        delattr(owner, method)
        if attached.replaced is not None:
            setattr(owner, method, attached.replaced)
        del family.home.bt_adapter
        attached.before.restore()
    return image_chat_model


# Of this thread (or task) alone: whether videos go through the branch of an attachment, by the attachment's id.
_SWITCHED: ContextVar[Mapping[int, bool]] = ContextVar("branch_enabled", default=MappingProxyType({}))


@contextmanager
def branch_enabled(image_chat_model: Any, enabled: bool = True) -> Iterator[None]:
    """Within the context, and in its thread alone, videos go through the branch or (False) past it.

    Past it, a video's tokens are the mean over its frames of tower layer L-2's tokens, P patches and CLS: what
    ``video_tokens`` is made of but for the branch, and what an image model without any sense of time can see. Other
    threads see the branch as before; `video_tokens` and ``get_image_features`` take ``branch=False`` for one call.
    """
    attached = _attached(image_chat_model)
    token = _SWITCHED.set({**_SWITCHED.get(), id(attached): enabled})
    try:
        yield
    finally:
        _SWITCHED.reset(token)


def video_tokens(
    image_chat_model: Any,
    pixel_values: Tensor,
    progress: Progress | None = None,
    long: Long = "average",
    branch: bool | None = None,
) -> Tensor:
    """Tokens of videos ``[B, T, 3, h, w]`` before the projector or Q-Former, ``[B, P+1, D]``, CLS last.

    ``family_of(model).project`` makes the language model's embeddings of them. ViP-LLaVA: the tokens of its tower
    layers side by side. progress, long: as for ``BTAdapterVisionModel.video_tokens``. branch: False: past the branch;
    None: as `branch_enabled` says.
    """
    return _attached(image_chat_model).encode(pixel_values, progress, long, branch)


class _Visuals:
    """Stands in for the method through which a chat model sees: videos by the branch, stills by its own method."""

    def __init__(
        self, family: Family, model: BTAdapterVisionModel, before: Before, replaced: Callable[..., Any] | None
    ) -> None:
        self.family, self.before = family, before
        self._model = model
        self.replaced = replaced  # what stood in for the method before, as accelerate's hooks do
        self.__signature__ = inspect.signature(self._own())  # generate reads off it which arguments to hand over

    def __deepcopy__(self, memo: dict[int, Any]) -> _Visuals:
        if id(self.family.chat) not in memo:
            raise ValueError(
                "the module through which a chat model sees cannot be copied alone while a branch is attached (PEFT's "
                "modules_to_save copies it): detach the branch, wrap the module, and attach the branch again"
            )
        new = copy.copy(self)
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    @property
    def enabled(self) -> bool:
        """Whether videos of this thread go through the branch."""
        return _SWITCHED.get().get(id(self), True)

    def __call__(
        self,
        pixel_values: Any,
        *args: Any,
        progress: Progress | None = None,
        branch: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        family = self.family
        if isinstance(pixel_values, Tensor):
            if not family.takes_videos(pixel_values, args, kwargs):
                return self._own()(pixel_values, *args, **kwargs)
            output = family.output(list(family.videos(self.encode(pixel_values, progress, branch=branch, inside=True))))
        elif isinstance(pixel_values, (list, tuple)):
            output = family.output(self._sort(Visuals.of(pixel_values), kwargs, branch))
        else:
            raise TypeError(f"pixel_values must be a tensor or Visuals, but is {type(pixel_values).__name__}")
        return output if kwargs.get("return_dict", True) else output.to_tuple()

    def encode(
        self,
        pixel_values: Tensor,
        progress: Progress | None = None,
        long: Long = "average",
        branch: bool | None = None,
        inside: bool = False,
    ) -> Tensor:
        """Videos ``[B, T, 3, h, w]`` to the tokens the projector or Q-Former reads.

        branch: None: as :attr:`enabled`. inside: whether the hooked method runs, which may be the tower's own.
        """
        branch = self.enabled if branch is None else branch
        return self.family.video_tokens(self.model(inside), pixel_values, branch=branch, progress=progress, long=long)

    def model(self, inside: bool = False) -> BTAdapterVisionModel:
        """The branch that runs now beside the tower that runs now. ``inside``: as for :meth:`encode`.

        Where nothing was replaced or wrapped since `attach`, always the same model.
        """
        hooks_tower = self.family.hook[1] == "forward"  # as in Q-Former models
        call = self._own() if inside and hooks_tower else None
        return current_model(self.family, self._model, self.family.home.bt_adapter, self.tower_forward, call)

    @property
    def tower_forward(self) -> object:
        """What may stand in the place of the tower's forward without changing it: this object, in Q-Former models."""
        return self if self.replaced is None else None

    def _sort(self, visuals: Visuals, kwargs: dict[str, Any], branch: bool | None) -> list[Tensor]:
        """Features of each in order; stills in one batch, videos of one length in one."""
        kwargs = {name: value for name, value in kwargs.items() if name != "image_sizes"} | {"return_dict": True}
        features: list[Any] = [None] * len(visuals)
        groups: dict[Any, list[int]] = {}
        for i, item in enumerate(visuals):
            groups.setdefault(item.shape if visuals.is_video(i) else None, []).append(i)
        for shape, places in groups.items():
            items = [visuals[i].as_subclass(Tensor) for i in places]
            if shape is None:
                found = self.family.stills(self._own(), items, [visuals.image_sizes[i] for i in places], kwargs)
            else:
                found = list(self.family.videos(self.encode(torch.stack(items), branch=branch, inside=True)))
            for i, feature in zip(places, found, strict=True):
                features[i] = feature
        return features

    def _own(self) -> Callable[..., Any]:
        owner, method = self.family.hook
        return self.replaced or MethodType(getattr(type(owner), method), owner)


class Before:
    """What `attach` changes of what it is given, and how it was.

    Args:
        branch: whose parameters are cast, moved and frozen, and whose mode follows the chat model's.
        frozen: parameters of the chat model's tower that ask for a gradient until then.
    """

    def __init__(self, branch: Branch, frozen: list[nn.Parameter]) -> None:
        self.frozen = frozen
        self._modes = [(module, module.training) for module in branch.modules()]
        # the numbers too: a narrower dtype rounds them
        self._parameters = [(p, p.data, p.requires_grad) for p in branch.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the changes. A parameter that was learnt meanwhile keeps what it learnt, in its former dtype."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        for module, mode in self._modes:
            module.training = mode
        for parameter, before, asked in self._parameters:
            now = parameter.data
            if now.is_meta or not torch.equal(now, before.to(device=now.device, dtype=now.dtype)):
                before = before if now.is_meta else now.to(device=before.device, dtype=before.dtype)
            gradient, parameter.grad = parameter.grad, None
            parameter.data = before
            parameter.grad = None if gradient is None else gradient.to(device=before.device, dtype=before.dtype)
            parameter.requires_grad_(asked)


def _to_freeze(family: Family) -> list[nn.Parameter]:
    """Parameters of the chat model's tower that ask for a gradient; none where PEFT has chosen what learns in it."""
    tower = family.vision_tower
    if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in tower.modules()):
        return []
    return [p for p in tower.parameters() if p.requires_grad]


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
