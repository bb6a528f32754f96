"""A branch attached to an image chat model, which then takes videos (arXiv 2309.15785, section 3.3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bt_adapter.branch import Branch
from bt_adapter.chat.attachment import Attachment, attachment_of, find_attachment
from bt_adapter.chat.branch_files import load_branch
from bt_adapter.chat.families import Family, family_of
from bt_adapter.chat.pairing import absent_branch, beside, check_shapes, check_values, loaded, mirrored, share_tower
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.native.conversion import ImageModel, image_model_of, to_image_model, to_video_model, video_fields
from bt_adapter.progress import Progress
from bt_adapter.time_steps import Long


def attach(
    image_chat_model: Any,
    branch: BTAdapterVisionModel | str | os.PathLike[str] | None,
    require_same_tower: bool = True,
) -> Any:
    """Make an image chat model a video chat model, in place and over the same weights.

    The model becomes this package's class for its family (``bt_adapter.native``): it takes ``pixel_values_videos``
    beside ``pixel_values``, and transformers' own ``save_pretrained`` and ``from_pretrained`` write and read it with
    its branch. ``bt_adapter.native.make_processor`` makes the processor that goes with it. Videos may also come as
    ``pixel_values`` of ``[V, T, 3, h, w]``, or mixed with stills as `Visuals`, in the places of image tokens.

    A video becomes as many tokens whatever T is (``family_of(model).video_length``): ``video_tokens`` through the
    model's own projector or Q-Former. Stills and text are answered as before, bit for bit. The chat model's vision
    tower serves the branch too, frozen. What learns is registered as ``bt_adapter`` in the chat model (LLaVA-like: in
    its ``model``): it follows ``to`` and ``train`` and is among ``parameters()``; what video tokens never reach (the
    branch's last layer, its output gate and alignment head) is frozen. `detach` takes it off.

    Whatever is put into or around the tower or the branch later is heeded: adapters of PEFT (``modules_to_save=
    ["bt_adapter"]`` trains a copy of the branch, and that copy runs), hooks, quantised, offloaded or sharded layers.
    Such layers are called, where plain ones are computed from their weights, which is faster. Gradients reach the
    adapters; where the tower's own weights or the pixels are asked for a gradient, they get one.

    Args:
        image_chat_model: LLaVA-1.5, LLaVA-NeXT or ViP-LLaVA with a CLIP tower, BLIP-2 or InstructBLIP, or a
            ``PeftModel`` around one; changed in place. docs/chat-models.md says what differs.
        branch: a model; a folder of `BTAdapterVisionModel.save_pretrained`, or the hub name of one; or a published
            checkpoint. Its learned part is moved to the tower's device and dtype until `detach`; its own tower is left
            alone. None: no branch; videos are the mean over their frames of the tower's tokens, the baseline of every
            comparison, and such a model cannot be saved.
        require_same_tower: False: a branch trained beside another CLIP of the same shape, or at another resolution
            (CLIP-L/14 at 224 px beside CLIP-L/14-336), is attached with a warning. For the same CLIP at another
            resolution it may stay True: the chat model's position table serves.

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
        TypeError: ``image_chat_model`` is none of these, or ``branch`` nothing of the above.
        FileNotFoundError: there is no such branch.
        ValueError: branch and chat model do not match; the message lists in what.
    """
    family = family_of(image_chat_model)
    if not isinstance(family.chat, family.model_class):
        raise TypeError(f"image_chat_model must be the whole {family.model_class.__name__}, but is its inner model")
    family.tower()  # TypeError unless it is a CLIP
    with loaded(family):
        if branch is None:
            branch = absent_branch(family)
        elif isinstance(branch, (str, os.PathLike)):
            branch = load_branch(branch, family, require_same_tower)
        elif not isinstance(branch, BTAdapterVisionModel):
            found = type(branch).__name__
            raise TypeError(f"branch must be a BTAdapterVisionModel, a folder or a file, but is {found}")
        check_shapes(branch.vision_config, branch.config.depth, family)
        check_values(branch.tower, family, require_same_tower)
    # a branch of stored features has a tower without embeddings
    model = beside(family, branch.branch, branch.tower_name) if branch.stored_features else mirrored(branch)
    model.tower_name = model.tower_name or getattr(family.vision_tower, "name_or_path", None) or None
    if family.why_not_plain() is None:
        share_tower(model.tower, family)

    fields = video_fields(family)  # they hold for another branch too
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
    """The attached branch with its tower, as they are now. Raises ValueError when none is attached."""
    return attachment_of(image_chat_model).model()


def detach(image_chat_model: Any) -> Any:
    """Take the branch off and give back the image chat model; does nothing when none is attached.

    The chat model is as before `attach`, and so is the branch that was given to it: its dtype, device, mode and what
    asks for gradients. What was learnt meanwhile stays in the branch.
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
    """Within the context, and in its thread alone, videos go through the branch or (False) past it.

    Past it, a video's tokens are the mean over its frames of tower layer L-2's tokens, P patches and CLS: what
    ``video_tokens`` is made of but for the branch, and what an image model without any sense of time can see. Other
    threads see the branch as before. A call's own ``use_branch=`` comes before it.
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
    """Tokens of videos ``[B, T, 3, h, w]`` before the projector or Q-Former, ``[B, P+1, D]``, CLS last.

    ``family_of(model).project`` makes the language model's embeddings of them. ViP-LLaVA: the tokens of its tower
    layers side by side. progress, long: as for ``BTAdapterVisionModel.video_tokens``. branch: False: past the branch;
    None: as `branch_enabled`, or else the configuration, says.
    """
    return attachment_of(image_chat_model).encode(pixel_values, progress, long, branch)


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


class Undo(NamedTuple):
    """What `detach` puts back."""

    image_model: ImageModel
    before: Before


def _to_freeze(family: Family) -> list[nn.Parameter]:
    """Parameters of the chat model's tower that ask for a gradient; none where PEFT has chosen what learns in it."""
    tower = family.vision_tower
    if any(hasattr(module, "base_layer") or hasattr(module, "modules_to_save") for module in tower.modules()):
        return []
    return [p for p in tower.parameters() if p.requires_grad]


def freeze_unreached(branch: BTAdapterVisionModel) -> None:
    """Video tokens run neither the branch's last layer nor what reads its end: DDP would wait for their gradients."""
    last = branch.config.depth - 1
    unreached = (f"temporal.{last}.", f"spatial.{last}.", "output_gate", "alignment_head.")
    for name, parameter in branch.branch.named_parameters():
        if name.startswith(unreached):
            parameter.requires_grad_(False)
