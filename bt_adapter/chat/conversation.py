"""Conversations about videos and stills: greedy answers with a KV cache that is kept between turns."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from bt_adapter.chat.caches import can_crop, keeps_all, make_cache
from bt_adapter.chat.families import family_of
from bt_adapter.chat.prompts import Turn, conversation_ids

# Limit of a static KV cache: at a model's full context an empty cache could fill a GPU.
_MAX_STATIC = 8192
# Tokens reserved for questions and later answers when videos use as many tokens as fit.
_RESERVE = 512


# Overrides of a model's generation settings that give greedy decoding and a plain tensor of tokens.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None,
    "constraints": None, "force_words_ids": None, "dola_layers": None, "low_memory": None, "guidance_scale": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": None, "token_healing": False,
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "use_cache": True, "cache_implementation": None, "cache_config": None,
    "max_length": None, "prefill_chunk_size": None, "is_assistant": False, "compile_config": None,
}  # fmt: skip


class ContextError(ValueError):
    """Raised when a prompt and the requested length of the answer exceed the model's context."""


@dataclass
class Reply:
    """An answer with its timings and token counts.

    seconds: "first token" (time from the question to it) and "generate" (the rest). prompt: tokens of the whole
    conversation up to the answer; fed: number of those that were run; the KV cache held the rest.
    """

    text: str
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    prompt: int = 0
    fed: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of the tokens after the first."""
        return (self.tokens - 1) / self.seconds["generate"] if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Visual:
    """A video or a still image, encoded for the language model.

    kind: "video" or "image". tokens: ``[n, E]``, E the language model's width. name: shown to the user. reads: for
    models whose visual tokens depend on the question (InstructBLIP), a function from question to tokens; ``tokens``
    then has the right length but no content.
    """

    kind: str
    tokens: Tensor
    name: str = ""
    reads: Callable[[str], Tensor] | None = None

    def for_question(self, question: str) -> Visual:
        """Return the visual with its tokens for a question."""
        return self if self.reads is None else replace(self, tokens=self.reads(question), reads=None)


class Conversation:
    """A conversation about any number of videos and stills.

    Each turn runs only its own tokens; the KV cache holds those of earlier turns. The answers equal those of a fresh
    greedy ``generate`` on the whole conversation. If the chat template writes a past turn differently from the way it
    was generated, the tokens after the difference are run again.

    Args:
        model: a video chat model. processor: its processor.
        static: use a static KV cache of the context's size, at most 8192 tokens. On a GPU, decoding is then compiled
            (at the first turn, which takes minutes).
    """

    def __init__(self, model: Any, processor: Any, static: bool = False) -> None:
        self.model, self.processor, self.static = model, processor, static
        self._limit = min(context(model), _MAX_STATIC) if static else context(model)
        self._whole = context(model)
        self.reset()

    def reset(self) -> None:
        """Discard all turns and visuals."""
        self.turns: list[Turn] = []
        self.visuals: list[Visual] = []
        self._pending = 0  # number of visuals at the end of the list that belong to the next question
        self._cache: Any = None
        self._cached: list[int] = []  # token ids in the cache
        self._used = 0  # tokens of the turns so far, with their visuals

    def add(self, visual: Visual) -> None:
        """Add a video or still to the next question."""
        self.visuals.append(visual)
        self._pending += 1

    def room(self, max_new_tokens: int) -> int:
        """Return how many tokens more videos may use, with space left for an answer of this length and some text."""
        pending = sum(len(visual.tokens) for visual in self.visuals[len(self.visuals) - self._pending :])
        return video_room(self._limit, self._used + pending, max_new_tokens)

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 64, on_text: Callable[[str], None] | None = None) -> Reply:
        """Generate the greedy answer; ``on_text`` is called with each new piece of text.

        Raises PromptError, ContextError; the conversation is then unchanged.
        """
        begin = time.perf_counter()
        known = len(self.visuals) - self._pending
        turn = Turn(question, tuple(visual.kind for visual in self.visuals[known:]))
        visuals = [visual.for_question(question) for visual in self.visuals]
        lengths = [len(visual.tokens) for visual in visuals]
        ids = conversation_ids(self.processor, [*self.turns, turn], lengths)
        check_context(self._limit, len(ids), sum(lengths), max_new_tokens, self._whole)
        kept = self._keep(ids)
        embeds = embed(self.model, ids, visuals)[None]
        streamer = WordStreamer(self.processor.tokenizer, on_text or (lambda text: None))
        try:
            new = generate(
                self.model,
                embeds,
                torch.ones_like(embeds[..., 0], dtype=torch.long),
                max_new_tokens,
                streamer,
                self._cache,
                self.processor.tokenizer,
            )
        except BaseException:  # after an interrupted answer the tokens in the cache are unknown
            self._cache, self._cached = None, []
            raise
        self._cached = (ids + new[0].tolist())[: int(self._cache.get_seq_length())]
        first = streamer.first or time.perf_counter()
        seconds = {"first token": first - begin, "generate": time.perf_counter() - first}
        text = "".join(streamer.text).strip()
        self.turns.append(replace(turn, answer=text))
        self.visuals, self._pending = visuals, 0
        self._used = len(ids) + new.shape[1]
        return Reply(text, streamer.tokens, seconds, len(ids), len(ids) - kept)

    def _keep(self, ids: list[int]) -> int:
        """Crop the cache to its common prefix with these ids; return its length (less than all: one must be run)."""
        most = min(len(ids) - 1, len(self._cached))
        kept = next((i for i in range(most) if ids[i] != self._cached[i]), most)
        config = self.model.config.get_text_config(decoder=True)
        stale = self._cache is None or config.is_encoder_decoder  # an encoder runs on the whole conversation
        if stale or kept == 0 or (kept < len(self._cached) and not can_crop(self._cache)):
            self._cache, kept = make_cache(config, self._limit if self.static else None), 0
        elif kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))  # a negative count removes tokens from the end
        return kept


def context(model: Any) -> int:
    """Return the context length of the language model in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)


def video_room(limit: int, taken: int, max_new_tokens: int) -> int:
    """Return how many tokens of a context of ``limit`` videos may use; may be negative."""
    return limit - taken - max_new_tokens - _RESERVE


def check_context(limit: int, prompt: int, visual: int, max_new_tokens: int, whole: int | None = None) -> None:
    """Raise ContextError, with all counts, if prompt and answer together exceed ``limit`` tokens.

    whole: the model's context, if ``limit`` may be the smaller one of compiled decoding.
    """
    if prompt + max_new_tokens > limit:
        kept = f"the model's context is {limit}"
        if whole is not None and limit < whole:
            kept = f"--compile keeps {limit} of the model's context of {whole}"
        raise ContextError(
            f"the prompt takes {prompt} tokens, {visual} of them for videos and images, and {max_new_tokens} are asked "
            f"for the answer: {prompt + max_new_tokens}, but {kept} (reduce --windows or --max-new-tokens)"
        )


def embed(model: Any, ids: list[int], visuals: Sequence[Visual]) -> Tensor:
    """Embed token ids, with the visuals' tokens at the positions of image tokens: ``[S, E]``."""
    row = torch.tensor([ids], device=model.device)
    return family_of(model).home.put_visuals(row, [visual.tokens for visual in visuals])[0]


def cache_option(model: Any, cache: Any) -> dict[str, Any]:
    """Return the keyword argument that passes a cache to a model's forward; transformers 5 renames it."""
    accepts = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in accepts else "past_key_values": cache}


def generate(
    model: Any,
    embeds: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    streamer: Any = None,
    cache: Any = None,
    tokenizer: Any = None,
    further: Mapping[str, Any] | None = None,
) -> Tensor:
    """Generate greedy tokens after embeddings ``[B, S, E]``; rows that end early are padded. The prompt is left out.

    The model's ``generation_config`` applies as far as it restricts tokens or ends an answer (end tokens,
    ``stop_strings``, penalties, forbidden words). Settings for another search than a greedy one, or another kind of
    result, are overridden.

    tokenizer: required if the model has ``stop_strings``. further: more arguments of the model's ``generate``.
    """
    generator = family_of(model).generator
    settings = generator.generation_config
    options: dict[str, Any] = {name: value for name, value in GREEDY.items() if hasattr(settings, name)}
    options |= {} if cache is None else cache_option(generator, cache)
    if getattr(settings, "stop_strings", None):
        options["tokenizer"] = tokenizer
    if (least := getattr(settings, "min_new_tokens", None)) is not None:
        options["min_new_tokens"] = min(least, max_new_tokens)
    return generator.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **options,
        **(further or {}),
    )


@torch.no_grad()
def answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]], max_new_tokens: int
) -> list[str]:
    """Answer several prompts in one batch, greedily; a prompt is the ids of `conversation_ids` and its visuals.

    All prompts share a prefix: the chat template and a video's token positions. If several prompts have the same video
    (the identical tensor), the prefix is run once per video and its KV cache is used for all of its questions. Shorter
    prompts are padded after the prefix, or on the left if there is none.
    """
    embeds, mask, cache = batch_prompts(model, prompts)
    new = generate(model, embeds, mask, max_new_tokens, cache=cache, tokenizer=tokenizer)
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def batch_prompts(model: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]]) -> tuple[Tensor, Tensor, Any]:
    """Prepare several prompts for one call of `generate`, as `answer_batch` describes.

    Returns:
        Embeddings ``[B, S, E]``, attention mask ``[B, S]``, and the KV cache of the shared prefix or None.
    """
    rows = [embed(model, ids, visuals) for ids, visuals in prompts]
    prefix, cache = _run_prefixes(model, prompts, rows)
    length = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        rest = prefix + length - len(row)
        embeds[i, :prefix], mask[i, :prefix] = row[:prefix], 1
        embeds[i, rest:], mask[i, rest:] = row[prefix:], 1
    return embeds, mask, cache


def _run_prefixes(
    model: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]], rows: Sequence[Tensor]
) -> tuple[int, Any]:
    """Run the prefix that all prompts share, once per distinct set of visuals.

    rows: the prompts' embeddings, ``[S, E]`` each. Returns the length of the prefix in tokens and its KV cache, one row
    per prompt; 0 and None if nothing would be saved, or if the language model's cache does not keep all tokens.
    """
    generator = family_of(model).generator
    config = model.config.get_text_config(decoder=True)
    most = min(len(ids) for ids, _ in prompts) - 1  # one token at least must be run to answer
    columns = enumerate(zip(*(ids[:most] for ids, _ in prompts), strict=True))
    prefix = next((place for place, column in columns if len(set(column)) > 1), most)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, visuals) in enumerate(prompts):
        groups.setdefault(tuple(id(visual.tokens) for visual in visuals), []).append(number)
    if prefix == 0 or len(groups) == len(prompts) or config.is_encoder_decoder or not keeps_all(config):
        return 0, None
    cache = make_cache(config)
    embeds = torch.stack([rows[members[0]][:prefix] for members in groups.values()])
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(generator.forward).parameters else {}
    generator(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(embeds[..., 0], dtype=torch.long),
        use_cache=True,
        **cache_option(generator, cache),
        **options,
    )
    order = {number: place for place, members in enumerate(groups.values()) for number in members}
    cache.batch_select_indices(torch.tensor([order[number] for number in range(len(rows))], device=embeds.device))
    return prefix, cache


class WordStreamer(TextStreamer):
    """A streamer that counts tokens, records the time of the first, and passes text on at word ends."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.tokens = on_text, 0
        self.text: list[str] = []
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:  # the first call has the prompt, which is empty for embeddings
            self.first = self.first or time.perf_counter()
            self.tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text.append(text)
        if text:
            self.on_text(text)
