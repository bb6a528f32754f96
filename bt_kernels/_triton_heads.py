"""Helpers of the Triton kernels of both attentions: rows of one head, of width E, are split into E0 + E1 columns.

A width that is not a power of two is split (88: 64 + 32 columns) instead of padded to the next power.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def read(at, valid, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Load columns [0, E0) and [E0, E) of rows; if E ≤ E0, the second result is the first again."""
    e0, e1 = tl.arange(0, E0)[None, :], E0 + tl.arange(0, E1)[None, :]
    if E < E0:
        x0 = tl.load(at[:, None] + e0, mask=valid[:, None] & (e0 < E), other=0.0)
    else:
        x0 = tl.load(at[:, None] + e0, mask=valid[:, None], other=0.0)
    x1 = x0
    if E > E0:
        x1 = tl.load(at[:, None] + e1, mask=valid[:, None] & (e1 < E), other=0.0)
    return x0, x1


@triton.jit
def read_one(at, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Load a single row as :func:`read` does, in float32: [1, E0] and [1, E1]."""
    e0, e1 = tl.arange(0, E0)[None, :], E0 + tl.arange(0, E1)[None, :]
    x0 = tl.load(at + e0, mask=e0 < E, other=0.0).to(tl.float32)
    x1 = tl.load(at + e1, mask=e1 < E, other=0.0).to(tl.float32)
    return x0, x1


@triton.jit
def write(at, valid, x0, x1, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    e0, e1 = tl.arange(0, E0)[None, :], E0 + tl.arange(0, E1)[None, :]
    kind = at.dtype.element_ty
    tl.store(at[:, None] + e0, x0.to(kind), mask=valid[:, None] & (e0 < E))
    if E > E0:
        tl.store(at[:, None] + e1, x1.to(kind), mask=valid[:, None] & (e1 < E))


@triton.jit
def product(a0, a1, b0, b1, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Compute a·bᵀ over all columns."""
    out = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SPLIT:
        out = tl.dot(a1, tl.trans(b1), out, input_precision=PRECISION)
    return out


@triton.jit
def product_with_one(a0, a1, b0, b1, SPLIT: tl.constexpr):
    """Compute :func:`product` with a single row b: [rows of a]."""
    out = tl.sum(a0.to(tl.float32) * b0, 1)
    if SPLIT:
        out += tl.sum(a1.to(tl.float32) * b1, 1)
    return out


def cut_columns(tensors) -> dict:
    """Return compile-time constants of a kernel on ``tensors`` [..., H, E]: split of the columns, unit of strides."""
    width = tensors[0].shape[-1]
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else 16
    # Strides are passed in units of 8 elements where possible: Triton only recognises multiples of 16 itself, and would
    # read rows of 88 elements in pieces of 16 bits.
    unit = 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1
    precision = "ieee" if tensors[0].dtype == torch.float32 else "tf32"
    return dict(E=width, E0=first, E1=rest, PRECISION=precision, UNIT=unit)


def cut_strides(tensor, columns: dict) -> list[int]:
    """Return all strides except the last, in units of ``columns["UNIT"]``."""
    return [stride // columns["UNIT"] for stride in tensor.stride()[:-1]]
