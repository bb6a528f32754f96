"""Loads the evaluated model, a tower with or without a branch, and its text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bt_adapter.errors import CommandError
from bt_adapter.eval.text_tower import published_text
from bt_adapter.files import digest
from bt_adapter.mini import weights_folder
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.checkpoint import name_of_tower
from bt_adapter.model.config import BTAdapterConfig
from bt_adapter.model.published import load_reference_checkpoint
from bt_adapter.model.published_files import read_tensors
from bt_adapter.towers.hugging_face import branch_path
from bt_adapter.towers.image_models import read_tower
from bt_adapter.towers.text import TextEncoder, load_clip


@dataclass(frozen=True)
class Stack:
    """A video model and its text encoder.

    Attributes:
        model: on the CPU, float32, in evaluation mode.
        text: text encoder of the same embedding space.
        branch: the branch runs; if False, the frozen tower's frame embeddings are averaged.
        clip: name of the CLIP. source: folder or file of the branch; None: no branch.
        fingerprint: hash of the tensors in use and their configuration, 32 characters.
    """

    model: BTAdapterVisionModel
    text: TextEncoder
    branch: bool
    clip: str
    source: str | None
    fingerprint: str


def load_stack(clip: str | None, branch: str | None, use_branch: bool = True) -> Stack:
    """Load a video model and its text encoder.

    Args:
        clip: "mini", a hub name or a folder: the CLIP of the branch. None: the CLIP that the branch names, or "mini"
            without a branch and for a published file.
        branch: a folder of save_pretrained, or a published checkpoint. The latter contains its own tower and, from
            pretraining, its own text tower: only the CLIP's tokenizer (for a CLIP checkpoint also its configuration)
            is then used. None: the shipped branch, for "mini".
        use_branch: False: no branch is needed; the tower of a given one is used.

    Raises:
        CommandError: no branch is given, it is for chat only, or its tensors do not fit.
        OSError: a file or folder is missing.
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
            f"--branch {branch} gives embeddings of width {model.vision_config.projection_dim}, but the text encoder "
            f"of --clip {clip} of width {text.width}; give the CLIP that the branch was trained with"
        )
    return Stack(model, text, use_branch, clip, branch, fingerprint(model, use_branch))


def _clip_of(branch: str | None) -> str:
    """Return the CLIP that a saved branch names. Raises CommandError if it names none."""
    if branch is None or Path(branch).is_file():  # a published file contains its own tower
        return "mini"
    try:
        name = name_of_tower(branch)
    except ValueError as error:
        raise CommandError(f"--branch {branch}: {error}") from error
    if name is None:
        raise CommandError(f"--clip is missing, and --branch {branch} names none: give the CLIP it was trained with")
    return name


def _load_branch(branch: str, clip: Any, text: TextEncoder) -> tuple[BTAdapterVisionModel, TextEncoder]:
    branch = str(branch_path(branch))
    if Path(branch).is_dir():
        model = BTAdapterVisionModel.from_pretrained(branch, clip=clip, share=True)
    else:
        tensors = read_tensors(branch)
        eva = any(name.removeprefix("backbone.").startswith("blocks.") for name in tensors)
        config = None if eva else read_tower(clip).config  # an EVA checkpoint defines its tower completely
        model = load_reference_checkpoint(tensors, config, clip)
        text = published_text(tensors, text)
    if model.chat_only:
        raise CommandError(
            f"--branch {branch} is for chat only: it lacks the last branch layer, so it gives no video embedding"
        )
    return model, text


def fingerprint(model: BTAdapterVisionModel, branch: bool = True) -> str:
    """Hash tensors and configuration of the tower and, if it runs, of the branch to 32 hexadecimal characters."""
    configs = {"tower": model.vision_config.to_dict(), "branch": model.config.to_dict() if branch else None}

    def chunks() -> Iterator[bytes | memoryview]:
        yield json.dumps(configs, sort_keys=True).encode()
        for name, tensor in sorted(model.state_dict().items()):
            if branch or not name.startswith("branch."):
                yield f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
                yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return digest(chunks(), 32, "sha256")
