"""Quantise language models to 4 or 8 bits with bitsandbytes or torchao, if installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

Quantize = Literal["nf4", "int8"]


class QuantizeError(RuntimeError):
    """Raised when no installed package supports the requested quantisation."""


def quantization(kind: Quantize, kept: Sequence[str]) -> Any:
    """Make the ``quantization_config`` of ``from_pretrained`` for the language model's linear layers only.

    kept: full names of the modules that are not quantised (transformers matches prefixes of names). "nf4":
    bitsandbytes, 4 bits, products in bfloat16. "int8": bitsandbytes, or torchao if only torchao is installed.

    Raises:
        ValueError: another ``kind``. QuantizeError: no package that supports it is installed.
    """
    if kind not in ("nf4", "int8"):
        raise ValueError(f"quantize must be 'nf4' or 'int8', but is {kind!r}")
    import torch
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if _installed("bitsandbytes"):
        if kind == "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.bfloat16,
                llm_int8_skip_modules=list(kept),
            )
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(kept))
    if kind == "int8" and _installed("torchao"):
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=list(kept))
    wanted = "bitsandbytes" if kind == "nf4" else "bitsandbytes or torchao"
    raise QuantizeError(f"quantize {kind} needs {wanted}, which is not installed: pip install bitsandbytes")


def is_quantized(model: Any) -> bool:
    """Whether a model was loaded in 4 or 8 bits."""
    return getattr(model, "quantization_method", None) is not None


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
