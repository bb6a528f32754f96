"""What is evaluated: a tower, perhaps with a branch, and the text encoder it is compared with."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bt_adapter.checkpoint import name_of_tower
from bt_adapter.config import BTAdapterConfig
from bt_adapter.errors import CommandError
from bt_adapter.eval.text_tower import published_text
from bt_adapter.hugging_face import is_hub_name, locate_branch
from bt_adapter.mini import weights_folder
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.published import load_reference_checkpoint
from bt_adapter.published_files import read_tensors
from bt_adapter.text import TextEncoder, load_clip
from bt_adapter.towers import read_tower


@dataclass(frozen=True)
class Stack:
    """A model and what it is compared with.

    Attributes:
        model: on the CPU, float32, evaluation mode.
        text: text encoder of the same space.
        branch: whether the branch runs; without it the frozen tower's frames are averaged.
        clip: its name. source: where the branch came from; None: there is none.
        fingerprint: of the tensors that count and their configuration, 32 characters.
    """

    model: BTAdapterVisionModel
    text: TextEncoder
    branch: bool
    clip: str
    source: str | None
    fingerprint: str


def load_stack(clip: str | None, branch: str | None, use_branch: bool = True) -> Stack:
    """A model and its text encoder.

    Args:
        clip: "mini", a hub name or a folder: the CLIP the branch belongs to. None: the one the branch names, and
            "mini" where no branch, or a published file, is given.
        branch: a folder of save_pretrained, or a published checkpoint, which brings its own tower and, from
            pretraining, its own text tower: the CLIP's tokenizer is then all that counts of it (and for a CLIP
            checkpoint its configuration). None: the shipped branch for "mini".
        use_branch: False: no branch is needed; where one is given, it is its tower that counts.

    Raises:
        CommandError: no branch is given, it is one for chat alone, or its tensors do not fit.
        OSError: something is not there.
    """
    clip = clip or _clip_of(branch)
    try:
        found, text = load_clip(clip)
    except ValueError as error:
        raise CommandError(f"--clip {clip}: {error}") from error
    if branch is None and use_branch:
        if clip != "mini":
            raise CommandError(f"--clip {clip} needs --branch, a branch trained beside it, or --no-branch")
        branch = str(weights_folder("branch"))
    if branch is None:
        model = BTAdapterVisionModel.from_clip(found, BTAdapterConfig(depth=1), share=True).eval()
    else:
        try:
            model, text = _load_branch(branch, found, text)
        except (ValueError, TypeError) as error:
            raise CommandError(f"--branch {branch} with --clip {clip}: {error}") from error
    if model.vision_config.projection_dim != text.width:
        raise CommandError(
            f"--branch {branch} embeds videos in {model.vision_config.projection_dim} numbers, but the text encoder of "
            f"--clip {clip} texts in {text.width}"
        )
    return Stack(model, text, use_branch, clip, branch, fingerprint(model, use_branch))


def _clip_of(branch: str | None) -> str:
    """The CLIP to take where none is named: the one a saved branch names. CommandError where it names none."""
    if branch is None or Path(branch).is_file():  # a published file brings its own tower
        return "mini"
    try:
        name = name_of_tower(branch)
    except ValueError as error:
        raise CommandError(f"--branch {branch}: {error}") from error
    if name is None:
        raise CommandError(f"--clip is missing, and --branch {branch} names none: give the CLIP it was trained beside")
    return name


def _load_branch(branch: str, clip: Any, text: TextEncoder) -> tuple[BTAdapterVisionModel, TextEncoder]:
    branch = str(locate_branch(branch)) if is_hub_name(branch) else branch
    if Path(branch).is_dir():
        model = BTAdapterVisionModel.from_pretrained(branch, clip=clip, share=True)
    else:
        tensors = read_tensors(branch)
        eva = any(name.removeprefix("backbone.").startswith("blocks.") for name in tensors)
        config = None if eva else read_tower(clip).config  # EVA's towers say all of themselves
        model = load_reference_checkpoint(tensors, config, clip)
        text = published_text(tensors, text)
    if model.chat_only:
        raise CommandError(f"--branch {branch} lacks the last branch layer, as files for chat do: it embeds no videos")
    return model, text


def fingerprint(model: BTAdapterVisionModel, branch: bool = True) -> str:
    """32 characters that stand for tensors and configuration of the tower and, where it runs, of the branch."""
    configs = {"tower": model.vision_config.to_dict(), "branch": model.config.to_dict() if branch else None}
    found = hashlib.sha256(json.dumps(configs, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if branch or not name.startswith("branch."):
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
