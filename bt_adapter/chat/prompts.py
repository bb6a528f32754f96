"""Prompts with the right number of visual tokens: of one question, or of a conversation."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from bt_adapter.chat.families import family_of

_PLACE = re.compile(r"(<video>|<image>)")
_Part = tuple[str, str]  # "text" and the text; "video" or "image" and nothing


class PromptError(ValueError):
    """A question cannot be put to the model as it is."""


def patches(chat: Any) -> int:
    """P, the patch tokens of one image or frame."""
    return family_of(chat).patches


def video_length(chat: Any) -> int:
    """The tokens of one video, whatever its number of frames: P+1, or a Q-Former's queries."""
    return family_of(chat).video_length


def image_token(chat: Any, tokenizer: Any) -> str:
    """The text of the chat model's image token. Raises ValueError when the tokenizer does not know it."""
    return family_of(chat).image_token(tokenizer)


def expand(text: str, token: str, lengths: Sequence[int]) -> str:
    """Replace the i-th image token in a prompt by lengths[i] of them.

    Raises ValueError when the prompt holds another number of image tokens than there are lengths.
    """
    pieces = text.split(token)
    if len(pieces) - 1 != len(lengths):
        raise ValueError(f"text holds {len(pieces) - 1} image tokens ({token!r}), but lengths names {len(lengths)}")
    return pieces[0] + "".join(token * n + piece for n, piece in zip(lengths, pieces[1:], strict=True))


def prompt_text(chat: Any, tokenizer: Any, question: str, kind: str = "video") -> str:
    """One question about one "image" or "video" as the model's chat template has it, with a single image token."""
    return conversation_text(chat, tokenizer, [Turn(question, (kind,))])


def video_prompt(chat: Any, tokenizer: Any, question: str, videos: int = 1) -> Any:
    """Token ids of the same question about each of `videos` videos, ``[videos, S]``, with P+1 image tokens each.

    Goes with ``pixel_values [videos, T, 3, h, w]`` into ``chat.generate``.
    """
    return _tokenize(
        tokenizer, prompt_text(chat, tokenizer, question), image_token(chat, tokenizer), video_length(chat), videos
    )


def image_prompt(chat: Any, tokenizer: Any, question: str, images: int = 1) -> Any:
    """The same for still images (not LLaVA-NeXT's, whose number of tokens is their size's)."""
    text, length = prompt_text(chat, tokenizer, question, "image"), family_of(chat).image_length()
    return _tokenize(tokenizer, text, image_token(chat, tokenizer), length, images)


def _tokenize(tokenizer: Any, text: str, token: str, length: int, count: int) -> Any:
    text = expand(text, token, [length])
    return tokenizer([text] * count, return_tensors="pt", add_special_tokens=_adds_special(tokenizer, text))


def _adds_special(tokenizer: Any, text: str) -> bool:
    """Not after a template that wrote the opening token itself."""
    return not text.startswith(tokenizer.bos_token or "\0")


@dataclass(frozen=True)
class Turn:
    """A question with the videos and stills that come with it, and its answer once there is one.

    question: plain text, in which ``<video>`` and ``<image>`` may stand where a visual belongs; without any, all
    visuals stand before it. kinds: "video" or "image" of each visual, in order.
    """

    question: str
    kinds: tuple[str, ...] = ()
    answer: str | None = None


def conversation_ids(chat: Any, tokenizer: Any, turns: Sequence[Turn], lengths: Sequence[int]) -> list[int]:
    """Token ids of a conversation up to the place of the last turn's answer, the i-th visual taking lengths[i] tokens.

    Raises PromptError: a question is empty, holds the image token, or has other places than visuals; or the chat
    template leaves a visual out or refuses the conversation.
    """
    token = image_token(chat, tokenizer)
    text = conversation_text(chat, tokenizer, turns)
    found = text.count(token)
    if found != len(lengths):
        raise PromptError(f"the chat template has {found} places for {len(lengths)} videos and images")
    return tokenizer(expand(text, token, lengths), add_special_tokens=_adds_special(tokenizer, text))["input_ids"]


def conversation_text(chat: Any, tokenizer: Any, turns: Sequence[Turn]) -> str:
    """The text behind :func:`conversation_ids`, with one image token for every visual."""
    token = image_token(chat, tokenizer)
    return _conversation_text(tokenizer, [(_parts(turn, token), turn.answer) for turn in turns], token)


def _parts(turn: Turn, token: str) -> list[_Part]:
    """The pieces of a question in order."""
    if not turn.question.strip():
        raise PromptError("the question is empty")
    pieces = _PLACE.split(turn.question)
    texts, places = pieces[::2], [place.strip("<>") for place in pieces[1::2]]
    if any(token in text for text in texts):
        raise PromptError(f"the question holds the model's image token {token!r}; ask in plain text")
    if not places:
        return [*((kind, "") for kind in turn.kinds), ("text", turn.question)]
    for kind in ("video", "image"):
        if places.count(kind) != turn.kinds.count(kind):
            raise PromptError(
                f"the question has {places.count(kind)} places <{kind}>, but {turn.kinds.count(kind)} {kind}s come "
                "with it (without any place, all come before the question)"
            )
    if tuple(places) != turn.kinds:
        raise PromptError(f"the question's places are {', '.join(places)}, but what comes is {', '.join(turn.kinds)}")
    parts: list[_Part] = [("text", texts[0])]
    for kind, text in zip(places, texts[1:], strict=True):
        parts += [(kind, ""), ("text", text)]
    return [part for part in parts if part != ("text", "")]


def _conversation_text(tokenizer: Any, turns: list[tuple[list[_Part], str | None]], token: str) -> str:
    """The chat template's text with one image token for every visual."""
    plain = ["\n".join(text.strip() if kind == "text" else token for kind, text in parts) for parts, _ in turns]
    answers = [answer for _, answer in turns]
    if not getattr(tokenizer, "chat_template", None):
        end = tokenizer.eos_token or ""
        said = ["" if answer is None else f" {answer}{end}" for answer in answers]
        return "".join(f"USER: {text} ASSISTANT:{after}" for text, after in zip(plain, said, strict=True))
    visuals = sum(kind != "text" for parts, _ in turns for kind, _ in parts)
    # templates that tell videos from stills, those that know stills alone, those that know nothing but text
    for known in ("video", "image"):
        contents = [[_content(kind, text, known) for kind, text in parts] for parts, _ in turns]
        try:
            text = _templated(tokenizer, contents, answers, lambda answer: [{"type": "text", "text": answer}])
        except (TypeError, TemplateError):  # one for text alone, or one that refuses what it does not know
            continue
        if text.count(token) == visuals and all(answer is None or answer in text for answer in answers):
            return text
    try:
        return _templated(tokenizer, plain, answers, lambda answer: answer)
    except (TypeError, TemplateError) as error:
        raise PromptError(f"the chat template cannot write this conversation: {error}") from error


def _content(kind: str, text: str, known: str) -> dict[str, str]:
    return {"type": "text", "text": text} if kind == "text" else {"type": kind if known == "video" else known}


def _templated(
    tokenizer: Any, contents: Sequence[Any], answers: Sequence[str | None], content_of: Callable[[str], Any]
) -> str:
    messages = []
    for content, answer in zip(contents, answers, strict=True):
        messages.append({"role": "user", "content": content})
        if answer is not None:
            messages.append({"role": "assistant", "content": content_of(answer)})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
