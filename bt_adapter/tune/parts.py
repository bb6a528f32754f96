"""What learns: chosen, written and read back. Nothing else of a chat model is touched."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn

from bt_adapter.chat.attach import attached_branch, freeze_unreached
from bt_adapter.chat.families import family_of
from bt_adapter.checkpoint import CheckpointError, load_exactly, read_safetensors, save_model
from bt_adapter.errors import CommandError
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.tune import ABOUT
from bt_adapter.tune.recipe import TuneRecipe

FORMAT = 1
_PEFT = "base_model.model."  # what PEFT puts before the names of the model it wraps
FILES = {
    "projector": "projector.safetensors",
    "branch": "branch/model.safetensors",
    "lora": "lora/adapter_model.safetensors",
}


class Learned(nn.ModuleDict):
    """The parts of a chat model that learn, by name, in float32 unless the model is in float64.

    All else is frozen and computes as in evaluation mode: nothing drops out but in the adapters and the branch.

    Args:
        chat: with a branch attached; adapters are put into its language model where they learn.
        recipe: which parts, and the adapters' sizes.

    Raises:
        CommandError: no layer has a name of ``target_modules``, or a package is missing.
    """

    def __init__(self, chat: Any, recipe: TuneRecipe) -> None:
        super().__init__()
        chat.requires_grad_(False).eval()
        family = family_of(chat)
        self.model = [attached_branch(chat)]  # in a list: the frozen tower is no part of this module
        if "projector" in recipe.learn:
            self["projector"] = _wide(projector_of(chat)).requires_grad_(True)
        if "branch" in recipe.learn:
            branch = _wide(self.model[0].branch).requires_grad_(True).train()
            freeze_unreached(self.model[0])
            self["branch"] = branch
        if "lora" in recipe.learn:
            self.inside = name_inside(chat, family.language_model)
            self["lora"] = add_adapters(chat, family.language_model, recipe)
            for name, module in self["lora"].named_modules():
                module.training = "lora_dropout" in name  # not the layers they stand in, whose own would drop out too
        if recipe.gradient_checkpointing:
            language_model: Any = family.language_model
            name = "activation_checkpointing_enable"  # newer transformers'; the other one warns there
            enable = getattr(language_model, name, language_model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            _train_checkpointed(language_model)

    def learning(self, part: str) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of a part that learn."""
        return [(name, p) for name, p in self[part].named_parameters() if p.requires_grad]

    def groups(self, recipe: TuneRecipe) -> list[dict[str, Any]]:
        """Optimizer groups, one a part, with its learning rate."""
        return [
            {"params": [p for _, p in self.learning(part)], "lr": recipe.rate_of(part), "name": part} for part in self
        ]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the parts and ``tuned.json`` into a folder that nobody reads yet."""
        folder.mkdir(parents=True, exist_ok=True)
        if "projector" in self:
            own = self["projector"].state_dict()
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in own.items()}
            (folder / FILES["projector"]).write_bytes(save(state, metadata={"format": "pt"}))
        if "branch" in self:
            save_model(self.model[0], folder / "branch")
        if "lora" in self:
            save_adapters(self["lora"], self.inside, folder / "lora", str(about.get("model", "")))
        about = {"format": FORMAT, "parts": list(self)} | about
        (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Read back what :meth:`save` wrote.

        Raises:
            CheckpointError: a file is missing or damaged, or does not fit.
        """
        check_files(folder, list(self))
        if "projector" in self:
            load_exactly(self["projector"], read_safetensors(folder / FILES["projector"]), str(folder))
        if "branch" in self:
            stored = read_safetensors(folder / FILES["branch"])
            state = {name.removeprefix("branch."): tensor for name, tensor in stored.items()}
            load_exactly(self["branch"], state, str(folder))
        if "lora" in self:
            from peft import set_peft_model_state_dict

            stored = read_safetensors(folder / FILES["lora"])
            own = {name.replace(f"{_PEFT}{self.inside}.", _PEFT, 1): tensor for name, tensor in stored.items()}
            found: Any = set_peft_model_state_dict(self["lora"], own)
            if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
                raise CheckpointError(f"{folder / FILES['lora']} does not fit the language model's adapters")


def projector_of(chat: Any) -> nn.Module:
    """What turns visual tokens into the language model's: the projector, or what follows a Q-Former."""
    inner = getattr(chat, "model", chat)
    for name in ("multi_modal_projector", "language_projection"):
        for owner in (inner, chat):
            if isinstance(found := getattr(owner, name, None), nn.Module):
                return found
    raise CommandError(f"--learn projector: {type(chat).__name__} has no projector")


def add_adapters(chat: Any, language_model: nn.Module, recipe: TuneRecipe) -> Any:
    """Fresh adapters in a language model's layers, by PEFT; the model that is handed over has them from then on."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CommandError("--learn lora needs the package peft: pip install 'bt-adapter[train]'") from error
    names = recipe.target_modules
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # by which PEFT knows what it wraps
        if getattr(chat, mark, False):
            setattr(language_model, mark, True)
    config = LoraConfig(
        r=recipe.lora_r, lora_alpha=cast(int, recipe.lora_alpha), lora_dropout=recipe.lora_dropout,
        target_modules=names if names == "all-linear" else names.split(","),
    )  # fmt: skip
    try:
        return get_peft_model(cast(Any, language_model), config)
    except ValueError as error:
        raise CommandError(f"--target-modules {names}: {error}") from error


def name_inside(chat: nn.Module, part: nn.Module) -> str:
    """Name of a part of a chat model, as ``model.language_model``."""
    return next(name for name, module in chat.named_modules() if module is part)


def save_adapters(adapters: Any, inside: str, folder: Path, model: str) -> None:
    """Write adapters of a language model as a PEFT folder of the chat model as a whole.

    ``PeftModel.from_pretrained(chat_model, folder)`` puts them where they were. Layers are named in full: the vision
    tower has some of the same short names.

    Args:
        adapters: the language model, as `add_adapters` returned it. inside: its name in the chat model.
        folder: made where it is missing. model: name of the chat model, which PEFT notes.
    """
    from peft import get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = sorted(
        f"{inside}.{name.removeprefix(_PEFT)}"
        for name, module in adapters.named_modules()
        if isinstance(module, BaseTunerLayer)
    )
    tensors = get_peft_model_state_dict(adapters, save_embedding_layers=False)
    state = {name.replace(_PEFT, f"{_PEFT}{inside}.", 1): t.detach().cpu().contiguous() for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config = copy.copy(adapters.peft_config[adapters.active_adapter])
    config.target_modules, config.base_model_name_or_path, config.inference_mode = set(layers), model, True
    config.save_pretrained(os.fspath(folder))


def branch_fingerprint(model: BTAdapterVisionModel) -> dict[str, float] | None:
    """Lengths of some of a branch's weights, which tell one from another in any precision; None: there is no branch."""
    if model.branch.is_absent:
        return None
    weights = dict(model.branch.named_parameters())
    layers = ("temporal.0.fc.weight", "temporal.0.attention.out_proj.weight", "spatial.0.fc1.weight")
    chosen = ("cls_token", "time", *layers)
    return {name: weights[name].detach().float().norm().item() for name in chosen if name in weights}


def check_files(folder: Path, parts: Sequence[str]) -> None:
    """Raise CheckpointError naming the parts whose files are not there."""
    if lacking := [FILES[part] for part in parts if not (folder / FILES[part]).is_file()]:
        raise CheckpointError(f"{folder} lacks {', '.join(lacking)} of the parts it was tuned in: {', '.join(parts)}")


def _train_checkpointed(language_model: nn.Module) -> None:
    """Put into training mode what runs again in backward, which it does in no other; none of it drops out."""
    for module in language_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def _wide(module: nn.Module) -> nn.Module:
    """In float32 at least."""
    dtype = next(module.parameters()).dtype
    return module.to(torch.promote_types(dtype, torch.float32))
