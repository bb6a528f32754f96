"""Loads batches of training clips that depend on the seed and the step alone, not on the number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bt_adapter.data.clips import Clip
from bt_adapter.data.packed import Packed
from bt_adapter.data.patience import read_patiently
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.transforms import TrainTransform
from bt_adapter.data.video import VideoError
from bt_adapter.data.workers import begin_worker, worker_context
from bt_adapter.errors import CommandError

# Most clips tried for one place of a batch. If all of them are unreadable, the data set is at fault.
ATTEMPTS = 100
_NOISE = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """A clip of a step: ``frames`` uint8 ``[T, 3, S, S]``, one caption, key and reason of each unreadable clip tried
    before it (``failed``), and its key if its file is damaged (``damaged``)."""

    frames: Tensor
    caption: str
    failed: tuple[tuple[str, str], ...] = ()
    damaged: str | None = None


@dataclass(frozen=True)
class Batch:
    """The clips of one step on one process.

    Attributes:
        frames: uint8 ``[B, T, 3, S, S]``, RGB.
        captions: one for each clip.
        failed: key and reason of each unreadable clip that another clip replaced. It is listed again when it recurs in
            a later epoch.
        damaged: keys of the clips in this batch whose files are damaged or truncated.
    """

    frames: Tensor
    captions: list[str]
    failed: list[tuple[str, str]]
    damaged: list[str]

    def pin_memory(self) -> Batch:
        """Return a copy in page-locked memory; DataLoader calls this method by its name."""
        return replace(self, frames=self.frames.pin_memory())


class Damaged(Skipped):
    """Clips that are used although their files are damaged or truncated; they do not count as skipped."""

    def note(self, keys: Sequence[str]) -> None:
        """Add the damaged clips of a batch."""
        for key in keys:
            self.add(key, "damaged or truncated")

    def report(self, named: int | None = None) -> str:
        """Return the number of clips and their keys, at most ``named`` of them (None: all)."""
        keys = list(self.reasons)
        more = f" and {len(keys) - named} more" if named is not None and len(keys) > named else ""
        return f"{len(keys)} used though damaged or truncated: {', '.join(keys[:named])}{more}"


class Clips(Protocol):
    """A source of clips for :func:`batches`."""

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Return clip ``place``, from 0, of the ``batch`` clips of a step."""
        ...

    def check(self, batch: int) -> None:
        """Raise CommandError if batches of ``batch`` clips are impossible."""
        ...


class TrainingClips:
    """Training clips, shuffled every epoch; each draw takes one frame per segment, one crop and one caption.

    Args:
        clips: clips with at least one caption. They are stored as one block of bytes that worker processes share.
        frames: T, or a function from the step's number to T (picklable if worker processes decode); a clip with fewer
            frames repeats some.
        transform: its :meth:`~TrainTransform.crop` is applied.
        seed: seed of all draws.
        group: number of consecutive clips that stay next to each other in one batch; groups are shuffled. An
            incomplete last group is left out.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        frames: int | Callable[[int], int],
        transform: TrainTransform,
        seed: int,
        group: int = 1,
    ) -> None:
        self.frames, self.transform, self.seed, self.group = frames, transform, seed, group
        self._packed = Packed(clips)
        self._known: dict[int, tuple[str, str]] = {}  # clips that this process found unreadable

    def __len__(self) -> int:
        return len(self._packed) // self.group * self.group

    def check(self, batch: int) -> None:
        """Raise CommandError if there are fewer clips than one batch, or a batch cannot hold whole groups."""
        if batch % self.group:
            raise CommandError(f"the batch of {batch} clips must be a multiple of the group of {self.group} clips")
        if len(self) < batch:
            raise CommandError(f"there are {len(self)} clips, fewer than one batch of {batch}")

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Draw clip ``place`` of step ``step`` in batches of ``batch``; an epoch's incomplete last batch is left out.

        An unreadable clip is replaced by the clip at the same place of the next batch in the epoch's order, and so on,
        so a batch repeats none of its own clips while there are others. With groups, the replacement has the same
        place in another group.

        Raises:
            CommandError: ``ATTEMPTS`` clips (or all) are unreadable, or storage fails permanently.
        """
        count = len(self)
        epoch, within = divmod(step, count // batch)
        position = within * batch + place
        (first, member), size = divmod(position, self.group), batch // self.group
        groups = count // self.group
        stride = next(s for s in range(size, size + groups + 1) if math.gcd(s, groups) == 1)  # visits every group
        frames = self.frames if isinstance(self.frames, int) else self.frames(step)
        failed: list[tuple[str, str]] = []
        for attempt in range(min(ATTEMPTS, groups)):
            group = shuffled((first + attempt * stride) % groups, groups, self.seed, epoch)
            number = group * self.group + member
            try:
                drawn = self._read(number, frames, numbers_seed(self.seed, epoch, position, attempt))
            except _Unreadable as error:
                failed.append(error.named)
            else:
                return replace(drawn, failed=tuple(failed))
        named = "; ".join(f"{key}: {reason}" for key, reason in failed[:3])
        raise CommandError(f"none of the {len(failed)} clips tried for one place of a batch can be read: {named}")

    def _read(self, number: int, frames: int, seed: int) -> Drawn:
        if number in self._known:
            raise _Unreadable(self._known[number])
        clip = self._packed[number]
        try:
            return read_patiently(clip.path, self._draw, clip, frames, seed)
        except VideoError as error:
            self._known[number] = clip.key, str(error)
            raise _Unreadable(self._known[number]) from error

    def _draw(self, clip: Clip, frames: int, seed: int) -> Drawn:
        generator = torch.Generator().manual_seed(seed)  # new: all attempts draw the same
        caption = clip.captions[int(torch.randint(len(clip.captions), (), generator=generator))]
        video = clip.read(
            frames, sampling="random", generator=generator, repeat=True, threads=1, side=self.transform.size
        )
        cropped = self.transform.crop(video.frames, generator)
        return Drawn(cropped, caption, damaged=clip.key if video.truncated else None)


class SyntheticClips:
    """An endless source of noise clips with captions, to measure a run without reading data.

    Args:
        frames: T, or its maximum. size: S in pixels. seed: seed of all draws.
        frames_of: function from the step's number to T; None: T is always ``frames``.
    """

    def __init__(self, frames: int, size: int, seed: int, frames_of: Callable[[int], int] | None = None) -> None:
        self.shape, self.seed, self.frames_of = (frames, 3, size, size), seed, frames_of
        generator = torch.Generator().manual_seed(seed)
        # Each clip is another window of this noise: drawing every pixel would cost more than decoding a video.
        self._noise = torch.randint(256, (math.prod(self.shape) + _NOISE,), dtype=torch.uint8, generator=generator)

    def check(self, batch: int) -> None:
        """Accept any batch size."""

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Return clip ``place`` of step ``step``."""
        number = step * batch + place
        start = numbers_seed(self.seed, number) % _NOISE
        frames = self._noise[start : start + math.prod(self.shape)].view(self.shape)
        return Drawn(frames if self.frames_of is None else frames[: self.frames_of(step)], f"clip number {number}")


def batches(
    clips: Clips, size: int, rank: int, world: int, done: int, steps: int, workers: int, pin_memory: bool = False,
    prefetch: int = 2,
) -> Iterator[Batch]:  # fmt: skip
    """Iterate over the batches of the steps from ``done`` to ``steps``.

    A step's clips depend only on the seed and the step's number, not on the workers or on where the run was resumed.
    All processes together get the same clips whatever their number; each takes a contiguous part.

    Args:
        clips: a :class:`TrainingClips` or :class:`SyntheticClips`.
        size: clips per batch on this process.
        rank, world: rank of this process and number of processes.
        done, steps: steps done before, and steps in total.
        workers: decoding processes, alive as long as the iterator; 0: decode in this process.
        pin_memory: put the frames into page-locked memory.
        prefetch: batches that each worker loads in advance.

    Raises:
        CommandError: there are fewer clips than one batch of all processes; while iterating: no clip can be read, or a
            worker died.
    """
    clips.check(size * world)
    return in_order(_Steps(clips, size, rank, world), done, steps, workers, pin_memory, prefetch)


def in_order(
    dataset: Dataset, done: int, steps: int, workers: int, pin_memory: bool = False, prefetch: int = 2
) -> Iterator[Any]:
    """Iterate over ``dataset[step]`` for ``step`` in ``range(done, steps)``; other arguments as for :func:`batches`.

    With ``workers`` the data set is pickled to each of them, and a script must call this below
    ``if __name__ == "__main__":``, as with every process that Python does not fork.

    A CommandError, OSError or VideoError of the data set is raised here unchanged, also from a worker process.
    """
    loader = DataLoader(
        _ReturningErrors(dataset), batch_size=None, sampler=range(done, steps), num_workers=workers,
        pin_memory=pin_memory, prefetch_factor=prefetch if workers else None, worker_init_fn=begin_worker,
        multiprocessing_context=worker_context() if workers else None,
        generator=torch.Generator(),  # else DataLoader draws from the global one
    )  # fmt: skip
    return _checked(iter(loader), workers)


def _checked(batches: Iterator[Any], workers: int) -> Iterator[Any]:
    while True:
        try:
            batch = next(batches, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise CommandError(
                f"a decoding process died ({error}); if memory or shared memory (/dev/shm) ran out, use fewer workers "
                f"(now {workers}) or a smaller prefetch"
            ) from error
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _ReturningErrors(Dataset):
    """A data set that returns errors meant for the user: DataLoader would wrap a worker's error in a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except (CommandError, OSError, VideoError) as error:
            return error


class _Steps(Dataset):
    """A data set that maps a step's number to its batch."""

    def __init__(self, clips: Clips, size: int, rank: int, world: int) -> None:
        self.clips, self.size, self.rank, self.world = clips, size, rank, world

    def __getitem__(self, step: int) -> Batch:
        first = self.rank * self.size
        drawn = [self.clips.draw(step, first + place, self.size * self.world) for place in range(self.size)]
        return Batch(
            torch.stack([clip.frames for clip in drawn]),
            [clip.caption for clip in drawn],
            [named for clip in drawn for named in clip.failed],
            [clip.damaged for clip in drawn if clip.damaged is not None],
        )


class _Unreadable(Exception):
    """A clip cannot be read; ``named`` is its key and the reason."""

    def __init__(self, named: tuple[str, str]) -> None:
        super().__init__(*named)
        self.named = named


def shuffled(position: int, count: int, seed: int, epoch: int) -> int:
    """Return the index, below ``count``, at ``position`` of an epoch's permutation, without storing the permutation.

    A Feistel network permutes the next even power of two; it is applied again while its result is not below ``count``.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for network_round in range(6):
            left, right = right, left ^ (numbers_seed(seed, epoch, network_round, right) & mask)
        position = left << half | right
        if position < count:
            return position


def numbers_seed(*numbers: int) -> int:
    """Hash the numbers to a 63-bit seed; neighbouring numbers give unrelated seeds."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
