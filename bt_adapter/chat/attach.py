"""Attach a branch to an image chat model, so that it accepts videos (arXiv 2309.15785, section 3.3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bt_adapter.chat.branch_files import load_branch
from bt_adapter.chat.families import Family, family_of
from bt_adapter.chat.families.attachment import Attachment, attachment_of, find_attachment
from bt_adapter.chat.families.pairing import (
    check_shapes,
    check_values,
    copy_modules,
    join_tower,
    load_offloaded,
    make_absent_branch,
    share_tower,
)
from bt_adapter.chat.native.conversion import ImageModel, image_model_of, to_image_model, to_video_model, video_fields
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.branch import Branch
from bt_adapter.model.time_steps import Long
from bt_adapter.progress import Progress


def attach(
    image_chat_model: Any,
    branch: BTAdapterVisionModel | str | os.PathLike[str] | None,
    require_same_tower: bool = True,
) -> Any:
    """Turn an image chat model into a video chat model, in place and with the same weights.

    The model becomes this package's class for its family (``bt_adapter.native``): it accepts ``pixel_values_videos``
    in addition to ``pixel_values``, and transformers' own ``save_pretrained`` and ``from_pretrained`` store and load it
    with its branch. ``bt_adapter.native.make_processor`` makes its processor. Videos may also be passed as
    ``pixel_values`` of ``[V, T, 3, h, w]``, or mixed with stills as `Visuals`, at the positions of image tokens.

    A video has a fixed number of tokens whatever T is (``family_of(model).video_length``): ``video_tokens`` through the
    model's own projector or Q-Former. Stills and text are answered as before, bit for bit. The branch uses the chat
    model's vision tower, frozen. The branch is registered as ``bt_adapter`` in the chat model (LLaVA-like: in its
    ``model``): it follows ``to`` and ``train`` and is among ``parameters()``. Parameters that video tokens do not
    depend on (the branch's last layer, its output gate and alignment head) are frozen. `detach` removes the branch.

    Modules that are later put into or around the tower or the branch take effect: PEFT adapters (``modules_to_save=
    ["bt_adapter"]`` trains a copy of the branch, and that copy runs), hooks, quantised, offloaded or sharded layers.
    Such layers are called as modules; plain ones are computed from their weights, which is faster. Gradients reach the
    adapters, and the tower's own weights or the pixels where they require a gradient.

    Args:
        image_chat_model: LLaVA-1.5, LLaVA-NeXT or ViP-LLaVA with a CLIP tower, BLIP-2 or InstructBLIP, or a
            ``PeftModel`` around one; changed in place. docs/chat-models.md lists the differences.
        branch: a model; a folder of `BTAdapterVisionModel.save_pretrained`, or the hub name of one; or a published
            checkpoint. Its trainable part is moved to the tower's device and dtype until `detach`; its own tower is not
            changed. None: no branch; video tokens are the mean of the tower's tokens over the frames, the baseline of
            every comparison, and such a model cannot be saved.
        require_same_tower: False: a branch trained with another CLIP of the same shape, or at another resolution
            (CLIP-L/14 at 224 px for CLIP-L/14-336), is attached with a warning. For the same CLIP at another
            resolution it may stay True: the chat model's position table is used.

    Returns:
        The same chat model.

    Example:
        >>> from transformers import AutoModelForImageTextToText, AutoProcessor
        >>> from bt_adapter import attach
        >>> from bt_adapter.native import make_processor
        >>> model = attach(AutoModelForImageTextToText.from_pretrained("my-llava"), "my-branch")
        >>> processor = make_processor(model, AutoProcessor.from_pretrained("my-llava"))
        >>> parts = [{"type": "video", "path": "clip.mp4"}, {"type": "text", "text": "What is moving?"}]
        >>> inputs = processor.apply_chat_template(
        ...     [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
        ...     return_tensors="pt",
        ... )
        >>> answer = processor.decode(model.generate(**inputs)[0, inputs["input_ids"].shape[1] :])

    Raises:
        TypeError: ``image_chat_model`` or ``branch`` is of an unsupported type.
        FileNotFoundError: there is no such branch.
        ValueError: branch and chat model do not match; the message lists the differences.
    """
    family = family_of(image_chat_model)
    if not isinstance(family.chat, family.model_class):
        raise TypeError(f"image_chat_model must be the whole {family.model_class.__name__}, but is its inner model")
    family.tower()  # TypeError unless it is a CLIP
    with load_offloaded(family):
        if branch is None:
            branch = make_absent_branch(family)
        elif isinstance(branch, (str, os.PathLike)):
            branch = load_branch(branch, family, require_same_tower)
        elif not isinstance(branch, BTAdapterVisionModel):
            found = type(branch).__name__
            raise TypeError(f"branch must be a BTAdapterVisionModel, a folder or a file, but is {found}")
        check_shapes(branch.vision_config, branch.config.depth, family)
        check_values(branch.tower, family, require_same_tower)
    # a branch for stored features has a tower without embeddings
    model = join_tower(family, branch.branch, branch.tower_name) if branch.stored_features else copy_modules(branch)
    model.tower_name = model.tower_name or getattr(family.vision_tower, "name_or_path", None) or None
    if family.why_not_plain() is None:
        share_tower(model.tower, family)

    fields = video_fields(family)  # read before `detach`: they also apply to the new branch
    detach(image_chat_model)
    device, dtype = family.tower_place()
    before = Before(model.branch, _to_freeze(family))
    for parameter in before.frozen:
        parameter.requires_grad_(False)
    model.branch.to(device=device, dtype=dtype).train(family.home.training)
    freeze_unreached(model)
    image_model = to_video_model(family, model.branch, model.tower_name, fields)
    family.home.config.use_branch = not model.branch.is_absent
    family.home.__dict__["_attachment"] = Attachment(family, model, Undo(image_model, before))
    return image_chat_model


def attached_branch(image_chat_model: Any) -> BTAdapterVisionModel:
    """Return the attached branch with its current tower. Raises ValueError when none is attached."""
    return attachment_of(image_chat_model).model()


def detach(image_chat_model: Any) -> Any:
    """Remove the branch and return the image chat model; does nothing when none is attached.

    The chat model and the branch passed to `attach` are restored: dtype, device, training mode and ``requires_grad``.
    Weights that were trained meanwhile keep their new values.
    """
    family = family_of(image_chat_model)
    attachment = find_attachment(family)
    if attachment is not None:
        undo = attachment.undo
        to_image_model(family, image_model_of(family) if undo is None else undo.image_model)
        if undo is not None:
            undo.before.restore()
    return image_chat_model


@contextmanager
def branch_enabled(image_chat_model: Any, enabled: bool = True) -> Iterator[None]:
    """Enable or disable the branch for videos within the context, in the current thread only.

    Without the branch, a video's tokens are the mean over its frames of tower layer L-2's tokens, P patches and CLS:
    ``video_tokens`` less the branch's share, without information about the order of frames. Other threads are not
    affected. The ``use_branch=`` argument of a call takes precedence.
    """
    with attachment_of(image_chat_model).switched(enabled):
        yield


def video_tokens(
    image_chat_model: Any,
    pixel_values: Tensor,
    progress: Progress | None = None,
    long: Long = "average",
    branch: bool | None = None,
) -> Tensor:
    """Encode videos ``[B, T, 3, h, w]`` as tokens before the projector or Q-Former, ``[B, P+1, D]``, CLS last.

    ``family_of(model).project`` converts them into the language model's embeddings. ViP-LLaVA: the tokens of its tower
    layers, concatenated along channels. progress, long: see ``BTAdapterVisionModel.video_tokens``. branch: False:
    without the branch; None: the setting of `branch_enabled`, else of the configuration.
    """
    return attachment_of(image_chat_model).encode(pixel_values, progress, long, branch)


class Before:
    """The state that `attach` changes in its arguments, recorded so that `detach` can restore it.

    Args:
        branch: its parameters are cast, moved and frozen, and its training mode follows the chat model's.
        frozen: parameters of the chat model's tower that required a gradient before.
    """

    def __init__(self, branch: Branch, frozen: list[nn.Parameter]) -> None:
        self.frozen = frozen
        self._modes = [(module, module.training) for module in branch.modules()]
        # the data too, because a narrower dtype rounds the values
        self._parameters = [(p, p.data, p.requires_grad) for p in branch.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the changes. A parameter trained meanwhile keeps its new values, in its former dtype."""
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


class Undo(NamedTuple):
    """The image chat model's class data and the recorded state that `detach` restores."""

    image_model: ImageModel
    before: Before


def _to_freeze(family: Family) -> list[nn.Parameter]:
    """List the tower parameters that require a gradient; none where PEFT has chosen the trainable ones."""
    tower = family.vision_tower
    if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in tower.modules()):
        return []
    return [p for p in tower.parameters() if p.requires_grad]


def freeze_unreached(branch: BTAdapterVisionModel) -> None:
    """Freeze the last layer and output heads, which video tokens do not use: DDP would wait for their gradients."""
    last = branch.config.depth - 1
    unreached = (f"temporal.{last}.", f"spatial.{last}.", "output_gate", "alignment_head.")
    for name, parameter in branch.branch.named_parameters():
        if name.startswith(unreached):
            parameter.requires_grad_(False)
