"""KV caches of conversations: making one, and testing whether it can be cropped."""

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
    """Make an empty KV cache for a language model.

    Args:
        config: configuration of the language model. limit: size of a static cache in tokens; None: a growing cache.
    """
    if limit is not None:
        return StaticCache(config=config, max_cache_len=limit)
    cache = DynamicCache(config=config)
    # Layers with a sliding window get a full cache here, so that it can be cropped; other kinds need their own cache.
    return DynamicCache() if all(type(layer) in (*_WHOLE, *_SLIDING) for layer in cache.layers) else cache


def keeps_all(config: Any) -> bool:
    """Whether the KV cache of a language model with this configuration keeps every token in every layer.

    If so, padding may be placed between tokens: nothing depends on their distance in the cache.
    """
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def can_crop(cache: Any) -> bool:
    """Whether every layer still holds all of its tokens, so that the last tokens can be removed.

    A full sliding window has dropped tokens that an earlier position needs, and a recurrent state cannot be reverted.
    """
    for layer in cache.layers:
        if type(layer) in _SLIDING:
            window = layer.sliding_window if hasattr(layer, "sliding_window") else layer.max_cache_len
            if layer.get_seq_length() >= window:
                return False
        elif type(layer) not in _WHOLE:
            return False
        if isinstance(layer, StaticLayer) and "crop" not in vars(StaticLayer):  # transformers before 5.18
            return False
    return True
