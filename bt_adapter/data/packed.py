"""Stores many small objects in memory that worker processes share."""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Iterable
from multiprocessing import reduction
from typing import Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Packed(Generic[Item]):
    """A sequence in one block of shared memory, so that workers do not copy millions of objects.

    A worker that receives it maps the same memory. The block is a memfd and does not count against ``/dev/shm``, whose
    size containers limit. Each access unpickles the item again.
    """

    _file: int | None = None

    def __init__(self, items: Iterable[Item]) -> None:
        parts = [pickle.dumps(item, pickle.HIGHEST_PROTOCOL) for item in items]
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        file = os.memfd_create("packed")
        with os.fdopen(os.dup(file), "wb") as out:
            out.write(ends.tobytes())
            out.writelines(parts)
        self._map(file, len(parts))

    def _map(self, file: int, count: int) -> None:
        self._file, self._ends = file, np.empty(0, np.int64)
        if count:
            self._memory = mmap.mmap(file, 0, prot=mmap.PROT_READ)
            self._ends = np.frombuffer(self._memory, np.int64, count)

    def __reduce__(self) -> tuple:
        assert self._file is not None
        return _received, (reduction.DupFd(self._file), len(self))

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> Item:
        first = self._ends.nbytes
        start = int(self._ends[number - 1]) if number else 0
        return pickle.loads(self._memory[first + start : first + int(self._ends[number])])


def _received(file: reduction.DupFd, count: int) -> Packed:  # type: ignore[valid-type]
    packed: Packed = Packed.__new__(Packed)
    packed._map(file.detach(), count)  # type: ignore[attr-defined]
    return packed
