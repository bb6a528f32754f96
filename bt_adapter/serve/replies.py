"""Bodies of answers: a chat completion, and its pieces as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from bt_adapter.files import encode_json
from bt_adapter.serve.batching import Ended
from bt_adapter.serve.errors import ApiError
from bt_adapter.serve.service import Prepared, Service


class Completion:
    """The answer to one request, as bodies of the API.

    Args:
        service: answers. prepared: the request. include_usage: end a stream with a chunk that holds the usage.
    """

    def __init__(self, service: Service, prepared: Prepared, include_usage: bool = False) -> None:
        self.service, self.prepared, self.include_usage = service, prepared, include_usage
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    @property
    def headers(self) -> dict[str, str]:
        """Headers that say how many frames of each video were seen, and how many visuals came from the cache."""
        cached = sum(hit for _, hit in self.prepared.seen)
        return {"X-Video-Frames": ",".join(map(str, self.prepared.frames)), "X-Cached-Visuals": str(cached)}

    async def whole(self) -> dict[str, Any]:
        """Wait for the answer and return its body. Raises ApiError."""
        text, end = "", None
        async for piece in self.service.answer(self.prepared):
            if isinstance(piece, Ended):
                end = piece
            else:
                text += piece
        assert end is not None
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _reason(end)}
        return self._body("chat.completion", [choice]) | {"usage": self._usage(end)}

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the answer as events; an error after the first event is an event too, and ends the stream."""
        yield self._event({"role": "assistant", "content": ""})
        try:
            async for piece in self.service.answer(self.prepared):
                if not isinstance(piece, Ended):
                    yield self._event({"content": piece})
                    continue
                yield self._event({}, _reason(piece))
                if self.include_usage:
                    yield _line(self._body("chat.completion.chunk", []) | {"usage": self._usage(piece)})
        except ApiError as error:
            yield _line(error.body)
            return
        yield b"data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.include_usage else {}
        return _line(self._body("chat.completion.chunk", [choice]) | usage)

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.options.name}
        return head | {"choices": choices, "system_fingerprint": None}

    def _usage(self, end: Ended) -> dict[str, Any]:
        prompt = len(self.prepared.answering.ids)
        visual = sum(len(one.tokens) for one in self.prepared.answering.visuals)
        counts = {"prompt_tokens": prompt, "completion_tokens": end.tokens, "total_tokens": prompt + end.tokens}
        return counts | {"visual_tokens": visual, "video_frames": self.prepared.frames}


def _reason(end: Ended) -> str:
    """Return OpenAI's finish reason."""
    return "length" if end.finish == "length" else "stop"


def _line(body: dict[str, Any]) -> bytes:
    return b"data: " + encode_json(json.dumps(body, ensure_ascii=False, separators=(",", ":"))) + b"\n\n"
