"""Messages of a request to the turns of a conversation and the addresses of its stills and videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bt_adapter.chat.prompts import Turn
from bt_adapter.serve.requests import AssistantMessage, ImagePart, Message, SystemMessage, TextPart, UserMessage


@dataclass(frozen=True)
class Address:
    """Where a still or video comes from. kind: "image" or "video". param: its field in the request."""

    kind: str
    url: str
    param: str


def read_messages(messages: Sequence[Message]) -> tuple[list[Turn], str | None, list[Address]]:
    """Convert messages, whose order of roles was checked.

    Texts of one message become lines. Stills and videos stand before the text, as in training, unless the message has
    text before one of them: then each keeps its place.

    Returns:
        The turns, of which the last has no answer; the system message; the addresses in the order of the prompt.
    """
    turns: list[Turn] = []
    addresses: list[Address] = []
    system = None
    for number, message in enumerate(messages):
        if isinstance(message, SystemMessage):
            system = _text(message.content)
        elif isinstance(message, AssistantMessage):
            turns[-1] = Turn(turns[-1].question, turns[-1].kinds, _text(message.content))
        else:
            turn, found = _read_question(message, number)
            turns.append(turn)
            addresses += found
    return turns, system, addresses


def _text(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _read_question(message: UserMessage, number: int) -> tuple[Turn, list[Address]]:
    if isinstance(message.content, str):
        return Turn(message.content), []
    addresses: list[Address] = []
    texts: list[str] = []
    marked: list[str] = []  # texts and places in order
    for place, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts.append(part.text)
            marked.append(("\n" if marked and not marked[-1].startswith("<") else "") + part.text)
            continue
        kind, url = ("image", part.image_url.url) if isinstance(part, ImagePart) else ("video", part.video_url.url)
        addresses.append(Address(kind, url, f"messages[{number}].content[{place}].{kind}_url"))
        marked.append(f"<{kind}>")
    leading = all(not isinstance(part, TextPart) for part in message.content[: len(addresses)])
    question = "\n".join(texts) if leading else "".join(marked)
    return Turn(question, tuple(address.kind for address in addresses)), addresses
