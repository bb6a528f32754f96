"""One row of a batch that is generated: its own length, end, sampling, and streamed text."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from bt_adapter.chat.conversation import Visual, WordStreamer, batch_prompts, generate
from bt_adapter.chat.families import family_of

Finish = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class Decoding:
    """How one answer is generated.

    most: longest answer in tokens. temperature: 0 for greedy decoding. top_p: share of the probability that is sampled
    from. seed: of the sampling; None: another draw each time. stop: texts that end the answer and are not part of it.
    """

    most: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Sampler:
    """Draws tokens from a row's distribution, independently of the other rows of its batch."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding, self.generator = decoding, torch.Generator()
        if decoding.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(decoding.seed)

    def __call__(self, scores: Tensor) -> Tensor:
        """Perturb scores ``[V]`` so that their largest is a draw (the Gumbel-max trick)."""
        scores = scores.float() / self.decoding.temperature
        if self.decoding.top_p < 1:
            ordered, order = scores.softmax(-1).sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.decoding.top_p  # the first token is always kept
            scores = scores.index_fill(0, order[outside], -torch.inf)
        noise = torch.empty(scores.shape).exponential_(generator=self.generator)
        return scores - noise.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


class AnswerText:
    """An answer's text as it grows, without white space at its ends and without what follows a stop text.

    on_text: called with each new piece; the pieces together are the answer.
    """

    def __init__(self, stop: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.stop, self.on_text = stop, on_text
        self.said, self._held, self._stopped = "", "", False

    def add(self, piece: str) -> bool:
        """Add text. Returns whether a stop text was found; what follows it is dropped."""
        if self._stopped:
            return True
        self._held += piece
        found = [place for text in self.stop if (place := self._held.find(text)) >= 0]
        if found:
            self._held = self._held[: min(found)]
            self._stopped = True
            self.end()
            return True
        self._say(len(self._held) - self._begun())
        return False

    def end(self) -> None:
        """Say what was held back in case a stop text would follow."""
        self._say(len(self._held))
        self._held = ""

    def _begun(self) -> int:
        """Return the length of the longest end of the text that may be the beginning of a stop text."""
        held = len(self._held)
        lengths = (n for text in self.stop for n in range(1, min(len(text), held + 1)) if self._held.endswith(text[:n]))
        return max(lengths, default=0)

    def _say(self, length: int) -> None:
        text = self._held[:length] if self.said else self._held[:length].lstrip()
        new = text.rstrip()
        self._held = text[len(new) :] + self._held[length:]
        if new:
            self.said += new
            self.on_text(new)


class Row:
    """The answer to one prompt of a batch.

    Args:
        tokenizer: of the model. ends: ids of the tokens that end an answer. decoding: see `Decoding`.
        on_text, on_end: called with each new piece of text, and at the end, in the thread that generates.
        cancelled: ends the answer at its next token when set.

    Attributes:
        tokens: number generated, with the one that ended the answer. finish: why the answer ended; None: it has not.
        first: time of the first token, in seconds of ``time.perf_counter``. last: id of the last token.
    """

    def __init__(
        self,
        tokenizer: Any,
        ends: Collection[int],
        decoding: Decoding,
        on_text: Callable[[str], None],
        on_end: Callable[[Row], None],
        cancelled: threading.Event,
    ) -> None:
        self.ends, self.decoding, self.on_end, self.cancelled = ends, decoding, on_end, cancelled
        self.sampler = Sampler(decoding) if decoding.temperature > 0 else None
        self.answer = AnswerText(decoding.stop, on_text)
        self._words = WordStreamer(tokenizer, self._hear)
        self._words.next_tokens_are_prompt = False
        self.tokens, self.finish, self.first = 0, None, None  # type: int, Finish | None, float | None
        self.last = -1

    def put(self, token: int) -> None:
        """Add a generated token; none is taken after the end."""
        if self.finish is not None:
            return
        self.first = self.first or time.perf_counter()
        self.tokens += 1
        self.last = token
        if token in self.ends:
            self._end("stop")
            return
        self._words.put(torch.tensor([token]))
        if self.finish is None and self.cancelled.is_set():
            self._end("cancelled")
        elif self.finish is None and self.tokens >= self.decoding.most:
            self._end("length")

    def close(self) -> None:
        """End the answer where the model stopped generating, if it has not ended before."""
        if self.finish is None:
            self._end("stop")

    def _end(self, finish: Finish) -> None:
        self._words.end()
        if self.finish is None:  # the last word may have brought a stop text
            self.answer.end()
            self._finish(finish)

    def _hear(self, text: str) -> None:
        if self.finish is None and self.answer.add(text):
            self._finish("stop")

    def _finish(self, finish: Finish) -> None:
        self.finish = finish
        self.on_end(self)


@torch.no_grad()
def generate_rows(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]], rows: Sequence[Row]
) -> None:
    """Generate the answers to several prompts in one batch; the rows get the tokens as they come.

    Each answer equals the one generated alone: prompts are padded on the left, and a row's end, sampling and stop texts
    concern that row only. The batch ends when all rows have ended. Prompts are as for ``answer_batch``.
    """
    run_rows(model, tokenizer, *batch_prompts(model, prompts), rows)


@torch.no_grad()
def run_rows(
    model: Any,
    tokenizer: Any,
    embeds: Tensor,
    mask: Tensor,
    cache: Any,
    rows: Sequence[Row],
    stops: Callable[[], bool] = lambda: False,
) -> bool:
    """Generate after the result of ``batch_prompts``, until all rows have ended or are to stop.

    stops: called after each token of each row. Returns whether it stopped the rows, of which some have not ended.
    """
    ended = _Ended(rows, stops)
    further: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([ended])}
    if any(row.sampler is not None for row in rows):
        further["logits_processor"] = LogitsProcessorList([_Sampling(rows)])
    most = max(row.decoding.most - row.tokens for row in rows)
    generate(model, embeds, mask, most, _Streamer(rows), cache, tokenizer, further)
    if not ended.stopped:
        for row in rows:
            row.close()
    return ended.stopped


def end_tokens(model: Any) -> frozenset[int]:
    """Return the ids of the tokens that end a model's answer, and of the padding that follows an end."""
    settings = family_of(model).generator.generation_config
    found: set[int] = set()
    for ids in (settings.eos_token_id, settings.pad_token_id):
        found |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return frozenset(found)


class _Streamer(BaseStreamer):
    """Hands each new token of a batch to its row."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self._begun = rows, False

    def put(self, value: Tensor) -> None:
        """Take the next token of each row, ``[B]``; the first call has the prompt and is skipped."""
        if not self._begun:
            self._begun = True
            return
        for row, token in zip(self.rows, value.tolist(), strict=True):
            row.put(token)

    def end(self) -> None:
        """Take the end of the call, which need not be that of the answers."""


class _Ended(StoppingCriteria):
    """Tells ``generate`` which rows have ended. stops: whether to stop all of them; stopped: they were."""

    def __init__(self, rows: Sequence[Row], stops: Callable[[], bool]) -> None:
        self.rows, self.stops, self.stopped = rows, stops, False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ended = [row.finish is not None for row in self.rows]
        self.stopped = not all(ended) and self.stops()
        return torch.tensor([one or self.stopped for one in ended], device=input_ids.device)


class _Sampling(LogitsProcessor):
    """Perturbs the scores of the rows that are sampled."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = [s if row.sampler is None else row.sampler(s) for row, s in zip(self.rows, scores, strict=True)]
        return torch.stack([one.to(scores.dtype) for one in drawn])
