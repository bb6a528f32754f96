"""Video tokens of a stream of frames, at constant work and memory per frame and at any moment."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.sampling import check_positive
from bt_adapter.live.clock import interval_of
from bt_adapter.live.steps import SlidingWindow, WholeWindow, Window
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.time_steps import PRETRAINED_STEPS, Long, check_long
from bt_adapter.model.video_tokens import branch_states, mean_tokens, tokens_of_states

WindowKind = Literal["sliding", "whole"]
# Seconds. Beyond, a float cannot tell the frames of a second apart.
_LATEST = 1e14


class LiveVideo:
    """A live video: frames are pushed one by one, and its tokens can be computed at any moment.

    A pushed frame that is kept passes the frozen tower once, layers 0 to L-2, and its states are added to a window. The
    tokens then cost d-1 branch layers over the window's time steps, whatever the length of the stream. Work and memory
    per frame are constant. Not safe for several threads: see `bt_adapter.live.session.LiveSession`.

    Args:
        model: tower and branch, in evaluation mode. Make the live video after adapters and hooks were added to it.
        window: "sliding": the tokens stand for the last ``frames`` kept frames, and equal ``model.video_tokens`` of
            them. "whole": for all frames since the start; the time steps are means of equal shares of them, see
            `bt_adapter.live.steps.WholeWindow` for the exact formula and where it equals ``model.video_tokens``.
        frames: T, the length of a sliding window; of a whole one, half the number of blocks that are kept. None: the
            number of time steps that the branch was trained with (8 if it does not say). A window of more frames is
            averaged down to the trained time steps.
        fps: most frames kept per second of the time stamps: the first one in each interval of 1/fps seconds since the
            first frame. None: all.
        images: preprocessing of frames; None: the model's.
        branch: False: without the branch; the tokens are the mean over the window's frames of tower layer L-2's tokens.
        long: treatment of windows of more frames than trained time steps, see ``model.time_steps.plan_steps``.

    Attributes:
        pushed: frames pushed. kept: frames kept, which passed the tower; both since the last :meth:`clear`.

    Example:
        >>> live = LiveVideo(model, fps=4)
        >>> for frame in LiveSource("rtsp://camera/stream"):  # doctest: +SKIP
        ...     live.push(frame.pixels, frame.time)
        ...     tokens = live.tokens()  # [P+1, D]

    Raises:
        ValueError, TypeError: an argument is outside its range or of another type; the message names it.
    """

    def __init__(
        self,
        model: BTAdapterVisionModel,
        window: WindowKind = "sliding",
        frames: int | None = None,
        fps: float | None = None,
        images: ImageSettings | None = None,
        branch: bool = True,
        long: Long = "average",
    ) -> None:
        if not isinstance(model, BTAdapterVisionModel):
            raise TypeError(f"model must be a BTAdapterVisionModel, but is {type(model).__name__}")
        if model.stored_features:
            raise ValueError("model must hold the tower's embeddings, but was built for stored features")
        if window not in get_args(WindowKind):
            raise ValueError(f"window must be 'sliding' or 'whole', but is {window!r}")
        if frames is None:
            frames = model.config.trained_steps or min(PRETRAINED_STEPS, model.config.max_frames)
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"frames must be a positive int, but is {frames!r}")
        if fps is not None:
            check_positive("fps", fps)
        if images is not None and not isinstance(images, ImageSettings):
            raise TypeError(f"images must be ImageSettings, but is {type(images).__name__}")
        if not isinstance(branch, bool):
            raise TypeError(f"branch must be a bool, but is {branch!r}")
        if branch and model.config.depth < 2:
            raise ValueError(f"video tokens need a branch of depth 2 or more, but depth is {model.config.depth}")
        check_long(long)
        self.model, self.images, self.branch, self.long, self.fps = model, images or model.images, branch, long, fps
        self._window: Window = SlidingWindow(frames) if window == "sliding" else WholeWindow(frames)
        self._times: deque[float] = deque(maxlen=frames if window == "sliding" else 1)
        self.clear()

    def clear(self) -> None:
        """Forget all frames; the next one begins a new stream."""
        self.pushed = 0
        self._start = self._first = self._last = 0.0
        self._interval = -1  # number of the interval of 1/fps seconds of the frame kept last
        self._times.clear()
        self._window.clear()

    @property
    def kept(self) -> int:
        """Number of frames that passed the tower since the last :meth:`clear`."""
        return self._window.pushed

    @property
    def frames(self) -> int:
        """Number of frames that the tokens stand for."""
        return self._window.frames

    @property
    def span(self) -> tuple[float, float]:
        """Times of the first and the last frame that the tokens stand for. Raises ValueError if there is none."""
        self._check_any()
        first = self._first if isinstance(self._window, WholeWindow) else self._times[0]
        return first, self._times[-1]

    @property
    def edges(self) -> list[int]:
        """Number of each time step's first frame among the kept ones, from 0, and that of the next frame.

        Raises ValueError if there is no frame.
        """
        self._check_any()
        return self._window.edges(self._window.plan(self.model.config, self.long))

    @property
    def nbytes(self) -> int:
        """Bytes that the window takes from the first kept frame on, whatever the length of the stream."""
        config = self.model.vision_config
        layers = max(1, self.model.config.depth - 1) if self.branch else 1
        return self._window.nbytes(layers * (1 + config.patches) * config.hidden_size, self.model.tower.dtype)

    def wants(self, time: float) -> bool:
        """Whether a frame of this time would be kept, so that others need not be decoded. Errors as :meth:`push`."""
        return self._interval_of(time) > self._interval

    @torch.no_grad()
    def push(self, frame: Tensor, time: float) -> bool:
        """Add a frame.

        Args:
            frame: uint8 ``[3, H, W]``, RGB, any size.
            time: seconds from any start, at most 1e14, not earlier than that of the frame before.

        Returns:
            Whether it was kept (always without ``fps``).

        Raises:
            TypeError, ValueError: the frame has another dtype or shape; the time is out of range or goes backwards.
        """
        check_frame(frame)
        kept = self.wants(time)
        if kept:
            interval = self._interval_of(time)
            self._window.add(self._states(self.images.prepare(frame[None])))
            if self.kept == 1:
                self._first = time
            self._interval = interval
            self._times.append(time)
        if self.pushed == 0:
            self._start = time
        self.pushed, self._last = self.pushed + 1, time
        return kept

    @torch.no_grad()
    def tokens(self) -> Tensor:
        """Compute the tokens of the window at this moment, ``[P+1, D]``, CLS last.

        Raises ValueError if no frame was pushed.
        """
        self._check_any()
        if not self.branch:
            return mean_tokens(self._window.rows()).to(self.model.tower.dtype)
        plan = self._window.plan(self.model.config, self.long)
        return tokens_of_states(self.model, self._window.rows(), self._window.inputs(plan), plan.steps, plan)

    def _states(self, images: Tensor) -> Tensor:
        """Run the tower on one frame: its states for the window, ``[layers, 1+P, D]``."""
        tower = self.model.tower
        images = images.to(tower.device or self.model.branch.cls_token.device, tower.dtype)
        states: list[Tensor] = []
        for state in branch_states(self.model, images):
            if not self.branch:
                states.clear()
            states.append(state[0].clone())  # the next layer overwrites it
        return torch.stack(states)

    def _interval_of(self, time: float) -> int:
        """Return the number of the interval that a frame of this time is in."""
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not abs(time) <= _LATEST:
            raise ValueError(f"time must be a finite number of seconds, at most {_LATEST:g}, but is {time!r}")
        if self.pushed and time < self._last:
            raise ValueError(f"time must not go backwards, but is {time!r} after {self._last!r}")
        if self.fps is None:
            return self._interval + 1
        return 0 if self.pushed == 0 else interval_of(time - self._start, self.fps)

    def _check_any(self) -> None:
        if self.kept == 0:
            raise ValueError("no frame was pushed yet: push one first")


def check_frame(frame: Any) -> None:
    """Raise a TypeError or ValueError unless ``frame`` is a decoded frame, uint8 ``[3, H, W]``."""
    if not isinstance(frame, Tensor) or frame.dtype != torch.uint8 or frame.layout != torch.strided:
        found = f"{frame.dtype}, {frame.layout}" if isinstance(frame, Tensor) else type(frame).__name__
        raise TypeError(f"frame must be a uint8 tensor [3, H, W], but is {found}")
    if frame.ndim != 3 or frame.shape[0] != 3 or 0 in frame.shape:
        raise ValueError(f"frame must be [3, H, W] with H and W of 1 or more, but the shape is {list(frame.shape)}")
