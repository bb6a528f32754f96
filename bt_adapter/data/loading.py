"""Batches of training clips, the same whatever reads them: a function of the seed and the step alone."""

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

# So many clips are tried in the place of one that cannot be read. Where all of them fail, the data is at fault.
ATTEMPTS = 100
_NOISE = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """A clip as a step sees it: uint8 ``[T, 3, S, S]``, a caption, what was tried in vain before it, and its key where
    its file is damaged."""

    frames: Tensor
    caption: str
    failed: tuple[tuple[str, str], ...] = ()
    damaged: str | None = None


@dataclass(frozen=True)
class Batch:
    """One process's clips of a step.

    Attributes:
        frames: uint8 ``[B, T, 3, S, S]``, RGB.
        captions: one for each clip.
        failed: key and reason of each clip that could not be read and had another put in its place. A clip that comes
            again in a later epoch is named again.
        damaged: keys of the clips among these whose files are damaged or cut short.
    """

    frames: Tensor
    captions: list[str]
    failed: list[tuple[str, str]]
    damaged: list[str]

    def pin_memory(self) -> Batch:
        """The same in page-locked memory (the loader asks for it by this name)."""
        return replace(self, frames=self.frames.pin_memory())


class Damaged(Skipped):
    """Clips that are used, though their files are damaged or cut short. They count in no share of unusable ones."""

    def note(self, keys: Sequence[str]) -> None:
        """Take over a batch's."""
        for key in keys:
            self.add(key, "damaged or cut short")

    def report(self, named: int | None = None) -> str:
        """All keys, with their number; at most ``named`` of them (None: all)."""
        keys = list(self.reasons)
        more = f" and {len(keys) - named} more" if named is not None and len(keys) > named else ""
        return f"{len(keys)} used though damaged or cut short: {', '.join(keys[:named])}{more}"


class Clips(Protocol):
    """What :func:`batches` takes its clips from."""

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Clip number ``place`` of the ``batch`` clips of a step, counted from 0."""
        ...

    def check(self, batch: int) -> None:
        """Raise CommandError if there cannot be batches of so many clips."""
        ...


class TrainingClips:
    """Clips in another order every epoch; of each one frame a segment, one crop and one caption are drawn.

    Args:
        clips: with a caption each. They are kept as one block of bytes, which worker processes share.
        frames: T, or a function that gives T of each step by its number (picklable where worker processes decode); a
            shorter clip repeats frames.
        transform: whose :meth:`~TrainTransform.crop` is taken.
        seed: of all draws.
        group: so many clips in a row always come together, side by side in one batch; the order is one of groups. The
            last clips, fewer than a group, are left out.
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
        self._known: dict[int, tuple[str, str]] = {}  # clips this process found that cannot be read

    def __len__(self) -> int:
        return len(self._packed) // self.group * self.group

    def check(self, batch: int) -> None:
        """Raise CommandError if they are fewer than one batch, or a batch is no number of whole groups."""
        if batch % self.group:
            raise CommandError(f"a batch of {batch} clips cannot hold whole groups of {self.group}")
        if len(self) < batch:
            raise CommandError(f"there are {len(self)} clips, fewer than one batch of {batch}")

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Clip ``place`` of step ``step`` in batches of ``batch``; the last, incomplete batch of an epoch is left out.

        In the place of a clip that cannot be read comes the one of the same place in the next batch of the epoch's
        order, and so on: no other clip of the same batch, as long as there are more. Of groups it is the clip of the
        same place in another group.

        Raises:
            CommandError: none of so many clips can be read, or storage fails for good.
        """
        count = len(self)
        epoch, within = divmod(step, count // batch)
        position = within * batch + place
        (first, member), size = divmod(position, self.group), batch // self.group
        groups = count // self.group
        stride = next(s for s in range(size, size + groups + 1) if math.gcd(s, groups) == 1)  # passes through all
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
        raise CommandError(f"none of {len(failed)} clips that were tried for one place can be read: {named}")

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
        generator = torch.Generator().manual_seed(seed)  # anew for each attempt to read: all draw the same
        caption = clip.captions[int(torch.randint(len(clip.captions), (), generator=generator))]
        video = clip.read(
            frames, sampling="random", generator=generator, repeat=True, threads=1, side=self.transform.size
        )
        cropped = self.transform.crop(video.frames, generator)
        return Drawn(cropped, caption, damaged=clip.key if video.truncated else None)


class SyntheticClips:
    """Noise with captions, without end: what a run costs without reading any data.

    Args:
        frames: T, or the most there are. size: S. seed: of all draws.
        frames_of: T of each step by its number; None: all have ``frames``.
    """

    def __init__(self, frames: int, size: int, seed: int, frames_of: Callable[[int], int] | None = None) -> None:
        self.shape, self.seed, self.frames_of = (frames, 3, size, size), seed, frames_of
        generator = torch.Generator().manual_seed(seed)
        # A clip is a window of it, elsewhere for each: to draw every pixel costs more than a decoder takes.
        self._noise = torch.randint(256, (math.prod(self.shape) + _NOISE,), dtype=torch.uint8, generator=generator)

    def check(self, batch: int) -> None:
        """Any number will do."""

    def draw(self, step: int, place: int, batch: int) -> Drawn:
        """Clip ``place`` of step ``step``."""
        number = step * batch + place
        start = numbers_seed(self.seed, number) % _NOISE
        frames = self._noise[start : start + math.prod(self.shape)].view(self.shape)
        return Drawn(frames if self.frames_of is None else frames[: self.frames_of(step)], f"clip number {number}")


def batches(
    clips: Clips, size: int, rank: int, world: int, done: int, steps: int, workers: int, pin_memory: bool = False,
    prefetch: int = 2,
) -> Iterator[Batch]:  # fmt: skip
    """Batches of the steps after ``done`` up to ``steps``.

    What a step gets depends on the seed and its number only: not on workers, not on where the run was resumed. The
    clips of all processes together are the same however many they are; each takes its contiguous part.

    Args:
        clips: a :class:`TrainingClips` or :class:`SyntheticClips`.
        size: clips of a batch of this process.
        rank, world: which process of how many this is.
        done, steps: steps done before, and in all.
        workers: processes that decode, for as long as the iterator lives; 0: this one does.
        pin_memory: put the frames into page-locked memory.
        prefetch: batches each worker is ahead.

    Raises:
        CommandError: there are fewer clips than one batch of all processes; while iterating: no clip can be read, or a
            worker died.
    """
    clips.check(size * world)
    return in_order(_Steps(clips, size, rank, world), done, steps, workers, pin_memory, prefetch)


def in_order(
    dataset: Dataset, done: int, steps: int, workers: int, pin_memory: bool = False, prefetch: int = 2
) -> Iterator[Any]:
    """``dataset[step]`` of the steps after ``done`` up to ``steps``, counted from 0; the rest as for :func:`batches`.

    With ``workers`` the data set is sent to each of them, so it must be picklable, and a script that calls this must do
    so below ``if __name__ == "__main__":``, as with every process that Python does not fork.

    A CommandError, OSError or VideoError that the data set raises is raised here as it is, also from a worker process.
    """
    loader = DataLoader(
        _ReturningErrors(dataset), batch_size=None, sampler=range(done, steps), num_workers=workers,
        pin_memory=pin_memory, prefetch_factor=prefetch if workers else None, worker_init_fn=begin_worker,
        multiprocessing_context=worker_context() if workers else None,
        generator=torch.Generator(),  # or it draws from the global one
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
                f"a process that decodes died ({error}); where memory or shared memory (/dev/shm) ran out, fewer of "
                f"them (now {workers}) or a smaller prefetch help"
            ) from error
        if batch is None:
            return
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _ReturningErrors(Dataset):
    """A data set that returns errors meant for the user: raised in a worker they would come inside a traceback."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, number: int) -> Any:
        try:
            return self.dataset[number]
        except (CommandError, OSError, VideoError) as error:
            return error


class _Steps(Dataset):
    """Batch by number of the step."""

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
    """A clip that cannot be read, with its key and the reason."""

    def __init__(self, named: tuple[str, str]) -> None:
        super().__init__(*named)
        self.named = named


def shuffled(position: int, count: int, seed: int, epoch: int) -> int:
    """Which of ``count`` things stands at ``position`` of an epoch's order: a permutation, one value at a time.

    A Feistel network over the next even power of two, gone through again while it leads outside of ``count``.
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(6):
            left, right = right, left ^ (numbers_seed(seed, epoch, turn, right) & mask)
        position = left << half | right
        if position < count:
            return position


def numbers_seed(*numbers: int) -> int:
    """63 bits that depend on all the numbers, such that neighbours share nothing."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
