"""Answers to requests: media to tokens, messages to a prompt, a prompt to an answer in the model's batches."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bt_adapter.chat.conversation import Visual, context, video_room
from bt_adapter.chat.prompts import PromptError, Turn, conversation_ids
from bt_adapter.chat.watch import EncodedVisual, Sampling, watch
from bt_adapter.data import VideoError
from bt_adapter.files import digest
from bt_adapter.model.video_tokens import plan_windows
from bt_adapter.serve.batching import Answering, ModelThread
from bt_adapter.serve.decoding import DecodingTime, MediaDecoder, ShownVideo
from bt_adapter.serve.errors import ApiError, bad_request, reader_text
from bt_adapter.serve.fetch import Downloader
from bt_adapter.serve.held import HeldBytes
from bt_adapter.serve.limits import Limits
from bt_adapter.serve.media import Media, MediaError, read_allowed_file, read_data_url
from bt_adapter.serve.messages import Address, read_messages
from bt_adapter.serve.metrics import Metrics
from bt_adapter.serve.requests import AnswerFields, ChatRequest, FrameChoice
from bt_adapter.serve.rows import Decoding
from bt_adapter.serve.sharing import SharedWork
from bt_adapter.serve.tokens import Seen, TokenCache

if TYPE_CHECKING:
    from bt_adapter.chat.engine import VideoChat

T = TypeVar("T")
Decoded = tuple[str, bool, FrameChoice, bool]
"""The frames of a video: digest of its content, whether that is pictures, the choice, and whether they are shown."""
_CHARACTERS = 16  # of text at most for each token of the model's context


@dataclass(frozen=True)
class ServiceOptions:
    """Settings of a service.

    name: the model's name in the API. sampling: default frames, and the treatment of long videos. most_tokens: default
    length of an answer. batch_size: most prompts answered at once. decoders: stills and videos decoded at a time.
    cache: bytes of the cache of visual tokens. media_path: folder of ``file://`` URLs; None: none. media_domains: hosts
    of ``https://`` URLs.
    """

    name: str = "mini"
    sampling: Sampling = Sampling(repeat=True)
    most_tokens: int = 64
    batch_size: int = 8
    decoders: int = 2
    cache: int = 256 << 20
    limits: Limits = Limits()
    media_path: Path | None = None
    media_domains: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """A request whose media are encoded: its prompt waits for :meth:`Service.answer`.

    seen: the stills and videos, in order, and whether each came from the cache.
    """

    answering: Answering
    seen: tuple[tuple[Seen, bool], ...]

    @property
    def frames(self) -> list[int]:
        """Number of frames seen of each video."""
        return [seen.visual.frames for seen, _ in self.seen if seen.visual.kind == "video"]


class Service:
    """A video chat model that answers many requests; all methods but `close` are used within one event loop.

    Args:
        chat: the model. options: see `ServiceOptions`.
    """

    def __init__(self, chat: VideoChat, options: ServiceOptions) -> None:
        self.chat, self.options, self.metrics = chat, options, Metrics()
        self.admitted = 0
        self.model = ModelThread(chat.model, chat.tokenizer, options.batch_size, self.metrics, lambda: self.admitted)
        self.cache = TokenCache(options.cache)
        self.decoder = MediaDecoder(lambda frames: chat.prepare(frames)[0], chat.images, options.limits)
        self.downloader = Downloader(options.media_domains, options.limits.media, options.limits.seconds)
        self._decoding = ThreadPoolExecutor(options.decoders, "decoding")
        # apart, so that a question about a cached video does not wait for the decoding of others
        self._loading = ThreadPoolExecutor(options.decoders, "loading")
        self.stopping = asyncio.Event()
        self._encoding: SharedWork[Seen] = SharedWork()
        self._preparing: SharedWork[ShownVideo] = SharedWork()
        self.held = HeldBytes(options.limits.bodies, self.busy)
        # decoded visuals that the model has not encoded yet: their frames take far more memory than their files
        self.decoded = asyncio.Semaphore(2 * options.decoders)
        self.metrics.watch("running", "Requests that are being answered or wait.", lambda: self.admitted)
        self.metrics.watch("waiting", "Prompts that wait for a batch.", lambda: self.model.waiting)
        self.metrics.watch("cache_bytes", "Bytes of cached visual tokens.", lambda: self.cache.size)

    def stop(self) -> None:
        """End all requests in progress with an error that says so."""
        self.stopping.set()
        self.model.stop()

    def close(self) -> None:
        """Stop the threads; answers that are being generated are cut short."""
        self.model.close()
        for pool in (self._decoding, self._loading):
            pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request while it is being answered. Raises ApiError (429) if too many are."""
        if self.admitted >= self.options.limits.waiting:
            raise self.busy("too many requests are waiting")
        self.admitted += 1
        try:
            yield
        finally:
            self.admitted -= 1

    def busy(self, message: str) -> ApiError:
        """Make the error of a request that comes when there is no room, with a guess of when there will be."""
        seconds = self.model.seconds * (1 + self.model.waiting / self.options.batch_size)
        return ApiError(429, f"{message}; try again later", code="busy", retry_after=max(1, min(60, round(seconds))))

    async def prepare(self, request: ChatRequest, show: bool = False) -> Prepared:
        """Encode a request's media and build its prompt. show: keep the videos' frames as pictures. Raises ApiError."""
        self.check_model(request.model)
        turns, system, addresses = read_messages(request.messages)
        if len(addresses) > self.options.limits.visuals:
            raise bad_request(f"a request may have {self.options.limits.visuals} stills and videos", "messages")
        self.check_text(turns, system)
        room = video_room(context(self.chat.model), 0, self._most_tokens(request)) // max(1, len(addresses))
        sampling, choice = self._sampling(request)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._see(address, sampling, choice, room, show)) for address in addresses]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors
        return await self.make_prompt(request, turns, system, [task.result() for task in tasks])

    async def make_prompt(
        self, request: AnswerFields, turns: list[Turn], system: str | None, seen: list[tuple[Seen, bool]]
    ) -> Prepared:
        """Build the prompt of turns about encoded stills and videos, in their order. Raises ApiError.

        seen: each with whether it came from the cache.
        """
        most = self._most_tokens(request)
        visuals: list[Visual] = [one.visual for one, _ in seen]
        try:
            ids = conversation_ids(self.chat.processor, turns, [len(visual.tokens) for visual in visuals], system)
        except PromptError as error:
            raise bad_request(str(error), "messages") from error
        if len(ids) + most > (limit := context(self.chat.model)):
            raise bad_request(
                f"the prompt takes {len(ids)} tokens and {most} are asked for the answer, but the model's context is "
                f"{limit}",
                "messages",
                "context_length_exceeded",
            )
        if self.chat.family.needs_question:
            questions = [turn.question for turn in turns for _ in turn.kinds]
            pairs = list(zip(visuals, questions, strict=True))
            visuals = await self._in_model(lambda: [visual.for_question(question) for visual, question in pairs])
        decoding = Decoding(
            most,
            request.temperature or 0.0,
            1.0 if request.top_p is None else request.top_p,
            None if request.seed is None else request.seed % 2**63,
            request.stops,
        )
        return Prepared(Answering(ids, visuals, decoding), tuple(seen))

    def answer(self, prepared: Prepared) -> Answering:
        """Let the model answer; iterate over the result."""
        self.model.answer(prepared.answering)
        return prepared.answering

    def check_model(self, name: str) -> None:
        """Raise ApiError (404) for the name of a model that is not served."""
        if name != self.options.name:
            raise ApiError(404, f"there is no model {name[:200]!r}", "model", "model_not_found")

    def check_text(self, turns: Sequence[Turn], system: str | None) -> None:
        """Raise ApiError for text that cannot fit into the context, which would take long to tokenize."""
        length = len(system or "") + sum(len(turn.question) + len(turn.answer or "") for turn in turns)
        if length > (most := _CHARACTERS * context(self.chat.model)):
            raise bad_request(
                f"the messages have {length} characters, more than {most}", "messages", "context_length_exceeded"
            )

    def _most_tokens(self, request: AnswerFields) -> int:
        return self.options.most_tokens if request.most_tokens is None else request.most_tokens

    def _sampling(self, request: ChatRequest) -> tuple[Sampling, FrameChoice]:
        """Return the treatment of a request's videos, and its choice of frames. Raises ApiError."""
        sampling, choice, most = self.options.sampling, request.frame_choice(), self.options.limits.frames
        if choice.frames is not None and choice.frames > most:
            raise bad_request(f"num_frames is {choice.frames}, but this server takes at most {most}", "num_frames")
        return replace(sampling, branch=self.branch_of(request.branch)), choice

    def branch_of(self, asked: bool | None) -> bool:
        """Return whether a request that asks for this (None: nothing) runs the branch. Raises ApiError."""
        if asked and not self.options.sampling.branch:
            raise bad_request("this server runs its model without the branch", "branch")
        return self.options.sampling.branch if asked is None else asked

    async def _see(
        self, address: Address, sampling: Sampling, choice: FrameChoice, room: int, show: bool
    ) -> tuple[Seen, bool]:
        """Return the tokens of a still or video, and whether they were in the cache. Raises ApiError."""
        try:
            with self.held.account() as hold:
                media = await self._load(address, hold)
                content = await _in_thread(self._loading, _digest, media)
                if address.kind == "image":
                    return await self._cached((content, "image"), partial(self._encode_image, media))
                choice = self._with_defaults(choice, media.frames)
                # no more sets than the longest video has, so that answers of other lengths find the same tokens
                longest = len(plan_windows(self.options.limits.frames, self.chat.branch.config.max_frames))
                sets = min(longest, max(1, room // self.chat.family.video_length))
                decoded = (content, media.frames, choice, show)
                encode = partial(self._encode_video, media, decoded, sampling, sets)
                return await self._cached(("video", decoded, sampling, sets), encode)
        except (VideoError, ValueError) as error:
            text = f"the {address.kind} cannot be used: {reader_text(error)}"
            raise bad_request(text, address.param, "invalid_media") from error
        except MemoryError as error:
            raise bad_request(f"the {address.kind} takes too much memory", address.param, "invalid_media") from error

    def _with_defaults(self, choice: FrameChoice, pictures: bool) -> FrameChoice:
        """Return a choice with the server's default frames, except for frames that came as pictures."""
        default = self.options.sampling
        if pictures or choice.frames is not None or choice.fps is not None:
            return choice
        if default.fps is not None:
            return FrameChoice(fps=default.fps, most=choice.most or self.options.limits.frames)
        return FrameChoice(min(default.frames, choice.most or default.frames))

    async def _load(self, address: Address, hold: Callable[[int], None]) -> Media:
        """Get the bytes of a still or video. hold: counts those that are not of the body. Raises MediaError."""
        most, scheme = self.options.limits.media, address.url[:8].lower()
        if scheme.startswith("data:"):
            return await _in_thread(self._loading, read_data_url, address.url, most)
        if scheme.startswith("file:"):
            media = await _in_thread(self._loading, read_allowed_file, address.url, self.options.media_path, most)
            hold(len(media.pieces[0]))
            return media
        if scheme == "https://":
            return Media((await self.downloader.get(address.url, hold),))
        raise MediaError("its URL must begin with data:, https:// or file://")

    async def _cached(
        self, key: Hashable, encode: Callable[[threading.Event], Coroutine[Any, Any, Seen]]
    ) -> tuple[Seen, bool]:
        """Return cached tokens, or those that another request is computing, or compute them."""
        if (seen := self.cache.get(key)) is not None:
            self.metrics.cache.labels("hit").inc()
            return seen, True
        self.metrics.cache.labels("shared" if key in self._encoding else "miss").inc()
        seen = await self._encoding.get(key, encode)
        self.cache.put(key, seen)
        return seen, False

    async def _encode_image(self, media: Media, cancelled: threading.Event) -> Seen:
        timer = DecodingTime(self.options.limits.seconds, cancelled)
        async with self.decoded:
            still = await _in_thread(self._decoding, self.decoder.still, media, timer)
            begin = time.perf_counter()
            visual = await self._in_model(lambda: self.chat.encode_image(still.pixels))
        encoded = EncodedVisual(
            "image", visual.tokens, "", visual.reads, decode=still.decode, encode=time.perf_counter() - begin
        )
        return self._noted(encoded)

    async def _encode_video(
        self, media: Media, decoded: Decoded, sampling: Sampling, sets: int, cancelled: threading.Event
    ) -> Seen:
        async with self.decoded:
            # with and without the branch, asked at one moment, take the same frames
            video = await self._preparing.get(decoded, partial(self._decode, media, decoded))
            room = sets * self.chat.family.video_length
            encoded = await self._in_model(lambda: watch(self.chat, video, sampling, room=room))
        self.metrics.frames.inc(encoded.frames)
        return self._noted(replace(encoded, decode=video.decode), video.numbers, video.pictures)

    async def _decode(self, media: Media, decoded: Decoded, cancelled: threading.Event) -> ShownVideo:
        _, _, choice, show = decoded
        timer, repeat = DecodingTime(self.options.limits.seconds, cancelled), self.options.sampling.repeat
        return await _in_thread(self._decoding, self.decoder.video, media, choice, repeat, timer, show)

    def _noted(self, visual: EncodedVisual, numbers: tuple[int, ...] = (), pictures: tuple[bytes, ...] = ()) -> Seen:
        """Record the times and the size of an encoded visual."""
        self.metrics.decode_seconds.observe(visual.decode)
        self.metrics.encode_seconds.observe(visual.encode)
        size = visual.tokens.nbytes
        if visual.reads is not None:  # the tokens of the tower and branch are kept, for any question
            config = self.chat.branch.vision_config
            size = visual.sets * (config.patches + 1) * config.hidden_size * self.chat.branch.tower.dtype.itemsize
        return Seen(visual, numbers, size + sum(map(len, pictures)), pictures)

    async def _in_model(self, work: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.model.run(work))


async def _in_thread(pool: ThreadPoolExecutor, work: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)


def _digest(media: Media) -> str:
    """Return a digest of a still's or video's content."""
    if not media.frames:
        return digest(media.pieces, 64, "sha256")
    return digest([digest([piece], 64, "sha256").encode() for piece in media.pieces], 64, "sha256")
