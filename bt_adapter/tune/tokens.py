"""Token ids of conversations, and their targets: the tokens of the answers alone."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bt_adapter import files
from bt_adapter.chat.families import family_of
from bt_adapter.chat.native.template import text_ids
from bt_adapter.chat.prompts import PromptError, Turn, conversation_text
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError
from bt_adapter.tune.conversations import Source, TrainingConversation

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation as the language model sees it, with one image token for each visual: `expand` repeats it.

    Attributes:
        key: its name in reports.
        ids: int32 ``[s]``, the tokens.
        targets: int32 ``[s]``; the token to predict at each position: the next one of an answer or its end, or IGNORED.
        counts: int32 ``[s]``, how often each token is repeated: 1, or the tokens of its video or still.
        sources: the videos and stills, in order.
    """

    key: str
    ids: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    sources: tuple[Source, ...]

    @property
    def length(self) -> int:
        """Number of all tokens, S."""
        return int(self.counts.sum())

    @property
    def answer_tokens(self) -> int:
        """Number of positions with a target."""
        return int((self.targets != IGNORED).sum())

    def expand(self) -> tuple[Tensor, Tensor]:
        """Token ids and targets with all image tokens, int64 ``[S]`` each."""
        targets = np.full(self.length, IGNORED, np.int64)
        targets[self.counts.cumsum() - 1] = self.targets
        return torch.from_numpy(np.repeat(self.ids.astype(np.int64), self.counts)), torch.from_numpy(targets)


class _Answer(NamedTuple):
    """The position of an answer in the text of its conversation, and the text that precedes it at inference.

    Attributes:
        prompt: that prompt; the answer begins behind it. end: the character behind the answer, and behind the special
            token that ends it where there is one. closed: whether there is one.
    """

    prompt: str
    end: int
    closed: bool


class Tokens:
    """Makes examples of conversations by a chat model's template and tokenizer.

    Args:
        chat: a video chat model. processor: its processor, with a fast tokenizer.

    Raises:
        CommandError: the tokenizer is not a fast one, or has no token that ends an answer.
    """

    def __init__(self, chat: Any, processor: Any) -> None:
        tokenizer = processor.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            raise CommandError(f"the model's tokenizer must be a fast one, but is {type(tokenizer).__name__}")
        if tokenizer.eos_token_id is None:
            raise CommandError("the model's tokenizer has no eos_token, by which an answer ends")
        self.processor, self.tokenizer, self.family = processor, tokenizer, family_of(chat)
        self.image_token = self.family.image_token(tokenizer)
        self.special = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)

    def examples(self, conversation: TrainingConversation) -> list[Example]:
        """Make one example of a conversation, or one for each answer.

        Several where the tokenizer joins the end of a prompt and the answer after it into one token: inference does so
        for the answers that lie behind, not for the one that it writes, so that no one sequence holds both.

        Raises PromptError as :meth:`example`.
        """
        turns = self._turns(conversation)
        text, answers = self._text(turns)
        if (whole := self._coded(text, answers)) is not None:
            return [self._example(conversation, *whole)]
        found = []
        for number in range(1, len(turns) + 1):
            sources = conversation.sources[: sum(len(turn.kinds) for turn in turns[:number])]
            key = f"{conversation.key}, answer {number}" if len(turns) > 1 else conversation.key
            part = TrainingConversation(key, conversation.exchanges[:number], sources)
            found.append(self._example(part, *self._one_answer(text, answers[number - 1])))
        return found

    def example(self, conversation: TrainingConversation) -> Example:
        """Make one sequence of all turns of a conversation.

        The prompts are those of inference, token for token. An answer ends with the special token that the template
        writes after it, or, where it writes none, with the tokenizer's end of text.

        Raises PromptError: it cannot be written by the model's chat template, or not as one sequence; the message says
        why.
        """
        found = self.examples(conversation)
        if len(found) > 1:
            raise PromptError("the tokenizer joins prompts and answers: each answer needs a sequence of its own")
        return found[0]

    def _coded(self, text: str, answers: Sequence[_Answer]) -> tuple[list[int], list[int]] | None:
        """Ids and targets of all turns in one sequence; None unless each prompt of inference is a prefix of it."""
        ids = text_ids(self.tokenizer, text)
        targets = [IGNORED] * len(ids)
        for answer in answers:
            prompt, upto = text_ids(self.tokenizer, answer.prompt), text_ids(self.tokenizer, text[: answer.end])
            if ids[: len(prompt)] != prompt or ids[: len(upto)] != upto:
                return None
            self._put_targets(targets, ids, len(prompt), len(upto), answer.closed)
        return ids, targets

    def _one_answer(self, text: str, answer: _Answer) -> tuple[list[int], list[int]]:
        """Ids and targets of an answer alone, after the prompt that inference has for it.

        Raises PromptError where no tokens of the answer, written after the prompt, read as the text does.
        """
        prompt, upto = text_ids(self.tokenizer, answer.prompt), text_ids(self.tokenizer, text[: answer.end])
        wanted = self._read(upto)
        for own in self._continuations(text[len(answer.prompt) : answer.end], prompt, upto):
            if own and self._read(prompt + own) == wanted:
                ids = prompt + own
                targets = [IGNORED] * len(ids)
                self._put_targets(targets, ids, len(prompt), len(ids), answer.closed)
                return ids, targets
        raise PromptError(
            "the tokenizer joins the end of the prompt and the answer into one token, and cannot write the answer alone"
        )

    def _continuations(self, answer: str, prompt: list[int], upto: list[int]) -> Iterator[list[int]]:
        """Candidate token ids of an answer after a prompt, the likelier first."""
        if upto[: len(prompt)] == prompt:
            yield upto[len(prompt) :]
        yield self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        # after a special token some tokenizers do not put a space before the first word
        anchor = self.tokenizer.eos_token
        yield self.tokenizer(anchor + answer, add_special_tokens=False)["input_ids"][1:]

    def _read(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _put_targets(self, targets: list[int], ids: list[int], begin: int, end: int, closed: bool) -> None:
        """Set the targets of an answer, ids ``begin`` to ``end``, and of its end unless the template closes it."""
        if not 0 < begin < end:
            raise PromptError("an answer has no tokens")
        targets[begin - 1 : end - 1] = ids[begin:end]
        if not closed:
            targets[end - 1] = self.tokenizer.eos_token_id

    def _example(self, conversation: TrainingConversation, ids: list[int], targets: list[int]) -> Example:
        kinds = [source.kind for source in conversation.sources]
        counts = np.ones(len(ids), np.int32)
        own = np.array(ids, np.int32)
        try:
            lengths = [self.family.video_length if kind == "video" else self.family.image_length() for kind in kinds]
        except ValueError as error:
            raise PromptError(f"stills do not go with a {self.family.name} model here: {error}") from error
        counts[own == self.family.image_token_id] = lengths
        return Example(conversation.key, own, np.array(targets, np.int32), counts, conversation.sources)

    def _turns(self, conversation: TrainingConversation) -> list[Turn]:
        turns, kinds = [], [source.kind for source in conversation.sources]
        for exchange in conversation.exchanges:
            turns.append(Turn(exchange.question, tuple(kinds[: exchange.visuals]), exchange.answer))
            kinds = kinds[exchange.visuals :]
        return turns

    def _text(self, turns: Sequence[Turn]) -> tuple[str, list[_Answer]]:
        """The text up to the end of the last answer, and where the answers stand in it.

        The template is run once for each answer and once for the whole, which is most of the time a run takes to begin.
        """
        # one more question shows what the template writes after the last answer
        text = conversation_text(self.processor, [*turns, Turn("?")])
        answers: list[_Answer] = []
        for number, turn in enumerate(turns):
            asked = Turn(turn.question, turn.kinds)
            prompt = conversation_text(self.processor, [*turns[:number], asked])
            assert turn.answer is not None
            begin = text.find(turn.answer, len(prompt))
            if not text.startswith(prompt) or text[len(prompt) : begin].strip() or begin < 0:
                raise PromptError("the model's chat template writes past turns otherwise than the one being answered")
            end = begin + len(turn.answer)
            after = text[end:].lstrip()
            closing = next((token for token in self.special if after.startswith(token)), self.image_token)
            closed = closing != self.image_token
            if closed:
                end = len(text) - len(after) + len(closing)
            answers.append(_Answer(prompt, end, closed))
        return text[: answers[-1].end], answers


def make_examples(
    tokens: Tokens, conversations: Sequence[TrainingConversation], context: int, skip_long: bool
) -> tuple[list[Example], Skipped]:
    """Make the examples of all conversations, several of some, and list those that cannot be used.

    Raises:
        CommandError: some are longer than ``context`` tokens and ``skip_long`` is off; the message counts and names
            them.
    """
    examples, skipped, long = [], Skipped(), Skipped()
    for conversation in conversations:
        try:
            found = tokens.examples(conversation)
        except PromptError as error:
            skipped.add(conversation.key, str(error))
            continue
        for example in found:
            if example.length > context:
                long.add(example.key, f"{example.length} tokens, more than the context of {context}")
            else:
                examples.append(example)
    if len(long) and not skip_long:
        raise CommandError(
            f"{len(long)} of {len(conversations)} conversations do not fit into the context of {context} tokens "
            f"(--skip-long leaves them out, --max-length sets another length); {long.report(5)}"
        )
    skipped.merge(long)
    return examples, skipped


def digest(examples: Sequence[Example]) -> str:
    """A digest of the examples in their order."""

    def chunks() -> Iterator[bytes]:
        for example in examples:
            yield example.ids.tobytes()
            yield from (os.path.basename(source.path).encode() for source in example.sources)

    return files.digest(chunks(), 16)
