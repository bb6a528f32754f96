"""Ask a chat model about a live stream, from any thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from torch import Tensor

from bt_adapter.data.sampling import check_positive
from bt_adapter.live.video import LiveVideo, WindowKind
from bt_adapter.model.time_steps import Long

if TYPE_CHECKING:
    from bt_adapter.chat.conversation import Reply, Visual
    from bt_adapter.chat.engine import VideoChat


class SessionClosed(RuntimeError):
    """Raised by a live session that was closed, or that was idle for longer than its limit."""


@dataclass(frozen=True)
class LiveView:
    """The window of a live stream at one moment, encoded for the language model.

    visual: the tokens. frames: number of frames that they stand for, of ``kept`` so far. span: times of the first and
    the last of them, in seconds. encode: seconds to compute the tokens from the window.
    """

    visual: Visual
    frames: int
    kept: int
    span: tuple[float, float]
    encode: float


@dataclass(frozen=True)
class LiveReply:
    """An answer about a live stream. reply: the answer with its timings. view: what it is about."""

    reply: Reply
    view: LiveView


class LiveSession:
    """A live video together with the chat model that is asked about it; all methods may be called from any thread.

    Each question begins a new conversation about the window at that moment. While an answer is generated, further
    frames may be pushed: they belong to later questions.

    Args:
        chat: the chat model; not one that reads several layers of its tower (ViP-LLaVA).
        window, frames, fps: see `LiveVideo`.
        branch, long: see `LiveVideo`; None: the setting of the model.
        idle: seconds without a call after which the session is closed and its memory freed; None: no limit. Calls
            notice it, and so does :attr:`closed`, which a server reads regularly.
        model_lock: held while an answer is generated; sessions with the same model share one. None: the model is used
            by this session alone.

    Raises:
        ValueError, TypeError: an argument is outside its range, or the model is not supported.
    """

    def __init__(
        self,
        chat: VideoChat,
        window: WindowKind = "sliding",
        frames: int | None = None,
        fps: float | None = None,
        branch: bool | None = None,
        long: Long | None = None,
        idle: float | None = None,
        model_lock: AbstractContextManager | None = None,
    ) -> None:
        if len(chat.family.feature_layers) > 1:
            raise ValueError("this chat model reads several layers of its tower, which live video does not support")
        if idle is not None:
            check_positive("idle", idle)
        config = chat.family.home.config
        branch = config.use_branch if branch is None else branch
        long = config.long_videos if long is None else long
        self._chat, self._idle = chat, idle
        self._model_lock = threading.Lock() if model_lock is None else model_lock
        self._video: LiveVideo | None = LiveVideo(chat.branch, window, frames, fps, chat.images, branch, long)
        self._lock = threading.Lock()
        self._asking = 0
        self._used = self._begin = time.monotonic()

    @property
    def closed(self) -> bool:
        """Whether the session is closed; closes it if it has been idle for too long. Waits for no other call."""
        if self._lock.acquire(blocking=False):  # while another thread holds it, the session is in use
            try:
                if self._is_idle():
                    self._video = None
            finally:
                self._lock.release()
        return self._video is None

    def push(self, frame: Tensor, time_stamp: float | None = None) -> bool:
        """Add a frame, uint8 ``[3, H, W]``.

        time_stamp: seconds; None: those since the session was made. Errors and result as `LiveVideo.push`, and
        SessionClosed.
        """
        with self._lock:
            kept = self._open().push(frame, self._time(time_stamp))
            self._used = time.monotonic()
            return kept

    def wants(self, time_stamp: float | None = None) -> bool:
        """Whether a frame of this time would be kept, so that others need not be decoded. Errors as :meth:`push`."""
        with self._lock:
            wanted = self._open().wants(self._time(time_stamp))
            self._used = time.monotonic()
            return wanted

    def view(self) -> LiveView:
        """Encode the window at this moment. Raises ValueError if no frame was pushed, and SessionClosed."""
        with self._lock:
            begin = time.perf_counter()
            video = self._open()
            visual = self._chat.visual("video", video.tokens()[None])
            self._used = time.monotonic()
            return LiveView(visual, video.frames, video.kept, video.span, time.perf_counter() - begin)

    def ask(self, question: str, max_new_tokens: int = 64, on_text: Callable[[str], None] | None = None) -> LiveReply:
        """Answer a question about the window at this moment; ``on_text`` is called with each new piece of text.

        Raises:
            ValueError: no frame was pushed yet, or the question does not fit (PromptError, ContextError).
            SessionClosed: see there.
        """
        with self._lock:
            self._open()
            self._asking += 1
        try:
            view = self.view()
            with self._model_lock:
                conversation = self._chat.converse()
                conversation.add(view.visual)
                return LiveReply(conversation.ask(question, max_new_tokens, on_text), view)
        finally:
            with self._lock:
                self._asking -= 1
                self._used = time.monotonic()

    def close(self) -> None:
        """Close the session and free its window; calls in progress are finished. Waits for no other call."""
        self._video = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes from the first frame on; 0 once the session is closed."""
        video = self._video
        return 0 if video is None else video.nbytes

    def _time(self, time_stamp: float | None) -> float:
        return time.monotonic() - self._begin if time_stamp is None else time_stamp

    def _is_idle(self) -> bool:
        return self._idle is not None and not self._asking and time.monotonic() - self._used > self._idle

    def _open(self) -> LiveVideo:
        """Return the video, under the lock. Raises SessionClosed."""
        if self._is_idle():
            self._video = None
        video = self._video  # another thread may close the session at any moment
        if video is None:
            raise SessionClosed("the live session is closed, or was idle for too long: begin another one")
        return video
