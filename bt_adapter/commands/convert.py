"""``bt-adapter convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from bt_adapter.errors import CommandError


@dataclass(frozen=True)
class Convert:
    """Turn a published LLaVA v1 (LLaVA-7B-v1.1) into a folder that transformers and ``bt-adapter chat`` read."""

    model: Positional[Annotated[Path, arg(metavar="FOLDER")]]
    """Published folder: config.json, tokenizer, pytorch_model*.bin or model*.safetensors."""
    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """Folder to write. A stopped conversion resumes when it is started again."""
    clip: str | None = None
    """Folder or hub name of the model's CLIP; default: the one config.json names."""
    base: Path | None = None
    """Folder of the LLaMA, where the model is published as the difference of its weights to it."""
    projector: Path | None = None
    """File of instruction tuning with the projector (mm_projector.bin); its tensors replace the model's."""
    branch: Path | None = None
    """File of the branch (btadapter_weight.bin, or of pretraining); written to OUT/branch, for chat --branch."""
    trained_frames: int | None = None
    """Frames of the videos the branch was trained with; default: 8 for a file of pretraining, 100 for one of the
    branch alone."""
    gates: Path | None = None
    """Pretraining file that --branch was tuned from: it has the gates between tower and branch, which tuning lacks."""


def run(command: Convert) -> int:
    """Check the options, then convert. Returns the exit code."""
    if command.trained_frames is not None and (command.trained_frames < 1 or command.branch is None):
        raise CommandError(f"--trained-frames must be above 0 and goes with --branch, got {command.trained_frames}")
    for name in ("model", "base", "projector", "branch", "gates"):
        path = getattr(command, name)
        if path is not None and not path.exists():
            label = "FOLDER" if name == "model" else f"--{name}"
            kind = "file" if name in ("projector", "branch", "gates") else "folder"
            raise CommandError(f"{label} {path}: there is no such {kind}")
    if command.gates is not None and command.branch is None:
        raise CommandError("--gates is for a --branch that was tuned without its gates, and none is given")
    from bt_adapter.chat.convert.run import Sources, convert
    from bt_adapter.progress import make_console, progress_bar, say

    notes = make_console(stderr=True)
    sources = Sources(
        command.model, command.clip, command.base, command.projector, command.branch,
        gates=command.gates, trained_frames=command.trained_frames,
    )  # fmt: skip
    with progress_bar(notes, "converting") as progress:
        out = convert(sources, command.out, progress)
    for path in sorted(out.iterdir()):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        say(notes, f"{size / 1e6:10.1f} MB  {path.name}{'' if path.is_file() else '/'}")
    return 0
