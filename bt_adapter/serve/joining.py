"""A batch of answers that further prompts join between two tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bt_adapter.chat.caches import keeps_all, make_cache
from bt_adapter.chat.conversation import Visual, batch_prompts
from bt_adapter.chat.families import family_of
from bt_adapter.serve.rows import Row, run_rows

Prompt = tuple[list[int], Sequence[Visual]]
# Generation settings that look back at the tokens of one call of ``generate``, with the values that change nothing.
_HISTORY: dict[str, tuple[Any, ...]] = {
    "min_new_tokens": (None, 0), "min_length": (None, 0), "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0), "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0), "bad_words_ids": (None,), "sequence_bias": (None,),
    "exponential_decay_length_penalty": (None,), "forced_bos_token_id": (None,), "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None, []), "stop_strings": (None,), "max_time": (None,), "watermarking_config": (None,),
}  # fmt: skip


def can_join(model: Any) -> bool:
    """Tell whether prompts can join a running batch of a model with the answers that they would get alone.

    Its cache must keep all tokens of all layers, so that padding may be added on the left at any time, and its
    generation settings must not depend on the tokens generated before.
    """
    config = model.config.get_text_config(decoder=True)
    settings = family_of(model).generator.generation_config
    plain = all(getattr(settings, name, values[0]) in values for name, values in _HISTORY.items())
    return plain and not config.is_encoder_decoder and keeps_all(config)


class OpenBatch:
    """Answers that are generated together. Prompts that join are padded on the left, as those of its beginning are.

    Between two runs it has the KV cache of all tokens but the last of each row.

    Args:
        model: a video chat model, see `can_join`. tokenizer: its tokenizer. prompts: as for ``answer_batch``.
        rows: the answer to each.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], rows: Sequence[Row]) -> None:
        self.model, self.tokenizer, self.rows = model, tokenizer, list(rows)
        self._embeds, self._mask, cache = batch_prompts(model, prompts)
        self._cache = make_cache(model.config.get_text_config(decoder=True)) if cache is None else cache

    @torch.no_grad()
    def run(self, stops: Callable[[], bool]) -> bool:
        """Generate until all answers have ended, or ``stops``, called after each token of each, returns True.

        Returns whether it was stopped; rows that have ended are then gone, and others may be added.
        """
        stopped = run_rows(self.model, self.tokenizer, self._embeds, self._mask, self._cache, self.rows, stops)
        if stopped:
            self._drop_ended()
        return stopped

    @torch.no_grad()
    def add(self, others: OpenBatch) -> None:
        """Add the answers of another batch of the same model that was stopped after a token."""
        masks = self._mask[:, :-1], others._mask[:, :-1]
        length = max(mask.shape[1] for mask in masks)
        for layer, new in zip(self._cache.layers, others._cache.layers, strict=True):
            layer.keys = torch.cat([_lengthen(layer.keys, length), _lengthen(new.keys, length)])
            layer.values = torch.cat([_lengthen(layer.values, length), _lengthen(new.values, length)])
        self.rows += others.rows
        mask = torch.cat([pad(mask, (length - mask.shape[1], 0)) for mask in masks])
        self._continue(mask, torch.cat([self._embeds[:, -1], others._embeds[:, -1]]))

    def _drop_ended(self) -> None:
        """Keep the rows that go on, and the columns that one of them needs."""
        kept = [place for place, row in enumerate(self.rows) if row.finish is None]
        self.rows = [self.rows[place] for place in kept]
        length = int(self._cache.get_seq_length())
        mask = pad(self._mask, (0, length - self._mask.shape[1]), value=1)[kept]
        begin = int(mask.argmax(1).min())
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[kept, :, begin:], layer.values[kept, :, begin:]
        tokens = torch.tensor([row.last for row in self.rows], device=mask.device)
        self._continue(mask[:, begin:], family_of(self.model).input_embeddings(tokens))

    def _continue(self, mask: Tensor, last: Tensor) -> None:
        """Set the input of the next run. mask: of the cached tokens ``[B, S]``. last: embeddings to run, ``[B, E]``."""
        self._mask = pad(mask, (0, 1), value=1)
        self._embeds = last.new_zeros(*self._mask.shape, last.shape[-1])  # what is cached is not read
        self._embeds[:, -1] = last


def _lengthen(states: Tensor, length: int) -> Tensor:
    """Pad keys or values ``[B, H, S, D]`` on the left to ``length`` tokens."""
    return pad(states, (0, 0, length - states.shape[2], 0))
