"""Limits of the temporal_attention kernels on GPUs, which hold whole sequences in a tile of rows."""

import torch

from bt_kernels._native import why_not_cuda_kernel
from bt_kernels._triton import architecture, why_not_without_float64


def why_not_cuda(qkv, *visible) -> str | None:
    """Return why the CUDA kernel cannot run a call, or None."""
    if qkv.device.type != "cuda" or not visible:
        return why_not_cuda_kernel(qkv)
    slots, width = visible[-1], qkv.shape[4]
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, got {qkv.dtype}"
    if slots is None:
        return "takes regular grids, got the ragged form"
    if slots > 64:
        return f"takes at most 64 slots, got {slots}"
    if width % 8 or not 8 <= width <= 128:
        return f"takes heads of a width that is a multiple of 8 up to 128, got {width}"
    return why_not_cuda_kernel(qkv)  # last: it loads the library


def why_not_triton(qkv, *visible) -> str | None:
    """Return why the Triton kernel cannot run a call, or None."""
    reason = why_not_without_float64(qkv)
    if reason is not None or not visible:
        return reason
    *_, frames, slots = visible
    limit = longest(qkv.dtype, qkv.shape[4])
    if slots is None and qkv.shape[4] > 64 and qkv.device.type == "cuda" and architecture(qkv.device) < 90:
        limit = min(limit, 64)  # ragged tiles of 128 rows spill there
    if rows_needed(frames, slots) > limit:
        form, most, got = ("ragged sequences", limit // 2, frames) if slots is None else ("sequences", limit, slots)
        return f"takes {form} of at most {most} tokens in {qkv.dtype} at this width, got {got}"
    return None


def rows_needed(frames: int, slots: int | None) -> int:
    """Return the rows that a tile needs: one sequence, or two for the ragged form, whose tiles overlap."""
    return 2 * frames if slots is None else slots


def longest(dtype: torch.dtype, width: int) -> int:
    """Return the rows of the largest tile that compiles without spills on every target (``bench/resources.py``)."""
    if dtype != torch.float32:
        return 128
    return 64 if width <= 64 else 32
