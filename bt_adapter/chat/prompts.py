"""Build the prompt of a conversation with the chat template of a video chat model's processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from bt_adapter.chat.native.template import text_ids

_PLACE = re.compile(r"(<video>|<image>)")


class PromptError(ValueError):
    """Raised when a question or conversation cannot be written as a prompt."""


@dataclass(frozen=True)
class Turn:
    """A question with its videos and stills, and its answer if there is one.

    question: plain text, in which ``<video>`` and ``<image>`` may mark the positions of visuals; without any, all
    visuals precede the text. kinds: "video" or "image" for each visual, in order.
    """

    question: str
    kinds: tuple[str, ...] = ()
    answer: str | None = None


def conversation_ids(
    processor: Any, turns: Sequence[Turn], lengths: Sequence[int], system: str | None = None
) -> list[int]:
    """Tokenize a conversation up to the start of the last turn's answer.

    Args:
        processor: of a video chat model. turns: the last one has no answer yet.
        lengths: number of tokens of each video and still, in order. All of them become image tokens, which the language
            model knows.
        system: text of a system message before the first turn; None: no such message.

    Raises:
        PromptError: see :func:`conversation_text`.
    """
    token = str(processor.image_token)
    pieces = conversation_text(processor, turns, system).split(token)
    text = pieces[0] + "".join(token * n + piece for n, piece in zip(lengths, pieces[1:], strict=True))
    return text_ids(processor.tokenizer, text)


def conversation_text(processor: Any, turns: Sequence[Turn], system: str | None = None) -> str:
    """Write the text up to the start of the last turn's answer, with one image token for every video and still.

    Raises:
        PromptError: a question is empty, contains the image token, or has the wrong number of places for visuals; an
            answer or the system message contains a visual's token; or the chat template omits a visual or refuses the
            conversation.
    """
    messages: list[dict[str, Any]] = []
    if system is not None:
        for token in (str(processor.image_token), processor.video_token):
            if token in system:
                raise PromptError(f"the system message holds {token!r}, which stands for a video or still")
        messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
    for turn in turns:
        messages.append({"role": "user", "content": _parts(turn, str(processor.image_token))})
        if turn.answer is not None:
            if processor.video_token in turn.answer:
                raise PromptError(f"an earlier answer holds {processor.video_token!r}, which stands for a video")
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except (TypeError, TemplateError) as error:
        raise PromptError(f"the chat template cannot write this conversation: {error}") from error
    text = text.replace(processor.video_token, str(processor.image_token))
    found, visuals = text.count(str(processor.image_token)), sum(len(turn.kinds) for turn in turns)
    if found != visuals:
        raise PromptError(f"the chat template has {found} places for {visuals} videos and stills")
    return text


def _parts(turn: Turn, token: str) -> list[dict[str, str]]:
    """Build the content of a question's message: its texts and visuals in order."""
    if not turn.question.strip():
        raise PromptError("the question is empty; give some text")
    pieces = _PLACE.split(turn.question)
    texts, places = pieces[::2], [place.strip("<>") for place in pieces[1::2]]
    if any(token in text for text in texts):
        raise PromptError(f"the question holds the model's image token {token!r}; ask in plain text")
    if not places:
        return [*({"type": kind} for kind in turn.kinds), {"type": "text", "text": turn.question}]
    for kind in ("video", "image"):
        if places.count(kind) != turn.kinds.count(kind):
            raise PromptError(
                f"the question has {places.count(kind)} places <{kind}>, but {turn.kinds.count(kind)} {kind}s come "
                "with it (without any place, all come before the question)"
            )
    if tuple(places) != turn.kinds:
        raise PromptError(f"the question's places are {', '.join(places)}, but what comes is {', '.join(turn.kinds)}")
    parts = [{"type": "text", "text": texts[0]}]
    for kind, text in zip(places, texts[1:], strict=True):
        parts += [{"type": kind}, {"type": "text", "text": text}]
    return [part for part in parts if part != {"type": "text", "text": ""}]
