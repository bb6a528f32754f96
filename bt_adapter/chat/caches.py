"""Keys and values kept between the turns of a conversation, and whether they can be cut back to an earlier place."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

_WHOLE = (DynamicLayer, StaticLayer)
_SLIDING = (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


def make_cache(config: Any, limit: int | None = None) -> Any:
    """An empty cache for a language model.

    Args:
        config: of the language model. limit: tokens of a cache of fixed size; None: one that grows.
    """
    if limit is not None:
        return StaticCache(config=config, max_cache_len=limit)
    own = DynamicCache(config=config)
    # A sliding window keeps all tokens here, so that it can be cut back; other kinds of layers need their own cache.
    return DynamicCache() if all(type(layer) in (*_WHOLE, *_SLIDING) for layer in own.layers) else own


def keeps_all(config: Any) -> bool:
    """Whether the cache of a language model of this configuration keeps every token in every layer.

    Then padding may stand between tokens: nothing depends on how far apart their places in the cache are.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def can_crop(cache: Any) -> bool:
    """Whether every layer still holds all of its tokens, so that the last of them can be taken off.

    A sliding window that was filled has dropped tokens which an earlier place needs, and a recurrent state cannot go
    back.
    """
    for layer in cache.layers:
        if type(layer) in _SLIDING:
            window = layer.sliding_window if hasattr(layer, "sliding_window") else layer.max_cache_len
            if layer.get_seq_length() >= window:
                return False
        elif type(layer) not in _WHOLE:
            return False
        if isinstance(layer, StaticLayer) and "crop" not in vars(StaticLayer):  # of transformers before 5.18
            return False
    return True
