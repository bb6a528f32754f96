"""The trainable parts of a chat model: chosen, written and read. All other parts stay unchanged."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import nn

from bt_adapter.chat.attach import attached_branch, freeze_unreached
from bt_adapter.chat.families import family_of
from bt_adapter.chat.model_folders import TUNED
from bt_adapter.chat.tuned import FILES, FORMAT, check_files, projector_of
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.model.checkpoint import load_exactly, read_safetensors
from bt_adapter.tune.recipe import TuneRecipe

_PEFT = "base_model.model."  # PEFT's prefix of the names of the model it wraps


class Learned(nn.ModuleDict):
    """The trainable parts of a chat model, by name, in float32 unless the model is in float64.

    Other parts are frozen and in evaluation mode. Dropout acts in the adapters, stochastic depth in the branch.

    Args:
        chat: chat model with a branch attached; its language model gets adapters where the recipe asks for them.
        recipe: which parts are trainable, and the options of the adapters.

    Raises:
        CommandError: no layer has a name of ``target_modules``, or a package is missing.
    """

    def __init__(self, chat: Any, recipe: TuneRecipe) -> None:
        super().__init__()
        chat.requires_grad_(False).eval()
        family = family_of(chat)
        self.model = [attached_branch(chat)]  # in a list: the frozen tower is no part of this module
        if "projector" in recipe.learn:
            self["projector"] = _at_least_float32(projector_of(chat)).requires_grad_(True)
        if "branch" in recipe.learn:
            branch = _at_least_float32(self.model[0].branch).requires_grad_(True).train()
            freeze_unreached(self.model[0])
            self["branch"] = branch
        if "lora" in recipe.learn:
            self.inside = name_inside(chat, family.language_model)
            self["lora"] = add_adapters(chat, family.language_model, recipe)
            for name, module in self["lora"].named_modules():
                module.training = "lora_dropout" in name  # not the wrapped layers, whose dropout stays off
        if recipe.gradient_checkpointing:
            language_model: Any = family.language_model
            name = "activation_checkpointing_enable"  # newer transformers, where the other name warns
            enable = getattr(language_model, name, language_model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            _train_checkpointed(language_model)

    def learning(self, part: str) -> list[tuple[str, nn.Parameter]]:
        """Names and trainable parameters of a part."""
        return [(name, p) for name, p in self[part].named_parameters() if p.requires_grad]

    def groups(self, recipe: TuneRecipe) -> list[dict[str, Any]]:
        """One optimizer group per part, with its learning rate."""
        return [
            {"params": [p for _, p in self.learning(part)], "lr": recipe.rate_of(part), "name": part} for part in self
        ]

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Write the parts and ``tuned.json`` into a folder that is not in use yet."""
        folder.mkdir(parents=True, exist_ok=True)
        if "projector" in self:
            projector = self["projector"].state_dict()
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in projector.items()}
            (folder / FILES["projector"]).write_bytes(save(state, metadata={"format": "pt"}))
        if "branch" in self:
            self.model[0].save_pretrained(folder / "branch")
        if "lora" in self:
            save_adapters(self["lora"], self.inside, folder / "lora", str(about.get("model", "")))
        about = {"format": FORMAT, "parts": list(self)} | about
        (folder / TUNED).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    def load(self, folder: Path) -> None:
        """Load the parts that :meth:`save` wrote.

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
            state = {name.replace(f"{_PEFT}{self.inside}.", _PEFT, 1): tensor for name, tensor in stored.items()}
            found: Any = set_peft_model_state_dict(self["lora"], state)
            if found.unexpected_keys or any("lora_" in name for name in found.missing_keys):
                raise CheckpointError(f"{folder / FILES['lora']} does not fit the language model's adapters")


def add_adapters(chat: Any, language_model: nn.Module, recipe: TuneRecipe) -> Any:
    """Add fresh LoRA adapters to a language model, in place, by PEFT. Returns the PEFT model."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CommandError("--learn lora needs the package peft: pip install 'bt-adapter[train]'") from error
    names = recipe.target_modules
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # by which PEFT chooses its layers
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
    """Name of a submodule of a chat model, as ``model.language_model``."""
    return next(name for name, module in chat.named_modules() if module is part)


def save_adapters(adapters: Any, inside: str, folder: Path, model: str) -> None:
    """Write adapters of a language model as a PEFT folder of the chat model as a whole.

    ``PeftModel.from_pretrained(chat_model, folder)`` loads them. Layers are named in full, because the vision tower has
    some of the same short names.

    Args:
        adapters: the language model, as `add_adapters` returned it. inside: its name in the chat model.
        folder: created if missing. model: name of the chat model, stored in PEFT's configuration.
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


def _train_checkpointed(language_model: nn.Module) -> None:
    """Put layers with gradient checkpointing into training mode, which it needs, and set their dropout to 0."""
    for module in language_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
            for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def _at_least_float32(module: nn.Module) -> nn.Module:
    """Convert a module to float32, unless it is in float64."""
    dtype = next(module.parameters()).dtype
    return module.to(torch.promote_types(dtype, torch.float32))
