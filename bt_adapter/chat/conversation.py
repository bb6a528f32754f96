"""Turns about videos and stills: greedy answers, with the language model's keys and values kept from turn to turn."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from bt_adapter.chat.caches import can_crop, keeps_all, make_cache
from bt_adapter.chat.families import family_of
from bt_adapter.chat.prompts import Turn, conversation_ids

# Models made for much longer contexts would else fill a GPU with empty places.
_MOST_STATIC = 8192
# Tokens kept for questions and further answers when videos take as many as fit.
_RESERVE = 512


# Settings of generation that a model's folder may bring, and what makes a greedy search and a plain result of them.
GREEDY: dict[str, Any] = {
    "do_sample": False, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "penalty_alpha": None,
    "constraints": None, "force_words_ids": None, "dola_layers": None, "low_memory": None, "guidance_scale": None,
    "prompt_lookup_num_tokens": None, "assistant_early_exit": None, "use_mtp": None, "token_healing": False,
    "return_dict_in_generate": False, "output_scores": False, "output_logits": False, "output_attentions": False,
    "output_hidden_states": False, "use_cache": True, "cache_implementation": None, "cache_config": None,
    "max_length": None, "prefill_chunk_size": None, "is_assistant": False, "compile_config": None,
}  # fmt: skip


class ContextError(ValueError):
    """A prompt and the answer asked for do not fit into the model's context."""


@dataclass
class Reply:
    """An answer and what it cost.

    seconds: "first token" (from the question to it) and "generate" (the rest). prompt: tokens of the whole conversation
    up to the answer; fed: how many of them had to be run, the rest's keys and values were there.
    """

    text: str
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    prompt: int = 0
    fed: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return (self.tokens - 1) / self.seconds["generate"] if self.tokens > 1 else 0.0


@dataclass(frozen=True)
class Visual:
    """A video or a still as the language model takes it.

    kind: "video" or "image". tokens: ``[n, E]``, E the language model's width. name: what to call it. reads: for models
    whose visual tokens depend on the question that comes with them (InstructBLIP): from question to tokens; ``tokens``
    then only tells how many.
    """

    kind: str
    tokens: Tensor
    name: str = ""
    reads: Callable[[str], Tensor] | None = None

    def asked(self, question: str) -> Visual:
        """As it stands before a question."""
        return self if self.reads is None else replace(self, tokens=self.reads(question), reads=None)


class Conversation:
    """Questions and answers about any number of videos and stills.

    Each turn runs its own tokens alone: those of the turns before are kept as keys and values. The answers are those of
    a fresh greedy ``generate`` on the whole conversation; where a chat template writes a past turn otherwise than it
    was generated, what follows the difference is run again.

    Args:
        model: a video chat model. processor: its own.
        static: keys and values of a fixed size, the context's but at most 8192 tokens: on a GPU decoding is then
            compiled (at the first turn, which takes minutes).
    """

    def __init__(self, model: Any, processor: Any, static: bool = False) -> None:
        self.model, self.processor, self.static = model, processor, static
        self._limit = min(context(model), _MOST_STATIC) if static else context(model)
        self._whole = context(model)
        self.reset()

    def reset(self) -> None:
        """Forget turns and visuals."""
        self.turns: list[Turn] = []
        self.visuals: list[Visual] = []
        self._pending = 0  # visuals at the end of the list that no turn has yet
        self._cache: Any = None
        self._cached: list[int] = []  # whose keys and values the cache holds
        self._taken = 0  # tokens of the turns so far, with their visuals

    def add(self, visual: Visual) -> None:
        """A video or still that comes with the next question."""
        self.visuals.append(visual)
        self._pending += 1

    def room(self, max_new_tokens: int) -> int:
        """Tokens that videos to come may take beside what is there, an answer of so many tokens and some text."""
        pending = sum(len(visual.tokens) for visual in self.visuals[len(self.visuals) - self._pending :])
        return video_room(self._limit, self._taken + pending, max_new_tokens)

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 64, on_text: Callable[[str], None] | None = None) -> Reply:
        """The greedy answer; ``on_text`` is given the text as it comes.

        Raises PromptError, ContextError: the conversation is then as it was before.
        """
        begin = time.perf_counter()
        known = len(self.visuals) - self._pending
        turn = Turn(question, tuple(visual.kind for visual in self.visuals[known:]))
        visuals = [visual.asked(question) for visual in self.visuals]
        lengths = [len(visual.tokens) for visual in visuals]
        ids = conversation_ids(self.processor, [*self.turns, turn], lengths)
        check_context(self._limit, len(ids), sum(lengths), max_new_tokens, self._whole)
        kept = self._keep(ids)
        embeds = embed(self.model, ids, visuals)[None]
        streamer = _Stream(self.processor.tokenizer, on_text or (lambda text: None))
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
        except BaseException:  # an interrupted answer leaves keys and values of no known tokens
            self._cache, self._cached = None, []
            raise
        self._cached = (ids + new[0].tolist())[: int(self._cache.get_seq_length())]
        first = streamer.first or time.perf_counter()
        seconds = {"first token": first - begin, "generate": time.perf_counter() - first}
        text = "".join(streamer.text).strip()
        self.turns.append(replace(turn, answer=text))
        self.visuals, self._pending = visuals, 0
        self._taken = len(ids) + new.shape[1]
        return Reply(text, streamer.tokens, seconds, len(ids), len(ids) - kept)

    def _keep(self, ids: list[int]) -> int:
        """Cut the cache down to what these ids begin with; how many tokens that is (never all: one must be run)."""
        most = min(len(ids) - 1, len(self._cached))
        kept = next((i for i in range(most) if ids[i] != self._cached[i]), most)
        config = self.model.config.get_text_config(decoder=True)
        stale = self._cache is None or config.is_encoder_decoder  # an encoder reads the whole conversation anew
        if stale or kept == 0 or (kept < len(self._cached) and not can_crop(self._cache)):
            self._cache, kept = make_cache(config, self._limit if self.static else None), 0
        elif kept < len(self._cached):
            self._cache.crop(kept - len(self._cached))  # a count below zero: so many off the end
        return kept


def context(model: Any) -> int:
    """Tokens the language model was made for."""
    return int(model.config.get_text_config().max_position_embeddings)


def video_room(limit: int, taken: int, max_new_tokens: int) -> int:
    """Tokens that videos may take of a context of ``limit``; may be below 0."""
    return limit - taken - max_new_tokens - _RESERVE


def check_context(limit: int, prompt: int, visual: int, max_new_tokens: int, whole: int | None = None) -> None:
    """Raise ContextError, naming all counts, where a prompt of so many tokens leaves no room for the answer.

    whole: the model's context, where ``limit`` may be less: what compiled decoding holds.
    """
    if prompt + max_new_tokens > limit:
        kept = f"the model's context is {limit}"
        if whole is not None and limit < whole:
            kept = f"--compile keeps {limit} of the model's context of {whole}"
        raise ContextError(
            f"the prompt takes {prompt} tokens, {visual} of them for videos and images, and {max_new_tokens} are asked "
            f"for the answer: {prompt + max_new_tokens}, but {kept} (fewer --windows or --max-new-tokens take less)"
        )


def embed(model: Any, ids: list[int], visuals: Sequence[Visual]) -> Tensor:
    """``[S, E]``: embeddings of the ids, the visuals' tokens in their places."""
    row = torch.tensor([ids], device=model.device)
    return family_of(model).home.put_visuals(row, [visual.tokens for visual in visuals])[0]


def cache_option(model: Any, cache: Any) -> dict[str, Any]:
    """A cache under the name by which a model's forward takes it; transformers 5 changes it."""
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
) -> Tensor:
    """Greedy tokens after ``[B, S, E]``, without those of the prompt; rows that end early are padded.

    The model's ``generation_config`` counts where it says which tokens may come and where an answer ends (end tokens,
    ``stop_strings``, penalties, forbidden words); what would make it another search than a greedy one, or another kind
    of result, is overridden.

    tokenizer: needed where the model has ``stop_strings``.
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
    )


@torch.no_grad()
def answer_batch(
    model: Any, tokenizer: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]], max_new_tokens: int
) -> list[str]:
    """Greedy answers to several prompts at once: ids of `conversation_ids` and their visuals.

    All prompts begin alike, with the chat template and a video's places. Where several of them are about the same video
    (the very same tensor), that beginning is run once for each video and its keys and values serve all of its
    questions. Shorter prompts are padded behind the beginning, or on the left where there is none.
    """
    rows = [embed(model, ids, visuals) for ids, visuals in prompts]
    begun, cache = _run_beginnings(model, prompts, rows)
    length = max(len(row) for row in rows)
    embeds = rows[0].new_zeros(len(rows), length, rows[0].shape[1])
    mask = torch.zeros(len(rows), length, dtype=torch.long, device=embeds.device)
    for i, row in enumerate(rows):
        rest = begun + length - len(row)
        embeds[i, :begun], mask[i, :begun] = row[:begun], 1
        embeds[i, rest:], mask[i, rest:] = row[begun:], 1
    new = generate(model, embeds, mask, max_new_tokens, cache=cache, tokenizer=tokenizer)
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _run_beginnings(
    model: Any, prompts: Sequence[tuple[list[int], Sequence[Visual]]], rows: Sequence[Tensor]
) -> tuple[int, Any]:
    """Run what prompts about the same visuals have in common, once for each of those visuals.

    rows: the prompts' embeddings, ``[S, E]`` each. Returns how many tokens were run, the same for all prompts, and the
    cache of their keys and values, a row for each prompt; 0 and None where nothing would be saved, or where the
    language model's cache does not keep all tokens.
    """
    generator = family_of(model).generator
    config = model.config.get_text_config(decoder=True)
    most = min(len(ids) for ids, _ in prompts) - 1  # one token at least must be run to answer
    columns = enumerate(zip(*(ids[:most] for ids, _ in prompts), strict=True))
    begun = next((place for place, column in columns if len(set(column)) > 1), most)
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (_, visuals) in enumerate(prompts):
        groups.setdefault(tuple(id(visual.tokens) for visual in visuals), []).append(number)
    if begun == 0 or len(groups) == len(prompts) or config.is_encoder_decoder or not keeps_all(config):
        return 0, None
    cache = make_cache(config)
    embeds = torch.stack([rows[members[0]][:begun] for members in groups.values()])
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
    return begun, cache


class _Stream(TextStreamer):
    """Counts tokens, notes when the first came, and hands text on where words end."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.tokens = on_text, 0
        self.text: list[str] = []
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:  # the prompt comes first, and is empty where embeddings are given
            self.first = self.first or time.perf_counter()
            self.tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text.append(text)
        if text:
            self.on_text(text)
