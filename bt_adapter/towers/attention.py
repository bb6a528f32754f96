"""Attention within each image, by the library of a given name.

Legend: n images, s tokens of an image, H heads, E head width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k and v, [n, s, H, E] each, to [n, s, H, E]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention by torch's ``scaled_dot_product_attention``."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def find_attention(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    """Return the function of a name.

    Args:
        name: "sdpa", "flash-attn" (https://github.com/Dao-AILab/flash-attention) or "xformers"
            (``memory_efficient_attention``).
        device: device of q, k and v. dtype: their dtype.

    Raises:
        ValueError: the name is unknown, the package cannot be imported, or its function does not support the device or
            the dtype.
    """
    if name == "sdpa":
        return sdpa
    if name not in ("flash-attn", "xformers"):
        raise ValueError(f"attention must be 'sdpa', 'flash-attn' or 'xformers', but is {name!r}")
    if device.type != "cuda":
        raise ValueError(f"attention={name!r} needs the tower on a CUDA device, but it is on {device}")
    if name == "flash-attn" and dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"attention='flash-attn' needs a tower in float16 or bfloat16, but it is in {dtype}")
    try:
        if name == "flash-attn":
            return importlib.import_module("flash_attn").flash_attn_func
        return importlib.import_module("xformers.ops").memory_efficient_attention
    except (ImportError, AttributeError, OSError) as error:  # OSError: a library of another CUDA
        raise ValueError(f"attention={name!r} needs the package {name}, which cannot be imported: {error}") from error
