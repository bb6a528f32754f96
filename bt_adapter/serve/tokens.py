"""A cache of encoded videos and stills, so that a further question neither decodes nor encodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from bt_adapter.chat.watch import EncodedVisual


@dataclass(frozen=True)
class Seen:
    """An encoded video or still with what a client is told about it.

    visual: tokens for the language model. numbers: index of each frame among all frames of the file; empty for a still
    and for frames that came as pictures. size: bytes of the tokens and pictures. pictures: the frames as JPEG files,
    where they are shown.
    """

    visual: EncodedVisual
    numbers: tuple[int, ...]
    size: int
    pictures: tuple[bytes, ...] = ()


class TokenCache:
    """Encoded visuals by digest of their content and choice of frames; the least recently used are dropped.

    It is used by one thread. A visual larger than the whole cache is not stored.

    Args:
        limit: most bytes of tokens held; 0: nothing is stored.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._held: OrderedDict[Hashable, Seen] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Seen | None:
        """Return a stored visual, which becomes the most recently used; None if it is not stored."""
        seen = self._held.get(key)
        if seen is not None:
            self._held.move_to_end(key)
        return seen

    def put(self, key: Hashable, seen: Seen) -> None:
        """Store a visual and drop others until all fit."""
        if seen.size > self.limit:
            return
        old = self._held.pop(key, None)
        self.size += seen.size - (0 if old is None else old.size)
        self._held[key] = seen
        while self.size > self.limit:
            _, dropped = self._held.popitem(last=False)
            self.size -= dropped.size
