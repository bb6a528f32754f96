"""A branch attached to an image chat model, which then takes videos (arXiv 2309.15785, section 3.3)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bt_adapter.checkpoint import clip_tensors
from bt_adapter.config import TowerConfig
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.names import to_own
from bt_adapter.progress import Progress
from bt_adapter.published import load_reference_checkpoint


def attach(
    image_chat_model: LlavaForConditionalGeneration, branch: BTAdapterVisionModel | str | os.PathLike[str]
) -> LlavaForConditionalGeneration:
    """Let a LLaVA take videos: ``pixel_values`` of ``[B, T, 3, h, w]`` beside stills of ``[B, 3, h, w]``.

    A video becomes P+1 tokens whatever T is: ``video_tokens`` through the model's own projector, in the place of P+1
    image tokens (`bt_adapter.chat.prompts.expand` puts that many into a prompt). Stills take the path they took
    before, token for token; ``generate`` works unchanged. The chat model's vision tower and the branch's are then one
    set of weights, the chat model's, frozen. What learns is registered as ``model.bt_adapter``: it follows ``to`` and
    ``train`` and is among ``parameters()``; what video tokens never reach (the branch's last layer, its output gate
    and alignment head) is frozen. Save it with ``attached_branch(model).save_pretrained(folder)``: transformers'
    own ``save_pretrained`` writes it too, but its ``from_pretrained`` does not take it back. `detach` takes it off.

    Args:
        image_chat_model: changed in place.
        branch: a model; a folder of `BTAdapterVisionModel.save_pretrained`, or the hub name of one; or a published
            checkpoint. Its learned part is moved to the tower's device and dtype.

    Returns:
        The same chat model.

    Raises:
        TypeError: ``image_chat_model`` is no LLaVA with a CLIP tower, or ``branch`` nothing of the above.
        FileNotFoundError: there is no such branch.
        ValueError: branch and chat model do not match; the message lists in what.
    """
    if not isinstance(image_chat_model, LlavaForConditionalGeneration):
        raise TypeError(
            f"image_chat_model must be a LlavaForConditionalGeneration, but is {type(image_chat_model).__name__}"
        )
    inner = image_chat_model.model
    name, tensors, found = clip_tensors(inner.vision_tower)  # TypeError unless it is a CLIP
    _check_feature_layer(inner)
    attached = inner.__dict__.get("get_image_features")
    before = {p: p.requires_grad for p in inner.vision_tower.parameters()}
    if isinstance(attached, _Features):
        before = attached.asked_gradients
    if isinstance(branch, (str, os.PathLike)):
        branch = _load(branch, inner.vision_tower)
    elif not isinstance(branch, BTAdapterVisionModel):
        raise TypeError(f"branch must be a BTAdapterVisionModel, a folder or a file, but is {type(branch).__name__}")
    _check_shapes(branch, found)
    _share_tower(branch, tensors)
    branch.tower_name = branch.tower_name or name

    detach(image_chat_model)
    inner.vision_tower.requires_grad_(False)
    place = tensors["class_embedding"]
    branch.branch.to(device=place.device, dtype=place.dtype).train(inner.training)
    _freeze_unreached(branch)
    inner.bt_adapter = branch.branch
    inner.get_image_features = _Features(inner, branch, before)
    return image_chat_model


def attached_branch(image_chat_model: LlavaForConditionalGeneration) -> BTAdapterVisionModel:
    """The attached branch with its tower. Raises ValueError when none is attached."""
    return _features(image_chat_model).branch


def detach(image_chat_model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Take the branch off; the chat model is as before `attach`. Does nothing when none is attached."""
    inner = image_chat_model.model
    features = inner.__dict__.get("get_image_features")
    if isinstance(features, _Features):
        for parameter, asked in features.asked_gradients.items():
            parameter.requires_grad_(asked)
        del inner.get_image_features
        del inner.bt_adapter
    return image_chat_model


@contextmanager
def branch_enabled(image_chat_model: LlavaForConditionalGeneration, enabled: bool = True) -> Iterator[None]:
    """Within the context, videos go through the branch or (False) past it.

    Past it, a video's tokens are the mean over its frames of tower layer L-2's tokens, P patches and CLS: what
    ``video_tokens`` is made of but for the branch, and what an image model without any sense of time can see.
    """
    features = _features(image_chat_model)
    before, features.enabled = features.enabled, enabled
    try:
        yield
    finally:
        features.enabled = before


class _Features:
    """Stands in for ``LlavaModel.get_image_features``: videos by the branch, stills by the model's own method."""

    def __init__(self, inner: LlavaModel, branch: BTAdapterVisionModel, before: dict[nn.Parameter, bool]) -> None:
        self.inner, self.branch, self.enabled = inner, branch, True
        self.asked_gradients = before  # of the chat model's tower, for `detach`

    def __call__(
        self, pixel_values: Tensor, *args: Any, progress: Progress | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple:
        if pixel_values.ndim != 5:
            return type(self.inner).get_image_features(self.inner, pixel_values, *args, **kwargs)
        model = self.branch
        encode = model.video_tokens if self.enabled else model.frame_mean_tokens
        tokens = encode(pixel_values, progress=progress)
        projected = self.inner.multi_modal_projector(tokens)
        output: Any = BaseModelOutputWithPooling(last_hidden_state=tokens)
        output.pooler_output = list(projected)  # a list, as LLaVA's own method has it
        return output if kwargs.get("return_dict", True) else output.to_tuple()


def _features(chat: LlavaForConditionalGeneration) -> _Features:
    features = chat.model.__dict__.get("get_image_features")
    if not isinstance(features, _Features):
        raise ValueError("image_chat_model has no branch: attach(image_chat_model, branch) comes first")
    return features


def _load(source: str | os.PathLike[str], tower: nn.Module) -> BTAdapterVisionModel:
    """A branch from disk or the hub; ``tower`` serves where the branch comes alone."""
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise FileNotFoundError(f"branch {source} is not there, and is no hub name (owner/name)")
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(str(source)))  # OSError where there is no such repository, or no network
    if path.is_dir():
        return BTAdapterVisionModel.from_pretrained(path, clip=tower, share=True)
    return load_reference_checkpoint(path, clip=tower)


def _freeze_unreached(branch: BTAdapterVisionModel) -> None:
    """Video tokens run neither the branch's last layer nor what reads its end: DDP would wait for their gradients."""
    last = branch.config.depth - 1
    unreached = (f"temporal.{last}.", f"spatial.{last}.", "output_gate", "alignment_head.")
    for name, parameter in branch.branch.named_parameters():
        if name.startswith(unreached):
            parameter.requires_grad_(False)


def _check_feature_layer(inner: LlavaModel) -> None:
    layer = inner.config.vision_feature_layer
    layers = inner.vision_tower.config.num_hidden_layers
    if layer not in (-2, layers - 1):
        raise ValueError(
            f"image_chat_model takes its image tokens from vision_feature_layer {layer}; a branch fits models that "
            f"take them from the last layer but one (-2) of their {layers}"
        )


def _check_shapes(branch: BTAdapterVisionModel, found: TowerConfig) -> None:
    if branch.stored_features:
        raise ValueError("branch is for stored features and holds no tower embeddings: attach takes a whole one")
    if branch.vision_config.is_eva:
        raise ValueError("branch belongs to an EVA-CLIP tower, but image_chat_model has a CLIP tower")
    wrong = branch.vision_config.differences(found)
    if wrong:
        raise ValueError(f"branch does not fit image_chat_model's vision tower: {', '.join(wrong)}")
    if branch.config.depth < 2:
        raise ValueError(f"branch has depth {branch.config.depth}; video tokens need 2 or more")


def _share_tower(branch: BTAdapterVisionModel, tensors: dict[str, Tensor]) -> None:
    """Make the chat model's tower tensors the branch's. ValueError where they hold another CLIP's values."""
    own = {}
    for published, tensor in tensors.items():
        name = to_own(published, False)
        if name is not None and name.startswith("tower.") and not name.startswith("tower.projection"):
            own[name.removeprefix("tower.")] = tensor
    mine = dict(branch.tower.named_parameters())
    if lacking := [n for n in mine if n not in own and not n.startswith(("projection", "final_norm"))]:
        raise ValueError(f"image_chat_model's vision tower lacks {', '.join(lacking)}")
    off = {n: _distance(mine[n], t) for n, t in own.items() if n in mine}
    worst = max(off, key=off.__getitem__)
    # a tower stored in half precision differs by rounding alone: at most 2^-8 of the largest value
    if off[worst] > 2**-7:
        raise ValueError(
            f"branch was trained on another CLIP than image_chat_model's: the vision towers have one shape but "
            f"other values ({worst} differs by {off[worst]:.2g} of its largest value)"
        )
    for name, tensor in own.items():
        path, _, leaf = name.rpartition(".")
        parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        setattr(branch.tower.get_submodule(path), leaf, parameter.requires_grad_(False))


@torch.no_grad()
def _distance(mine: Tensor, theirs: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    if mine is theirs:
        return 0.0
    mine = mine.to(theirs.device, torch.float32)
    return ((mine - theirs.float()).abs().max() / mine.abs().max().clamp(min=1e-6)).item()
