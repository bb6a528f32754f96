"""Embeds clips: decodes them in worker processes and embeds them in batches, on one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from bt_adapter.data import VideoError
from bt_adapter.data.clips import Clip, digest
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.loading import in_order
from bt_adapter.data.patience import read_patiently
from bt_adapter.errors import CommandError
from bt_adapter.eval.cache import Feature, FeatureCache, identity
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.time_steps import Long
from bt_adapter.progress import Progress
from bt_adapter.training.processes import Processes


@dataclass(frozen=True)
class Look:
    """Settings for sampling the frames of a clip.

    Attributes:
        frames: T, frames of one view. A video with fewer frames repeats some, evenly spread.
        sampling: "middle" or "reference", see ``bt_adapter.data.sample_indices``.
        views: number of views: frames·views frames are sampled, and view v takes every views-th of them starting at v,
            so each view spans the whole clip. The scores of the views are averaged.
        long: mapping of more frames than the branch was trained with to its time steps, see
            ``bt_adapter.model.time_steps.plan_steps``.
    """

    frames: int
    sampling: str = "middle"
    views: int = 1
    long: Long = "average"


@dataclass(frozen=True)
class Features:
    """Embeddings of a list of clips.

    Attributes:
        vectors: float32 ``[n, F]``, the mean of each clip's unit vectors over its views: the product with a text's unit
            vector is the mean of the views' cosines. Not normalised again.
        kept: indices of the embedded clips, ascending; clips of the same range of a file have exactly the same vector.
        failed: reason by index of each other clip.
        truncated: indices of the embedded clips whose files are damaged or truncated.
        computed: number of videos that this run decoded and embedded, over all processes.
    """

    vectors: Tensor
    kept: list[int]
    failed: dict[int, str]
    truncated: list[int]
    computed: int


def extract(
    model: BTAdapterVisionModel,
    clips: Sequence[Clip],
    look: Look,
    branch: bool = True,
    batch: int = 16,
    workers: int = 4,
    cache: FeatureCache | None = None,
    processes: Processes | None = None,
    progress: Progress | None = None,
) -> Features:
    """Embed clips; each of several processes computes its part, and all receive the vectors of all clips.

    Args:
        model: model on its device; if its tower is in half precision, all products are.
        branch: run the branch; False: average the frozen tower's embeddings over the frames.
        batch: clips per forward pass.
        workers: decoding processes of this process; 0: decode in this process.
        progress: called with (clips done, clips in total) of this process.

    Raises:
        CommandError: the processes have different clips, no clip can be used, a feature is not a finite number, or a
            decoding process died.
    """
    processes = processes or Processes(str(model.tower.position.device))
    # by source: a repeated video is embedded once, so that its vectors do not differ by rounding
    videos = list(dict.fromkeys((clip.source, clip.start, clip.end) for clip in clips))
    _check_same(processes, clips, len(videos))
    part = [Clip("", source, start=start, end=end) for source, start, end in videos[processes.rank :: processes.world]]
    training = model.training
    model.eval()
    try:
        mine = _Part(model, part, look, branch, cache or FeatureCache(None, {}))
        mine.compute(batch, workers, progress)
    finally:
        model.train(training)
    results: list[Any] = [None] * len(videos)
    gathered = processes.gather(mine.packed())
    for rank, packed in enumerate(gathered):
        results[rank :: processes.world] = packed.unpack()
    of_video = dict(zip(videos, results, strict=True))
    computed = sum(packed.computed for packed in gathered)
    return _features([of_video[clip.source, clip.start, clip.end] for clip in clips], computed)


def _check_same(processes: Processes, clips: Sequence[Clip], videos: int) -> None:
    """Raise CommandError if the processes have different clips: each selects its part by index."""
    lists = processes.gather((len(clips), videos, digest(clips)))
    if len(set(lists)) > 1:
        counts = ", ".join(f"{count} clips of {files} videos" for count, files, _ in lists)
        raise CommandError(
            f"the processes have different clips or another order of clips: {counts}; give all of them the same data"
        )


def _features(results: list[Feature | str], computed: int) -> Features:
    kept = {number: result for number, result in enumerate(results) if isinstance(result, Feature)}
    failed = {number: result for number, result in enumerate(results) if isinstance(result, str)}
    if not kept:
        reason = next(iter(failed.values()), "the list is empty")
        raise CommandError(f"none of {len(results)} clips can be used; the first one: {reason}")
    vectors = torch.stack([feature.views.mean(0) for feature in kept.values()])
    truncated = [number for number, feature in kept.items() if feature.truncated]
    return Features(vectors, list(kept), failed, truncated, computed)


@dataclass(frozen=True)
class _Packed:
    """Results of one process for sending to the others: one tensor, since pickling a row alone would include the memory
    of its whole batch."""

    results: list[Any]  # per clip: the reason of failure, or whether the file is damaged
    views: Tensor  # of the clips that did not fail
    computed: int

    def unpack(self) -> list[Feature | str]:
        """Return the feature, or the reason of failure, of each clip."""
        views = iter(self.views)
        return [result if isinstance(result, str) else Feature(next(views), result) for result in self.results]


class _Part:
    """The clips of one process. ``results``: for each clip its feature or the reason of failure."""

    def __init__(
        self, model: BTAdapterVisionModel, clips: list[Clip], look: Look, branch: bool, cache: FeatureCache
    ) -> None:
        self.model, self.clips, self.look, self.branch, self.cache = model, clips, look, branch, cache
        self.results: list[Any] = [None] * len(clips)
        self.identities = [""] * len(clips)
        self.computed = 0

    def compute(self, batch: int, workers: int, progress: Progress | None) -> None:
        """Fill ``results`` from the cache, then compute the missing features batch by batch."""
        missing = [number for number in range(len(self.clips)) if not self._load(number)]
        done = len(self.clips) - len(missing)
        cuda = self.model.tower.position.is_cuda
        frames = ClipFrames([self.clips[number] for number in missing], self.look, self.model.images, batch)
        for decoded in in_order(frames, 0, len(frames), min(workers, len(frames)), pin_memory=cuda):
            for place, reason in decoded.failed:
                self.results[missing[place]] = reason
            if decoded.frames is not None:
                self._add([missing[place] for place in decoded.places], decoded)
            done += len(decoded.places) + len(decoded.failed)
            if progress is not None:
                progress(done, len(self.clips))

    def packed(self) -> _Packed:
        """Return the results in a form for sending to other processes."""
        views = [result.views for result in self.results if isinstance(result, Feature)]
        results = [result.truncated if isinstance(result, Feature) else result for result in self.results]
        return _Packed(results, torch.stack(views) if views else torch.empty(0), self.computed)

    def _load(self, number: int) -> bool:
        """Fill a clip's result if it is cached or its file is missing; return whether it is filled."""
        try:
            clip = self.clips[number]
            self.identities[number] = read_patiently(clip.path, identity, clip)
        except VideoError as error:
            self.results[number] = str(error)
        else:
            self.results[number] = self.cache.get(self.identities[number])
        return self.results[number] is not None

    def _add(self, numbers: list[int], decoded: Decoded) -> None:
        assert decoded.frames is not None
        views = embed(self.model, decoded.frames.flatten(0, 1), self.branch, self.look.long)
        if not views.isfinite().all():
            raise CommandError(
                f"features of {self.model.tower.dtype} are not finite numbers; use --dtype float32 or bfloat16"
            )
        views = views.unflatten(0, (len(numbers), self.look.views)).cpu()
        found = [Feature(*pair) for pair in zip(views, decoded.truncated, strict=True)]
        self.cache.add({self.identities[n]: feature for n, feature in zip(numbers, found, strict=True)})
        for number, feature in zip(numbers, found, strict=True):
            self.results[number] = feature
        self.computed += len(numbers)


@torch.no_grad()
def embed(model: BTAdapterVisionModel, frames: Tensor, branch: bool = True, long: Long = "average") -> Tensor:
    """Embed clips, uint8 ``[n, T, 3, S, S]``, as unit vectors float32 ``[n, F]``; without branch, average frames."""
    device, dtype = model.tower.position.device, model.tower.dtype
    frames = frames.to(device, non_blocking=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        pixels = model.images.normalise(frames.flatten(0, 1), dtype)
        if branch:
            vectors = model(pixels.unflatten(0, frames.shape[:2]), long=long).video_embeds
        else:
            vectors = model.image_embeds(pixels).float().unflatten(0, frames.shape[:2]).mean(1)
    return F.normalize(vectors.float(), dim=-1)


class Decoded(NamedTuple):
    """A decoded batch: indices and frames of the readable clips, and indices and reasons of the others."""

    places: list[int]
    frames: Tensor | None  # uint8 [n, views, T, 3, S, S]; None where every clip failed
    truncated: list[bool]
    failed: list[tuple[int, str]]


class ClipFrames(Dataset):
    """A data set of batches of clips, decoded, resized and cropped."""

    def __init__(self, clips: Sequence[Clip], look: Look, images: ImageSettings, batch: int) -> None:
        self.clips, self.look, self.images, self.batch = clips, look, images, batch

    def __len__(self) -> int:
        return -(-len(self.clips) // self.batch)

    def __getitem__(self, number: int) -> Decoded:
        decoded = Decoded([], None, [], [])
        frames = []
        for place in range(number * self.batch, min((number + 1) * self.batch, len(self.clips))):
            clip = self.clips[place]
            try:
                views, truncated = read_patiently(clip.path, self._read, clip)
            except VideoError as error:
                decoded.failed.append((place, str(error)))
            else:
                decoded.places.append(place)
                decoded.truncated.append(truncated)
                frames.append(views)
        return decoded._replace(frames=torch.stack(frames)) if frames else decoded

    def _read(self, clip: Clip) -> tuple[Tensor, bool]:
        """Read the views uint8 ``[views, T, 3, S, S]``, and whether the file is damaged or truncated."""
        count = self.look.frames * self.look.views
        video = clip.read(count, sampling=self.look.sampling, repeat=True, side=self.images.largest_side)
        frames = self.images.crop(video.frames)  # [T·views, 3, S, S]
        return frames.unflatten(0, (self.look.frames, self.look.views)).transpose(0, 1), video.truncated
