"""The request of ``/v1/chat/completions``: OpenAI's fields, videos as in vLLM, and the choice of frames.

Every field is obeyed or refused. Fields of OpenAI's and vLLM's APIs that this server lacks are accepted only with the
value that changes nothing; fields that never change an answer (``user``, ``metadata``) are accepted and not used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Rate = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
_MOST_MESSAGES = 2000  # and parts of one of them; a model's context ends before


class FieldError(ValueError):
    """Fields of a request that do not fit one another. param: the field to change."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class _Strict(BaseModel):
    """A part of a request; unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _only(*values: Any) -> Any:
    """Return the type of a field that is supported only with these values (or null)."""

    def check(value: Any) -> Any:
        if value is not None and not any(type(value) is type(known) and value == known for known in values):
            raise ValueError(f"is supported only as {' or '.join(map(repr, values))}; leave it out")
        return value

    return Annotated[Any, BeforeValidator(check), WithJsonSchema({"enum": [*values, None]})]


def _without_surrogates(text: str) -> str:
    try:
        text.encode()  # the letters of a data URL are many: no loop over them
    except UnicodeEncodeError as error:
        raise ValueError("holds half of a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(_without_surrogates)]
StopText = Annotated[Text, Field(min_length=1, max_length=500)]


class TextPart(_Strict):
    """Text of a message."""

    type: Literal["text"]
    text: Text


Texts = Annotated[list[TextPart], Field(max_length=_MOST_MESSAGES, fail_fast=True)]


class MediaUrl(_Strict):
    """The address of a still or video: a data URL; ``https`` and ``file`` where the server allows them."""

    url: Text
    detail: _only("auto") = None  # type: ignore[valid-type]


class ImagePart(_Strict):
    """A still."""

    type: Literal["image_url"]
    image_url: MediaUrl


class VideoPart(_Strict):
    """A video: a file, or frames already chosen (``data:video/jpeg;base64,F1,F2,…``)."""

    type: Literal["video_url"]
    video_url: MediaUrl


class SystemMessage(_Strict):
    """Instructions before the conversation."""

    role: Literal["system", "developer"]
    content: Text | Texts


class UserMessage(_Strict):
    """A question with its stills and videos."""

    role: Literal["user"]
    content: (
        Text
        | Annotated[
            list[Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]],
            Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True),
        ]
    )


class AssistantMessage(_Strict):
    """An earlier answer, also as this server returned it."""

    role: Literal["assistant"]
    content: Text | Texts
    refusal: None = None
    audio: None = None
    annotations: _only([]) = None  # type: ignore[valid-type]
    function_call: None = None
    tool_calls: _only([]) = None  # type: ignore[valid-type]


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class FrameFields(_Strict):
    """The choice of a video's frames, which also stands at the top level of a request."""

    num_frames: Count | None = None
    fps: Rate | None = None
    max_frames: Count | None = None


class MediaOptions(_Strict):
    """Options of reading media, as vLLM and lmms-eval send them."""

    video: FrameFields | None = None
    image: _only({}) = None  # type: ignore[valid-type]


class _Unsupported(_Strict):
    """Fields of OpenAI's and vLLM's APIs that are accepted only with the value that changes nothing."""

    n: _only(1) = None  # type: ignore[valid-type]
    best_of: _only(1) = None  # type: ignore[valid-type]
    frequency_penalty: _only(0, 0.0) = None  # type: ignore[valid-type]
    presence_penalty: _only(0, 0.0) = None  # type: ignore[valid-type]
    repetition_penalty: _only(1, 1.0) = None  # type: ignore[valid-type]
    length_penalty: _only(1, 1.0) = None  # type: ignore[valid-type]
    top_k: _only(-1, 0) = None  # type: ignore[valid-type]
    min_p: _only(0, 0.0) = None  # type: ignore[valid-type]
    use_beam_search: _only(False) = None  # type: ignore[valid-type]
    logprobs: _only(False) = None  # type: ignore[valid-type]
    top_logprobs: _only(0) = None  # type: ignore[valid-type]
    logit_bias: _only({}) = None  # type: ignore[valid-type]
    tools: _only([]) = None  # type: ignore[valid-type]
    tool_choice: _only("none", "auto") = None  # type: ignore[valid-type]
    functions: _only([]) = None  # type: ignore[valid-type]
    response_format: _only({"type": "text"}) = None  # type: ignore[valid-type]
    modalities: _only(["text"]) = None  # type: ignore[valid-type]
    chat_template_kwargs: _only({}) = None  # type: ignore[valid-type]
    store: _only(False) = None  # type: ignore[valid-type]
    service_tier: _only("auto", "default") = None  # type: ignore[valid-type]


class _WithoutEffect(_Strict):
    """Fields that never change an answer: accepted and not used."""

    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None


@dataclass(frozen=True)
class FrameChoice:
    """The frames to take of each video of a request.

    frames: that many, evenly spaced; fps: frames per second instead; both None: the server's default. most: limit to
    which either is reduced, again evenly spaced; None: no limit of the request's own.
    """

    frames: int | None = None
    fps: float | None = None
    most: int | None = None


class AnswerFields(_Strict):
    """How an answer is generated and sent. ``temperature`` 0, also where it is left out, is greedy decoding."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=8)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_answer(self) -> Self:
        """Check fields that must fit one another."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise FieldError("max_tokens", "max_tokens and max_completion_tokens differ; give one of them")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "stream_options is given, but stream is not true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The longest answer in tokens; None: the server's default."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(AnswerFields, FrameFields, _Unsupported, _WithoutEffect):
    """A request of a chat completion.

    ``fps``, ``num_frames`` and ``max_frames`` may stand here or in ``media_io_kwargs.video`` or
    ``mm_processor_kwargs``. ``branch`` false: the language model gets the mean of the frames instead of the branch's
    tokens.
    """

    model: Text
    messages: Annotated[list[Message], Field(min_length=1, max_length=_MOST_MESSAGES, fail_fast=True)]
    media_io_kwargs: MediaOptions | None = None
    mm_processor_kwargs: FrameFields | None = None
    branch: bool | None = None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Check fields that must fit one another."""
        self.frame_choice()
        roles = [message.role for message in self.messages]
        if roles[0] in ("system", "developer"):
            roles = roles[1:]
        if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))] or roles[-1] != "user":
            raise FieldError(
                "messages",
                "messages must be user and assistant in turn, with the user first and last; one system message may "
                "stand before them",
            )
        return self

    def frame_choice(self) -> FrameChoice:
        """Return the choice of frames; with ``fps`` and ``num_frames``, the fewer frames are taken, as in vLLM.

        Raises FieldError if places contradict each other, or ``num_frames`` is more than ``max_frames``.
        """
        places = (self, self.media_io_kwargs and self.media_io_kwargs.video, self.mm_processor_kwargs)
        found: dict[str, Any] = {}
        for name in FrameFields.model_fields:
            values = {value for place in places if place and (value := getattr(place, name)) is not None}
            if len(values) > 1:
                raise FieldError(name, f"{name} is given several times with different values; give it once")
            found[name] = next(iter(values), None)
        frames, fps, most = found["num_frames"], found["fps"], found["max_frames"]
        if frames is not None and most is not None and frames > most:
            raise FieldError("num_frames", f"num_frames is {frames}, but max_frames is {most}")
        return FrameChoice(frames, None, most) if fps is None else FrameChoice(None, fps, frames or most)
