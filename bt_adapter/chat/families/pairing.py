"""Check that a branch fits a chat model's vision tower, and make both share the tower's weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_adapter.chat.families import Family
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.branch import Branch
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.tower import Tower

# a tower stored in half precision differs only by rounding: at most 2^-8 of the largest value
_ROUNDING = 2**-7
# programs that enlarge a position table treat edges and smoothing differently, so its values differ a little
_INTERPOLATION = 2**-3


def check_shapes(mine: TowerConfig, depth: int, family: Family) -> None:
    """Raise a ValueError that lists the differences if a branch for the tower ``mine`` does not fit the chat model's.

    Another ``image_size`` is accepted, because a branch uses the position embeddings of the tower.
    """
    theirs = family.tower_config
    if mine.is_eva != theirs.is_eva:
        kinds = {True: "an EVA-CLIP", False: "a CLIP"}
        raise ValueError(f"branch belongs to {kinds[mine.is_eva]} tower, image_chat_model has {kinds[theirs.is_eva]}")
    wrong = replace(mine, image_size=theirs.image_size).differences(theirs)
    if wrong:
        if mine.image_size != theirs.image_size:
            wrong.append(f"image_size {mine.image_size} against {theirs.image_size}")
        left = " (its files leave the last layer out)" if family.layers_removed else ""
        raise ValueError(f"branch does not fit image_chat_model's vision tower{left}: {', '.join(wrong)}")
    if depth < 2:
        raise ValueError(f"branch has depth {depth}; video tokens need 2 or more")
    if mine.num_hidden_layers - 1 not in family.feature_layers:
        raise ValueError(
            f"image_chat_model takes its image tokens after layers {list(family.feature_layers)} of "
            f"{mine.num_hidden_layers} (vision_feature_layer); a branch fits models that take them after the last but "
            f"one, {mine.num_hidden_layers - 1}"
        )


def check_values(tower: Tower, family: Family, require_same_tower: bool) -> None:
    """Raise a ValueError if the weights of the tower that a branch was trained with differ from the chat model's.

    ``require_same_tower`` False: warn instead. The same CLIP at another resolution (equal weights, position table
    enlarged bicubically) also causes a warning.
    """
    theirs, config = family.tower()
    size, trained = config.image_size, tower.config.image_size
    at = f" (trained at {trained} px, used at {size})" if size != trained else ""
    off = distances(tower, theirs)
    limit = {name: _INTERPOLATION if name == "position" and at else _ROUNDING for name in off}
    wrong = sorted((name for name in off if not off[name] <= limit[name]), key=off.__getitem__, reverse=True)
    if wrong:
        shown = ", ".join(f"{name} by {off[name]:.2g} of its largest value" for name in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        size_note = f"; image_size {trained} against {size}" if at else ""
        mismatch(
            f"branch was trained with another CLIP than image_chat_model's: the vision towers have the same shape but "
            f"other values ({shown}{more} of {len(off)} tensors differ{size_note})",
            require_same_tower,
        )
    elif at:
        warnings.warn(
            f"branch and image_chat_model have the same CLIP at another resolution{at}: the chat model's position "
            "table is the bicubic enlargement of the branch's and is used for both",
            stacklevel=3,
        )


def mismatch(message: str, require_same_tower: bool) -> None:
    """Raise an error for a different tower, or warn if the caller accepts one."""
    if require_same_tower:
        raise ValueError(f"{message}; require_same_tower=False (--no-require-same-tower) attaches it anyway")
    warnings.warn(f"{message}; its answers may be worse than with its own tower", stacklevel=4)


def distances(tower: Tower, theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Compute the largest difference of each tensor that both towers have, relative to its largest value."""
    found = {}
    for name, mine in tower.named_parameters():
        name = in_whole_tower(name, tower.first_layer)
        if name in theirs and not mine.is_meta:
            found[name] = _distance(mine, theirs[name])
    return found


def in_whole_tower(name: str, first_layer: int) -> str:
    """Return a tensor's name in the full tower; a tower for stored features numbers its layers from 0."""
    if first_layer and name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"layers.{int(layer) + first_layer}.{rest}"
    return name


@torch.no_grad()
def _distance(mine: Tensor, theirs: Tensor) -> float:
    if mine is theirs:
        return 0.0
    mine = mine.to(theirs.device, torch.float32)
    if mine.shape != theirs.shape:
        mine = enlarge(mine, len(theirs))
    return ((mine - theirs.float()).abs().max() / mine.abs().max().clamp(min=1e-6)).item()


def enlarge(position: Tensor, length: int) -> Tensor:
    """Resize a position table ``[1+P, D]``, CLS first, to another number of patches bicubically: ``[length, D]``."""
    before, after = (round((n - 1) ** 0.5) for n in (len(position), length))
    grid = position[1:].T.unflatten(1, (before, before))[None]
    new = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], new[0].flatten(1).T])


def share_tower(tower: Tower, family: Family) -> None:
    """Let ``tower`` share the chat model's tower tensors. Tensors that the chat model lacks are not changed."""
    tensors, config = family.tower()
    mine = dict(tower.named_parameters(remove_duplicate=False))
    removed = [f"layers.{config.num_hidden_layers + i}." for i in range(family.layers_removed)]
    unneeded = ("projection", "final_norm", *removed)
    if lacking := [name for name in mine if name not in tensors and not name.startswith(unneeded)]:
        raise ValueError(f"image_chat_model's vision tower lacks {', '.join(lacking)}")
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        if name in mine:
            parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            setattr(tower.get_submodule(path), leaf, parameter)
    tower.config = replace(tower.config, image_size=config.image_size)
    tower.shared_from = _storage_of(family)


def is_shared(tower: Tower, family: Family) -> bool:
    """Whether the chat model's tower still holds the tensors that `share_tower` shared, in the same memory."""
    return tower.shared_from == _storage_of(family)


def _storage_of(family: Family) -> list[tuple[int, int, torch.dtype, torch.device]]:
    """Return the identity, data pointer, dtype and device of each tower parameter; ``to`` changes the pointers."""
    named = family.vision_tower.named_parameters(remove_duplicate=False)
    return [(id(p), p.data_ptr(), p.dtype, p.device) for _, p in named if not p.is_meta]


@contextmanager
def load_offloaded(family: Family) -> Iterator[None]:
    """Load the tower weights that accelerate has offloaded, for the duration of the context."""
    with ExitStack() as stack:
        for module in family.vision_tower.modules():
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


def join_tower(family: Family, branch: Branch, tower_name: str | None = None) -> BTAdapterVisionModel:
    """Build a model of ``branch`` (sharing its parameters) and the chat model's tower, only for video tokens.

    If the chat model's tower must be called (`Family.why_not_plain`), this model's own tower has no weights.
    """
    with torch.device("meta"):
        model = BTAdapterVisionModel(family.tower_config, branch.config, chat_only=True)
    for _ in range(family.layers_removed):
        del model.tower.layers[-1]
    if "final_norm.weight" not in family.tower()[0]:
        del model.tower.final_norm
    model.tower.config = replace(model.tower.config, image_size=family.tower_config.image_size)
    if family.why_not_plain() is None:
        share_tower(model.tower, family)
    model.branch = branch
    model.tower_name = tower_name
    return model.train(branch.training)


def make_absent_branch(family: Family) -> BTAdapterVisionModel:
    """Make the placeholder for a chat model without a branch; it never runs and cannot be saved."""
    branch = Branch(family.tower_config, BTAdapterConfig(depth=2, alignment_head=False), 1)
    branch.is_absent = True
    return join_tower(family, branch)


def copy_modules(source: BTAdapterVisionModel) -> BTAdapterVisionModel:
    """Copy a model's tower modules, sharing all parameters; the branch stays the same module.

    The copy's tower can then be given other weights without changing ``source``.
    """
    model: BTAdapterVisionModel = copy.copy(source)
    model._modules = {**source._modules, "tower": _copy_module(source.tower)}
    tower = model.tower
    if tower.graphs is not None:
        tower.graphs = type(tower.graphs)()  # CUDA graphs read the weights they were recorded with
    return model


def _copy_module(module: Any) -> Any:
    copied = copy.copy(module)
    copied._parameters, copied._buffers = dict(module._parameters), dict(module._buffers)
    copied._modules = {name: child and _copy_module(child) for name, child in module._modules.items()}
    if module._compiled_call_impl is not None:  # `copy.copy` leaves it out
        copied.compile()
    return copied
