"""Helpers of the Triton kernels of both attentions on rows of one head.

Rows of width E are split into columns [0, E0) and [E0, E) if E is not a power of two (88: 64 + 32 columns) instead of
being padded to the next one. A value of several rows is a tuple of its one or two parts.
"""

import torch
import triton
import triton.language as tl

from bt_kernels._triton_rows import LENGTHS

LOG2_E = tl.constexpr(1.4426950408889634)
# As LENGTHS: strides in units of UNIT elements, so that their values decide no alignment.
HEAD_LENGTHS = (*LENGTHS, "stride_b", "stride_n", "stride_c", "stride_h", "grad_b", "grad_n", "grad_h")


@triton.jit
def read(at, valid, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Load the rows that start at ``at``, [R]; zeros where they are not ``valid``."""
    columns = tl.arange(0, E0)[None, :]
    if E < E0:
        x = (tl.load(at[:, None] + columns, mask=valid[:, None] & (columns < E), other=0.0),)
    else:
        x = (tl.load(at[:, None] + columns, mask=valid[:, None], other=0.0),)
    if E > E0:
        columns = E0 + tl.arange(0, E1)[None, :]
        x += (tl.load(at[:, None] + columns, mask=valid[:, None] & (columns < E), other=0.0),)  # type: ignore[assignment]
    return x


@triton.jit
def read_one(at, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Load a single row in float32: [1, columns]."""
    columns = tl.arange(0, E0)[None, :]
    x = (tl.load(at + columns, mask=columns < E, other=0.0).to(tl.float32),)
    if E > E0:
        columns = E0 + tl.arange(0, E1)[None, :]
        x += (tl.load(at + columns, mask=columns < E, other=0.0).to(tl.float32),)  # type: ignore[assignment]
    return x


@triton.jit
def write(at, valid, x, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Store rows at ``at``, [R], where they are ``valid``."""
    kind = at.dtype.element_ty
    columns = tl.arange(0, E0)[None, :]
    tl.store(at[:, None] + columns, x[0].to(kind), mask=valid[:, None] & (columns < E))
    if E > E0:
        columns = E0 + tl.arange(0, E1)[None, :]
        tl.store(at[:, None] + columns, x[1].to(kind), mask=valid[:, None] & (columns < E))


@triton.jit
def zeros(R: tl.constexpr, E: tl.constexpr, E0: tl.constexpr, E1: tl.constexpr):
    """Return R rows of zeros in float32."""
    x = (tl.zeros([R, E0], tl.float32),)
    if E > E0:
        x += (tl.zeros([R, E1], tl.float32),)  # type: ignore[assignment]
    return x


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Compute a·bᵀ over all columns."""
    out = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        out = tl.dot(a[i], tl.trans(b[i]), out, input_precision=PRECISION)
    return out


@triton.jit
def product_by_rows(a, b):
    """Compute the product of each row of a with the same row of b, or with the only row of b, in float32: [rows]."""
    out = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        out += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return out


@triton.jit
def add_product(to, weights, x, PRECISION: tl.constexpr):
    """Compute to + weights·x."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (tl.dot(weights, x[i], to[i], input_precision=PRECISION),)  # type: ignore[assignment]
    return out


@triton.jit
def scaled(x, weights):
    """Multiply each row of x, or its only row, by its weight, [rows]."""
    out = ()
    for i in tl.static_range(len(x)):
        out += (x[i] * weights[:, None],)
    return out


def cut_columns(tensors) -> dict:
    """Return compile-time constants of a kernel on ``tensors`` [..., H, E]: split of the columns, unit of strides."""
    width = tensors[0].shape[-1]
    first = max(16, 1 << (width.bit_length() - 1))
    rest = max(16, triton.next_power_of_2(width - first)) if width > first else 16
    # Strides are passed in units of 8 elements where possible, so that reads of 16 bytes are aligned whatever their
    # values: kernels are not compiled anew for multiples of 16, and rows of 88 elements are not read by pieces.
    unit = 8 if all(stride % 8 == 0 for tensor in tensors for stride in tensor.stride()[:-1]) else 1
    precision = "ieee" if tensors[0].dtype == torch.float32 else "tf32"
    return dict(E=width, E0=first, E1=rest, PRECISION=precision, UNIT=unit)


def cut_strides(tensor, columns: dict) -> list[int]:
    """Return all strides except the last, in units of ``columns["UNIT"]``."""
    return [stride // columns["UNIT"] for stride in tensor.stride()[:-1]]
