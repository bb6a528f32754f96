"""Convert published LLaVA v1 files (LLaVA-7B-v1.1) to a folder of Hugging Face's LLaVA, one file at a time.

The formats differ in the names; the projector, one linear layer (Hugging Face's has two and an activation: the second
becomes the identity, the activation none); the vision tower, which the published files take from CLIP; and the tokens
``<vid_patch>``, ``<vid_start>``, ``<vid_end>``, which the published code adds at loading (``vicuna``).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from bt_adapter.chat.convert.llava_v1 import load_vision_tower, make_config, read_config, save_settings
from bt_adapter.chat.convert.vicuna import PLACE, grow, prepare_tokenizer
from bt_adapter.chat.convert.weight_files import open_weights, weight_files
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.files import remove_unfinished, replace_folder, write_json, write_whole, writing
from bt_adapter.model.published import load_reference_checkpoint
from bt_adapter.progress import Progress

PROJECTOR = "model.multi_modal_projector"
_TABLES = ("model.language_model.embed_tokens.weight", "lm_head.weight")
_RECORD = "sources.json"  # names the sources of an unfinished conversion
_SKIPPED = re.compile(r"rotary_emb\.inv_freq$|^model\.vision_tower\.")


@dataclass(frozen=True)
class Sources:
    """The input files and folders of a conversion.

    Attributes:
        model: folder of the published layout. clip: folder or hub name of its CLIP; None: the one its config names.
        base: folder of the LLaMA to which ``model`` holds the weight differences; None: ``model`` holds full weights.
        projector: a file of instruction tuning (``mm_projector.bin``), whose tensors replace ``model``'s.
        branch: a file of BT-Adapter's branch (``btadapter_weight.bin``, or of pretraining). gates: the pretraining
            file from which a ``branch`` without gates was tuned.
        trained_frames: number of frames ``branch`` was trained with; see `load_reference_checkpoint`.
    """

    model: Path
    clip: str | None = None
    base: Path | None = None
    projector: Path | None = None
    branch: Path | None = None
    trained_frames: int | None = None
    gates: Path | None = None


def hugging_face_name(name: str) -> str | None:
    """Convert a published tensor name; None for tensors that are not needed: rotary tables and a stored tower.

    Raises CheckpointError for a name outside the published layout.
    """
    if _SKIPPED.search(name):
        return None
    if name == "lm_head.weight":
        return name
    if match := re.fullmatch(r"model\.mm_projector\.(weight|bias)", name):
        return f"{PROJECTOR}.linear_1.{match[1]}"
    if re.match(r"model\.(layers\.\d+|embed_tokens|norm)\.", name):
        return f"model.language_model.{name.removeprefix('model.')}"
    raise CheckpointError(f"unexpected tensor {name}: the published layout is LLaMA's with model.mm_projector")


def second_layer(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Make the projector's second layer, the identity."""
    return {
        f"{PROJECTOR}.linear_2.weight": torch.eye(width, dtype=dtype),
        f"{PROJECTOR}.linear_2.bias": torch.zeros(width, dtype=dtype),
    }


def convert(sources: Sources, out: Path, progress: Progress | None = None) -> Path:
    """Write the model's folder: weights, configuration, tokenizer with chat template, image processor, and ``branch/``.

    Everything is written to ``<out>.converting`` and renamed at the end; an interrupted run resumes at the first
    missing file. One source file and one of its output tensors are in memory at a time, and the CLIP at the end. The
    dtype is that of the source's projector.

    Args:
        out: must not exist.
        progress: called with the files done and in total.

    Returns:
        ``out``.

    Raises:
        CheckpointError: a source does not have the published layout; the message names the difference.
        CommandError: ``out`` exists, the source holds differences and no base is given, the projector's file has
            another size, or there is too little disk space.
        OSError: a source does not exist.
    """
    if out.exists():
        raise CommandError(f"{out} already exists; choose another folder")
    files = weight_files(sources.model)
    if sources.base is None and "delta" in sources.model.name.lower():
        raise CommandError(f"{sources.model} holds differences to LLaMA, by its name: give the LLaMA (--base)")
    published = read_config(sources.model)
    tokenizer = AutoTokenizer.from_pretrained(sources.model)
    prepare_tokenizer(tokenizer)
    rows = max(published.get("vocab_size", 0), len(tokenizer))
    reader = _Reader(sources, tokenizer, rows)
    shape, dtype = reader.projector(files)
    reader.check_tuned(shape)
    clip = load_vision_tower(published, sources.clip)
    branch = None  # read before anything is written, so that its errors come early
    if sources.branch is not None:
        branch = load_reference_checkpoint(
            sources.branch, clip.config, clip, sources.trained_frames, gates_from=sources.gates
        )
    config = make_config(published, shape, dtype, rows, tokenizer.convert_tokens_to_ids(PLACE), clip)

    aside = _aside(sources, out, files)
    names = [f"model-{i + 1:05}-of-{len(files) + 1:05}.safetensors" for i in range(len(files) + 1)]
    weight_map: dict[str, str] = {}
    for i, (name, source) in enumerate(zip(names, [*files, None], strict=True)):
        if not (aside / name).is_file():
            _write_tensors(aside / name, _rest(shape[0], dtype, clip) if source is None else reader.tensors(source))
        with open_weights(aside / name) as written:
            weight_map |= dict.fromkeys(written, name)
        if progress is not None:
            progress(i + 1, len(names))
    _check_complete(config, weight_map, reader.tuned)
    total = sum((aside / name).stat().st_size for name in names)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(aside / "model.safetensors.index.json", index)
    save_settings(aside, config, tokenizer, clip)
    if branch is not None:
        branch.save_pretrained(aside / "branch")
    replace_folder(aside, out)
    (out / _RECORD).unlink()
    return out


class _Reader:
    """A reader of source tensors under Hugging Face's names, with base weights added and tuned tensors inserted."""

    def __init__(self, sources: Sources, tokenizer: Any, rows: int) -> None:
        self.sources, self.tokenizer, self.rows = sources, tokenizer, rows
        self.tuned: Mapping[str, Tensor] = {}
        if sources.projector is not None:
            with open_weights(sources.projector) as state:
                self.tuned = {n: t for n, t in state.items() if "btadapter" not in n}
            for name in self.tuned:
                hugging_face_name(name)  # CheckpointError for another kind of file

    def tensors(self, path: Path) -> dict[str, Tensor]:
        """Read all tensors of one file."""
        with ExitStack() as opened:
            state = opened.enter_context(open_weights(path))
            base = self._base(opened)
            result = {}
            for name in state:
                theirs = hugging_face_name(name)
                if theirs is None:
                    continue
                tensor = state[name]
                if name in self.tuned:
                    tensor = self.tuned[name].to(tensor.dtype)
                elif base is not None and (below := _get(base, name)) is not None:
                    tensor = tensor.clone()
                    tensor[: len(below)] += below.to(tensor.dtype)
                if theirs in _TABLES:
                    tensor = grow(tensor, self.tokenizer)
                    if len(tensor) != self.rows:
                        raise CheckpointError(f"{name} has {len(tensor)} rows, expected {self.rows}, one per token")
                result[theirs] = tensor.contiguous()
        return result

    def projector(self, files: list[Path]) -> tuple[torch.Size, torch.dtype]:
        """Return the shape of the projector's weight, ``[W, D]``, and the model's dtype."""
        for path in files:
            with open_weights(path) as state:
                if "model.mm_projector.weight" in state:
                    weight = state["model.mm_projector.weight"]
                    return weight.shape, weight.dtype
        raise CheckpointError(f"{self.sources.model} has no model.mm_projector.weight: not the published layout")

    def check_tuned(self, shape: torch.Size) -> None:
        """Raise CommandError if a tuned tensor does not fit a projector of that shape, ``[W, D]``."""
        for name, tensor in self.tuned.items():
            wanted = list(shape if name == "model.mm_projector.weight" else shape[:1])
            found = list(tensor.shape)
            if hugging_face_name(name) in _TABLES:  # its rows are checked after `grow`
                found = found[1:]
            elif "mm_projector" not in name:
                continue
            if found != wanted:
                raise CommandError(
                    f"--projector {self.sources.projector}: {name} has shape {list(tensor.shape)}, but the model's has "
                    f"{wanted if 'mm_projector' in name else ['rows', *wanted]}"
                )

    def _base(self, opened: ExitStack) -> list[Mapping[str, Tensor]] | None:
        if self.sources.base is None:
            return None
        return [opened.enter_context(open_weights(path)) for path in weight_files(self.sources.base)]


def _get(files: list[Mapping[str, Tensor]], name: str) -> Tensor | None:
    """Find a base tensor; None for the projector, which a file of differences holds in full."""
    return next((state[name] for state in files if name in state), None)


def _aside(sources: Sources, out: Path, files: list[Path]) -> Path:
    """Prepare the temporary folder; it is emptied if an earlier run used other sources."""
    aside = out.with_name(out.name + ".converting")
    read = [*files, *(weight_files(sources.base) if sources.base else ()), *filter(None, [sources.projector])]
    stamps = [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in read]
    about = json.dumps({"sources": {k: str(v) for k, v in vars(sources).items()}, "files": stamps}, indent=2)
    record = aside / _RECORD
    if aside.exists() and (not record.is_file() or record.read_text(encoding="utf-8") != about):
        shutil.rmtree(aside)
    aside.mkdir(parents=True, exist_ok=True)
    remove_unfinished(aside)
    write_whole(record, about)
    needed = sum(f.stat().st_size for f in files) - sum(f.stat().st_size for f in aside.glob("*.safetensors"))
    free = shutil.disk_usage(aside).free
    if needed > free:
        raise CommandError(f"{out} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on that disk")
    return aside


def _rest(width: int, dtype: torch.dtype, clip: CLIPVisionModel) -> dict[str, Tensor]:
    """Make the tensors that the published files lack: the tower and the projector's second layer."""
    tower = {f"model.vision_tower.{n}": t.detach().to(dtype) for n, t in clip.state_dict().items()}
    return tower | second_layer(width, dtype)


def _check_complete(config: LlavaConfig, found: Mapping[str, str], tuned: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        expected = set(LlavaForConditionalGeneration(config).state_dict())
    if unused := sorted(name for name in tuned if hugging_face_name(name) not in found):
        raise CheckpointError(f"the projector's file has {', '.join(unused[:8])}, which the model does not have")
    lacking, unexpected = sorted(expected - set(found)), sorted(set(found) - expected)
    if lacking or unexpected:
        raise CheckpointError(
            f"the files do not make a whole model; missing: {', '.join(lacking[:8]) or 'nothing'}; "
            f"unexpected: {', '.join(unexpected[:8]) or 'nothing'}"
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with writing(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.chmod((path.parent / _RECORD).stat().st_mode)  # save_file lets only the owner read
