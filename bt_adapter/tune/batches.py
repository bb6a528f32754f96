"""The input of every step, which depends on the seed and the step alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from bt_adapter.data import VideoError, read_image, read_video
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.loading import numbers_seed
from bt_adapter.data.packed import Packed
from bt_adapter.data.patience import read_patiently
from bt_adapter.tune.conversations import Source
from bt_adapter.tune.features import FeatureStore
from bt_adapter.tune.tokens import IGNORED, Example

GROUP = 50  # batches whose conversations are sorted by length together


class Order:
    """The order of conversations: each once per epoch, with those of similar length in one batch.

    Args:
        lengths: tokens of each conversation. batch: conversations per step; the last step of an epoch may have fewer.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths, self.batch, self.seed = np.asarray(lengths), batch, seed
        self.steps_per_epoch = -(-len(self.lengths) // batch)
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def step(self, step: int) -> np.ndarray:
        """Numbers of the conversations of a step (from 0), longest first."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._draw(epoch))
        return self._epoch[1][within]

    def _draw(self, epoch: int) -> list[np.ndarray]:
        draws = np.random.default_rng(numbers_seed(self.seed, epoch))
        shuffled = draws.permutation(len(self.lengths))
        batches = []
        for start in range(0, len(shuffled), self.batch * GROUP):
            group = shuffled[start : start + self.batch * GROUP]
            group = group[np.argsort(-self.lengths[group], kind="stable")]
            batches += [group[i : i + self.batch] for i in range(0, len(group), self.batch)]
        return [batches[number] for number in draws.permutation(len(batches))]


@dataclass(frozen=True)
class Part:
    """Conversations that run through the model together.

    Attributes:
        examples: B of them.
        visuals: videos and stills of all examples, in order: a video's frames uint8 ``[T, 3, S, S]`` or its stored
            features ``[T, 1+P, D]`` in half precision; a still uint8 ``[3, S, S]``.
        seeds: seed of stochastic depth for each of ``visuals``, independent of process and part.
    """

    examples: tuple[Example, ...]
    visuals: tuple[Tensor, ...]
    seeds: tuple[int, ...]

    @property
    def answer_tokens(self) -> int:
        """Number of positions with a target."""
        return sum(example.answer_tokens for example in self.examples)

    def padded(self, pad: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, targets and the mask, False at padding, ``[B, S]`` each, padded at the end."""
        rows = [example.expand() for example in self.examples]
        ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad)
        targets = torch.nn.utils.rnn.pad_sequence([t for _, t in rows], batch_first=True, padding_value=IGNORED)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(ids) for ids, _ in rows])[:, None]
        return ids, targets, mask

    def packed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, targets and position ids, ``[1, S]`` each; the positions of each conversation begin at 0."""
        rows = [example.expand() for example in self.examples]
        positions = torch.cat([torch.arange(len(ids)) for ids, _ in rows])
        return torch.cat([ids for ids, _ in rows])[None], torch.cat([t for _, t in rows])[None], positions[None]


@dataclass(frozen=True)
class Step:
    """One process's conversations of a step, in parts; ``failed``: key and reason of those that could not be read."""

    parts: tuple[Part, ...]
    failed: tuple[tuple[str, str], ...]


class VisualReader:
    """Reads videos and stills.

    Args:
        images: resizing and cropping, or S, the image size in pixels with CLIP's own. frames: T; frames of a shorter
            video are repeated. store: stored features, read instead of decoding.
    """

    def __init__(self, images: ImageSettings | int, frames: int, store: FeatureStore | None = None) -> None:
        self.images = ImageSettings(images) if isinstance(images, int) else images
        self.frames, self.store = frames, store

    def __call__(self, source: Source) -> Tensor:
        """Read a video or still as in :class:`Part`. Raises VideoError, CommandError if storage keeps failing."""
        if source.kind == "image":
            return read_patiently(source.path, self._still, source.path)
        if self.store is None:
            return self.decode(source.path)
        return read_patiently(source.path, self.store.read, source.path)

    def decode(self, path: str) -> Tensor:
        """Decode evenly spread frames of a video, uint8 ``[T, 3, S, S]``. Raises as :meth:`__call__`."""
        return read_patiently(path, self._frames, path)

    def _still(self, path: str) -> Tensor:
        return self.images.crop(read_image(path)[None])[0]

    def _frames(self, path: str) -> Tensor:
        return self.images.crop(read_video(path, self.frames, repeat=True, side=self.images.largest_side).frames)


class Steps(Dataset):
    """One process's part of every step.

    Args:
        examples: all examples. order: chooses those of a step. visuals: reads their videos and stills.
        rank, world: number of this process, and of processes. parts: parts into which the process's share is cut.
    """

    def __init__(
        self, examples: Sequence[Example], order: Order, visuals: VisualReader, rank: int, world: int, parts: int
    ) -> None:
        self.examples, self.order, self.visuals = Packed(examples), order, visuals  # shared with worker processes
        self.rank, self.world, self.parts = rank, world, parts

    def __getitem__(self, step: int) -> Step:
        # longest first and dealt out in turn, so that all processes have about the same work
        mine = self.order.step(step)[self.rank :: self.world]
        read, failed = [], []
        for number in mine:
            example = self.examples[number]
            try:
                read_visuals = [self.visuals(source) for source in example.sources]
                seeds = [numbers_seed(self.order.seed, step, int(number), place) for place in range(len(read_visuals))]
                read.append((example, read_visuals, seeds))
            except VideoError as error:
                failed.append((example.key, str(error)))
        parts = []
        size = -(-len(read) // self.parts) or 1
        for start in range(0, len(read), size):
            chosen = read[start : start + size]
            visuals = tuple(visual for _, found, _ in chosen for visual in found)
            drops = tuple(seed for _, _, seeds in chosen for seed in seeds)
            parts.append(Part(tuple(example for example, _, _ in chosen), visuals, drops))
        return Step(tuple(parts), tuple(failed))
