"""Triton's interpreter made stricter and made to count: for tests and for ``bench/traffic.py``.

Set ``TRITON_INTERPRET=1`` before Triton is imported; kernels then run on CPU tensors, one program after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np

SECTOR = 32  # bytes: the unit a GPU's memory is read in


def make_strict() -> None:
    """Multiply bfloat16 by value, round to float8, and fill what a masked load leaves undefined with NaN or 77.

    The interpreter multiplies the raw bits of bfloat16, loses the carry of a mantissa rounded to float8, and gives
    zeros where a load is masked and has no ``other``, so that a kernel relying on what a GPU leaves undefined would
    pass.
    """
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, "bt_strict", False):
        return
    dot, load, convert = builder.create_dot, builder.create_masked_load, builder.create_fp_to_fp

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint16).astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return dot(self, widened(a), widened(b), *rest)

    def create_fp_to_fp(self, source, kind, rounding):
        if kind.scalar != tl.float8e4nv or source.dtype.scalar != tl.float32:
            return convert(self, source, kind, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)

    def create_masked_load(self, ptrs, mask, other, *rest, **named):
        if other is None and ptrs.data.size > 1:  # the interpreter drops a scalar's other=0
            element = ptrs.get_element_ty()
            kind = interpreter._get_np_dtype(element)
            undefined = np.full(ptrs.data.shape, np.nan if np.issubdtype(kind, np.floating) else 77, dtype=kind)
            if element == tl.bfloat16:
                undefined = np.full(ptrs.data.shape, 0x7FC0, dtype=kind)
            other = interpreter.TensorHandle(undefined, element)
        return load(self, ptrs, mask, other, *rest, **named)

    builder.create_dot, builder.create_masked_load, builder.create_fp_to_fp = (
        create_dot,
        create_masked_load,
        create_fp_to_fp,
    )
    builder.bt_strict = True


@dataclass
class Traffic:
    """Bytes that programs asked for, and the distinct sectors behind them (what reaches memory if the cache holds)."""

    requested: int = 0
    _read: list[np.ndarray] = field(default_factory=list)
    _written: list[np.ndarray] = field(default_factory=list)

    @property
    def distinct(self) -> int:
        """Bytes in distinct sectors, read ones and written ones counted apart."""
        lists = (self._read, self._written)
        return sum(SECTOR * len(np.unique(np.concatenate(each))) for each in lists if each)

    def add(self, pointers: np.ndarray, mask: np.ndarray, size: int, written: bool) -> None:
        """Count the elements of one load or store that are not masked."""
        pointers = np.broadcast_to(pointers, np.broadcast_shapes(pointers.shape, mask.shape))[
            np.broadcast_to(mask, np.broadcast_shapes(pointers.shape, mask.shape)).astype(bool)
        ]
        self.requested += pointers.size * size
        (self._written if written else self._read).append(np.unique(pointers.astype(np.int64) // SECTOR))


@contextmanager
def counted(inside: Callable[[], AbstractContextManager] = nullcontext) -> Iterator[list[Traffic]]:
    """Count loads, stores and atomics; a :class:`Traffic` for each launch, in order. ``inside`` is entered while a
    kernel runs."""
    from triton.runtime import interpreter

    from bt_kernels import _triton

    builder = interpreter.InterpreterBuilder
    plain = {
        name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }
    launches: list[Traffic] = []

    def bytes_of(pointers) -> int:
        return max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def load(self, pointers, mask, *rest):
        launches[-1].add(pointers.data, mask.data, bytes_of(pointers), written=False)
        return plain["create_masked_load"](self, pointers, mask, *rest)

    def store(self, pointers, value, mask, *rest):
        launches[-1].add(pointers.data, mask.data, bytes_of(pointers), written=True)
        return plain["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self, op, pointers, value, mask, *rest):
        for written in (False, True):
            launches[-1].add(pointers.data, mask.data, bytes_of(pointers), written)
        return plain["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    @contextmanager
    def around():
        launches.append(Traffic())
        with inside():
            yield

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    _triton.around_launch = around
    try:
        yield launches
    finally:
        _triton.around_launch = nullcontext
        for name, function in plain.items():
            setattr(builder, name, function)
