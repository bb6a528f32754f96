"""Whether a branch and a chat model's tower belong together, and making their towers one."""

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

from bt_adapter.branch import Branch
from bt_adapter.chat.families import Family
from bt_adapter.config import BTAdapterConfig, TowerConfig
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.tower import Tower

# a tower stored in half precision differs by rounding alone: at most 2^-8 of the largest value
_ROUNDING = 2**-7
# programs that enlarge a position table differ in how (edges, smoothing), the picture stays
_INTERPOLATION = 2**-3


def check_shapes(mine: TowerConfig, depth: int, family: Family) -> None:
    """Raise a ValueError listing what keeps a branch beside the tower ``mine`` from standing beside the chat model's.

    Another ``image_size`` is not in the list: a branch has no table of places, its tower's serves.
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
    """Raise a ValueError where the tower beside which a branch was trained holds other values than the chat model's.

    ``require_same_tower`` False: a warning in its place. Another resolution of the same CLIP (all weights the same, the
    position table enlarged bicubically) is told by a warning too.
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
            f"branch was trained beside another CLIP than image_chat_model's: the vision towers have one shape but "
            f"other values ({shown}{more} of {len(off)} tensors differ{size_note})",
            require_same_tower,
        )
    elif at:
        warnings.warn(
            f"branch and image_chat_model have the same CLIP at another resolution{at}: the chat model's position "
            "table is the bicubic enlargement of the branch's and serves both",
            stacklevel=3,
        )


def mismatch(message: str, require_same_tower: bool) -> None:
    """Another tower: an error, or a warning where the caller said so."""
    if require_same_tower:
        raise ValueError(f"{message}; require_same_tower=False (--other-tower) attaches it all the same")
    warnings.warn(f"{message}; its answers may be worse than beside its own", stacklevel=4)


def distances(tower: Tower, theirs: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor both towers have, in units of the largest value."""
    found = {}
    for name, mine in tower.named_parameters():
        name = in_whole_tower(name, tower.first_layer)
        if name in theirs and not mine.is_meta:
            found[name] = _distance(mine, theirs[name])
    return found


def in_whole_tower(name: str, first_layer: int) -> str:
    """Name of a tensor in the whole tower; a tower of stored features counts its own layers from 0."""
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
    """A position table ``[1+P, D]``, CLS first, for another number of patches: bicubic, ``[length, D]``."""
    before, after = (round((n - 1) ** 0.5) for n in (len(position), length))
    grid = position[1:].T.unflatten(1, (before, before))[None]
    new = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([position[:1], new[0].flatten(1).T])


def share_tower(tower: Tower, family: Family) -> None:
    """Make the chat model's tower tensors ``tower``'s own. What the chat model lacks stays as it is."""
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
    tower.shared_from = _where_they_lie(family)


def is_shared(tower: Tower, family: Family) -> bool:
    """Whether the chat model's tower still holds the very tensors that `share_tower` found, where they were."""
    return tower.shared_from == _where_they_lie(family)


def _where_they_lie(family: Family) -> list[tuple[int, int, torch.dtype, torch.device]]:
    """Of each parameter of the chat model's tower: which it is, and where its numbers are; ``to`` moves them."""
    named = family.vision_tower.named_parameters(remove_duplicate=False)
    return [(id(p), p.data_ptr(), p.dtype, p.device) for _, p in named if not p.is_meta]


@contextmanager
def loaded(family: Family) -> Iterator[None]:
    """Within the context, what accelerate offloaded of the chat model's tower is there to be read."""
    with ExitStack() as stack:
        for module in family.vision_tower.modules():
            if hasattr(module, "_hf_hook"):
                from accelerate.utils import align_module_device

                stack.enter_context(align_module_device(module))
        yield


def beside(family: Family, branch: Branch, tower_name: str | None = None) -> BTAdapterVisionModel:
    """A model of ``branch`` (the same parameters) beside the chat model's tower, for video tokens alone.

    Where the chat model's tower must be called (`Family.why_not_plain`), this model's own tower stays without weights.
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


def absent_branch(family: Family) -> BTAdapterVisionModel:
    """What stands in the place of a branch in a chat model that has none: it never runs and cannot be saved."""
    branch = Branch(family.tower_config, BTAdapterConfig(depth=2, alignment_head=False), 1)
    branch.is_absent = True
    return beside(family, branch)


def mirrored(source: BTAdapterVisionModel) -> BTAdapterVisionModel:
    """A model of the same parameters in other modules, but for the branch, which is the same module.

    So its tower can be given other weights and ``source`` keeps its own.
    """
    model: BTAdapterVisionModel = copy.copy(source)
    model._modules = {**source._modules, "tower": _mirrored(source.tower)}
    tower = model.tower
    if tower._recorded is not None:
        tower._recorded = type(tower._recorded)()  # graphs read the weights they were recorded with
    return model


def _mirrored(module: Any) -> Any:
    mirror = copy.copy(module)
    mirror._parameters, mirror._buffers = dict(module._parameters), dict(module._buffers)
    mirror._modules = {name: child and _mirrored(child) for name, child in module._modules.items()}
    if module._compiled_call_impl is not None:  # which a copy leaves out
        mirror.compile()
    return mirror
