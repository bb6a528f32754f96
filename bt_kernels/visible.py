"""Selection and order of the visible patch tokens of a batch of videos.

Legend: B videos, P patches of a frame, T frames, N visible rows of a video, K groups, S slots.
"""

from __future__ import annotations

from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from bt_kernels._layout import frame_weights

_PADDING = -1


@dataclass(frozen=True, eq=False)
class VisibleTokens:
    """The visible patch tokens of a batch of videos.

    Rows are patch-major: ``index[b, n] = p * frames + t`` says that row ``n`` of video ``b`` is patch ``p`` of
    frame ``t``. There are two forms.

    * **Regular grid** (``slots`` is an int): the N rows are K groups of S = ``slots`` neighbouring rows. Temporal
      attention runs inside a group (row ``n`` belongs to group ``n // S``), spatial attention over the rows of one
      slot (``n % S``). With true tubes a group is a patch and a slot a frame.
    * **Ragged** (``slots`` is None): any (patch, frame) may be visible. A token attends, in time, to the visible
      tokens of its own patch, and in space, to CLS and the visible tokens of its own frame. The index ascends, so
      the tokens of a patch are neighbours. Rows past a video's last visible token hold index -1: their values are
      never read, and outputs there are zero.

    Build one with :meth:`all`, :meth:`tube`, :meth:`random` or :meth:`from_reference_mask`, or directly from an index.
    The constructor then also checks the values, which waits for the device; ``check=False`` skips this.

    Attributes:
        index: int64 ``[B, N]``.
        patches: P, patches of a frame.
        frames: T, frames of a video.
        slots: S of a regular grid, or None when ragged.
        frame_counts: int64 ``[B]``, real frames of each video (the rest is padding, left out of every mean), or None
            when every frame is real. Only with the ragged form.
        target_index: int64 ``[B, N]``, the tower token that each row is compared with in token alignment. It equals
            ``index``, except for the reference's mask, which pairs other tokens (see :meth:`from_reference_mask`).
    """

    index: Tensor
    patches: int
    frames: int
    slots: int | None = None
    frame_counts: Tensor | None = None
    target_index: Tensor = None  # type: ignore[assignment]  # None becomes index
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        _check_index("index", self.index, None)
        for name in ("patches", "frames"):
            _check_count(name, getattr(self, name))
        if self.slots is not None:
            _check_count("slots", self.slots)
            if self.index.shape[1] % self.slots:
                raise ValueError(
                    f"slots must divide the {self.index.shape[1]} rows of index, but {self.slots} does not"
                )
        if self.frame_counts is not None:
            if self.slots is not None:
                raise ValueError("frame_counts requires the ragged form (slots=None), but slots was given")
            _check_frame_counts(self.frame_counts, self.index.shape[0])
            if self.frame_counts.device != self.index.device:
                raise ValueError(f"frame_counts must be on {self.index.device}, but is on {self.frame_counts.device}")
            object.__setattr__(self, "frame_counts", self.frame_counts.long())
        if self.target_index is None:
            object.__setattr__(self, "target_index", self.index)
        else:
            _check_index("target_index", self.target_index, self.index.shape)
        if check:
            self.validate()

    @property
    def batch(self) -> int:
        """B, the number of videos."""
        return self.index.shape[0]

    @property
    def tokens(self) -> int:
        """N, the number of rows of each video."""
        return self.index.shape[1]

    @property
    def groups(self) -> int | None:
        """K, the number of groups of a regular grid, or None when ragged."""
        return None if self.slots is None else self.tokens // self.slots

    @property
    def sequences(self) -> int:
        """Number of temporal sequences of a video: K of a regular grid, P when ragged."""
        return self.patches if self.slots is None else self.tokens // self.slots

    @property
    def steps(self) -> int:
        """Number of spatial sequences of a video: S of a regular grid, T when ragged."""
        return self.frames if self.slots is None else self.slots

    @property
    def device(self) -> torch.device:
        """Device of ``index``."""
        return self.index.device

    def sequence_ids(self) -> Tensor:
        """Return int64 ``[B, N]``, the temporal sequence of each row (0 for padding rows)."""
        if self.slots is None:
            return self.index.clamp(min=0) // self.frames
        return self._rows().div(self.slots, rounding_mode="floor").expand(self.batch, -1)

    def step_ids(self) -> Tensor:
        """Return int64 ``[B, N]``, the spatial sequence (frame or slot) of each row (0 for padding rows)."""
        if self.slots is None:
            return self.index.clamp(min=0) % self.frames
        return self._rows().remainder(self.slots).expand(self.batch, -1)

    def step_weights(self, like: Tensor) -> Tensor:
        """Return ``[B, S]`` in float32 or wider, the weight of each slot or frame in a mean over the real ones."""
        return frame_weights(self.frame_counts, self.batch, self.steps, like)

    def _rows(self) -> Tensor:
        return torch.arange(self.tokens, device=self.device)

    def to(self, device: torch.device | str) -> VisibleTokens:
        """Return the same tokens with their tensors on ``device``."""
        same_target = self.target_index is self.index
        index = self.index.to(device)
        return VisibleTokens(
            index,
            self.patches,
            self.frames,
            self.slots,
            None if self.frame_counts is None else self.frame_counts.to(device),
            index if same_target else self.target_index.to(device),
            check=False,
        )

    def as_arguments(self, index: Tensor | None = None) -> tuple:
        """Return (index, frame_counts, patches, frames, slots), the last arguments of every registered op.

        ``index`` replaces :attr:`index` (token alignment passes :attr:`target_index`).
        """
        return self.index if index is None else index, self.frame_counts, self.patches, self.frames, self.slots

    def validate(self) -> VisibleTokens:
        """Check the values of the tensors and return self. Waits for the device.

        Raises:
            ValueError: an index is outside [0, patches·frames) (-1 is allowed at the end of a ragged row), does not
                ascend when ragged, occurs twice or belongs to a padding frame, or a frame count is outside
                [0, frames].
        """
        limit = self.patches * self.frames
        low = 0 if self.slots is not None else _PADDING
        for name in ("index", "target_index"):
            values = getattr(self, name)
            if values.numel() and (int(values.min()) < low or int(values.max()) >= limit):
                raise ValueError(
                    f"{name} must lie in [{low}, {limit}) for {self.patches} patches and {self.frames} frames, "
                    f"but holds values from {int(values.min())} to {int(values.max())}"
                )
        if bool(((self.index[:, :-1] < 0) & (self.index[:, 1:] >= 0)).any()):
            raise ValueError("index must hold -1 only at the end of a row, but a visible token follows one")
        if self.slots is None and bool(((self.index[:, 1:] <= self.index[:, :-1]) & (self.index[:, 1:] >= 0)).any()):
            raise ValueError("index of the ragged form must ascend, but an entry is not above the one before it")
        ordered = self.index.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            raise ValueError("index must name a token once in a video, but names one twice")
        counts = self.frame_counts
        if counts is not None:
            _check_frame_values(counts.tolist(), self.frames)
        if counts is not None and bool(
            (self.index % self.frames >= counts[:, None]).logical_and(self.index >= 0).any()
        ):
            raise ValueError("index must name tokens of real frames, but names one at or past a video's frame_counts")
        return self

    @staticmethod
    def all(
        batch: int,
        patches: int,
        frames: int,
        device: torch.device | str | None = None,
        slots: int | None = None,
    ) -> VisibleTokens:
        """Make every patch of every frame visible: ``index`` is ``[B, P·T]``.

        ``slots`` other than ``frames`` groups the same rows into a grid of that many slots: the published chat code
        uses ``frames // 2`` (arXiv 2309.15785's code; see ``BTAdapterVisionModel.video_tokens``). It must divide
        P·T.
        """
        _check_sizes(batch, patches, frames)
        index = torch.arange(patches * frames, device=device).expand(batch, -1)
        return VisibleTokens(index, patches, frames, frames if slots is None else slots, check=False)

    @staticmethod
    def tube(
        batch: int,
        patches: int,
        frames: int,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> VisibleTokens:
        """Draw tube masks (section 3.2 of the paper): each video keeps K patches, each in all T frames.

        K = P - int(ratio·P). ``ratio`` is the share masked, in [0, 1). ``generator`` must live on ``device``.
        """
        _check_ratio(ratio)
        _check_sizes(batch, patches, frames)
        kept = patches - int(ratio * patches)
        order = torch.rand(batch, patches, generator=generator, device=device).argsort(dim=1)
        chosen = order[:, :kept].sort(dim=1).values  # [B, K]
        index = chosen[:, :, None] * frames + torch.arange(frames, device=device)
        return VisibleTokens(index.flatten(1), patches, frames, frames, check=False)

    @staticmethod
    def random(
        batch: int,
        patches: int,
        frames: int,
        ratio: float,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        frame_counts: Tensor | None = None,
    ) -> VisibleTokens:
        """Draw N = P·T - int(ratio·P·T) tokens of each video from its first ``frame_counts[b]`` frames.

        A video with fewer tokens than N has its rows padded at the end with index -1. ``frame_counts`` is an int
        tensor ``[B]`` of values in [0, T], or None: all frames are real.
        """
        _check_ratio(ratio)
        _check_sizes(batch, patches, frames)
        total = patches * frames
        score = torch.rand(batch, total, generator=generator, device=device)
        if frame_counts is not None:
            frame_counts = torch.as_tensor(frame_counts)
            _check_frame_counts(frame_counts, batch)
            # Only on the CPU: reading them elsewhere would wait for the device.
            if frame_counts.device.type == "cpu" and not torch.compiler.is_compiling():
                _check_frame_values(frame_counts.tolist(), frames)
            frame_counts = frame_counts.to(score.device).long()
            real = torch.arange(total, device=score.device) % frames < frame_counts[:, None]
            score = score.masked_fill(~real, 2.0)  # above every draw, so padding frames sort last
        score, order = score.sort(dim=1)
        kept = total - int(ratio * total)
        order = order[:, :kept].masked_fill(score[:, :kept] > 1.0, total).sort(dim=1).values
        index = order.masked_fill(order == total, _PADDING)
        return VisibleTokens(index, patches, frames, None, frame_counts, check=False)

    @staticmethod
    def from_reference_mask(mask: Tensor, frames: int) -> VisibleTokens:
        """Read a mask as the published training code does: bool ``[B, T·P]``, True = masked.

        That code draws the mask frame-major (flat position t·P + p) but applies it to patch-major tokens
        (p·T + t), so the K·T visible rows are no tubes although its temporal attention takes each T neighbouring
        rows for one. Its token alignment selects the tower's tokens frame-major by the same mask, hence
        ``target_index`` differs from ``index``. Kept for parity with published numbers. Waits for the device.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim != 2:
            given = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be a bool tensor [B, T·P], but is {given}")
        _check_count("frames", frames)
        batch, total = mask.shape
        if total % frames:
            raise ValueError(f"mask must have a multiple of frames = {frames} columns, but has {total}")
        visible = (~mask).sum(1)
        kept = int(visible[0]) if batch else 0
        if batch and bool((visible != kept).any()):
            raise ValueError(f"mask must leave the same number of tokens in every video, but leaves {visible.tolist()}")
        if kept % frames:
            raise ValueError(f"mask must leave a multiple of frames = {frames} tokens in each video, but leaves {kept}")
        flat = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]  # unmasked first, ascending
        patches = total // frames
        target = (flat % patches) * frames + flat // patches
        return VisibleTokens(flat, patches, frames, frames, None, target, check=False)


def _check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, torch.SymInt):  # under torch.compile: guards on shapes check it
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but is {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, but is {value}")


def _check_sizes(batch: int, patches: int, frames: int) -> None:
    _check_count("batch", batch, least=0)
    _check_count("patches", patches)
    _check_count("frames", frames)


def _check_ratio(ratio: float) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"ratio must be a float in [0, 1), but is {type(ratio).__name__}")
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), but is {ratio}")


def _check_index(name: str, index: Tensor, shape: torch.Size | None) -> None:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or index.ndim != 2:
        given = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise ValueError(f"{name} must be an int64 tensor [B, N], but is {given}")
    if shape is not None and index.shape != shape:
        raise ValueError(f"{name} must have the shape of index, {list(shape)}, but is {list(index.shape)}")


def _check_frame_values(counts: list[int], frames: int) -> None:
    if any(not 0 <= count <= frames for count in counts):
        raise ValueError(f"frame_counts must lie in [0, {frames}], but holds {counts}")


def _check_frame_counts(counts: Tensor, batch: int) -> None:
    if not isinstance(counts, Tensor):
        raise TypeError(f"frame_counts must be an int tensor [{batch}], but is {type(counts).__name__}")
    if counts.is_floating_point() or counts.dtype == torch.bool or counts.shape != (batch,):
        raise ValueError(f"frame_counts must be an int tensor [{batch}], but is {counts.dtype} {list(counts.shape)}")
