"""Computes text-to-video and video-to-text retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.data.clips import Clip
from bt_adapter.eval.features import Look, extract
from bt_adapter.eval.ranking import Retrieval, dual_softmax, retrieval
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.towers.text import TextEncoder

Encode = Callable[[Sequence[str]], Tensor]
_TEXTS = 256  # captions encoded at once
_RANKS = ("median_rank", "mean_rank")


@dataclass(frozen=True)
class Scores:
    """Cosines of distinct captions and videos, and the pairs that belong together.

    A repeated caption is encoded and compared once, so that its scores are exactly equal and ties are detected.

    Attributes:
        cosines: ``[U, V]``, of distinct captions and videos.
        text: index of the caption (of U) of each pair of a caption and its video, int64 ``[Q]``.
        video: index of the video (of V) of each pair, int64 ``[Q]``.
    """

    cosines: Tensor
    text: Tensor
    video: Tensor

    def both_ways(self, temperature: float | None = None) -> tuple[Retrieval, Retrieval]:
        """Return the metrics of text to video, where only a caption's own video is correct, and of video to text, where
        all of a video's own captions are. The same caption of another video is wrong in both, and tied in the latter.

        temperature: temperature of the dual softmax; None: no dual softmax.
        """
        own = self.video[:, None] == torch.arange(self.cosines.shape[1], device=self.video.device)  # [Q, V]
        to_video, to_text = self.cosines[self.text], self.cosines.T
        if temperature is not None:
            to_video, to_text = dual_softmax(to_video, temperature), dual_softmax(to_text, temperature)
        return retrieval(to_video, own), retrieval(to_text[:, self.text], own.T)

    def shared(self) -> int:
        """Count the distinct captions that belong to more than one video."""
        pairs = set(zip(self.text.tolist(), self.video.tolist(), strict=True))
        return sum(count > 1 for count in Counter(text for text, _ in pairs).values())


def score(vectors: Tensor, captions: Sequence[Sequence[str]], encode: Encode) -> Scores:
    """Compute the cosines of videos and captions.

    Args:
        vectors: vectors of the videos, ``[V, F]``.
        captions: one or more captions of each video.
        encode: function from n captions to vectors ``[n, F]``, which need not be normalised.
    """
    different = {text: number for number, text in enumerate(dict.fromkeys(t for texts in captions for t in texts))}
    pairs = [(different[text], video) for video, texts in enumerate(captions) for text in texts]
    texts = encode_all(list(different), encode).to(vectors.device)
    return Scores(texts @ vectors.T, *torch.tensor(pairs, device=vectors.device).T)


def encode_all(texts: Sequence[str], encode: Encode) -> Tensor:
    """Encode texts as unit vectors, float32 ``[n, F]``."""
    parts = [encode(texts[first : first + _TEXTS]) for first in range(0, len(texts), _TEXTS)]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def figures(
    scores: Scores, captions: Sequence[Sequence[str]], text: TextEncoder, temperature: float | None
) -> dict[str, Any]:
    """Compute all reported metrics of clips with these captions; with a ``temperature``, also those of the dual
    softmax, as a separate entry."""
    result: dict[str, Any] = {
        "captions": len(scores.text),
        "captions_of_several_videos": scores.shared(),
        "captions_cut": len(text.too_long([caption for texts in captions for caption in texts])),
        **_named(scores.both_ways()),
    }
    if temperature is not None:
        result["dual_softmax"] = {"temperature": temperature, **_named(scores.both_ways(temperature))}
    return result


def rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return the head and rows of the result table."""
    found = []
    for label, part in (("", result), (", dual softmax", result.get("dual_softmax", {}))):
        for name, title in (("text_to_video", "text to video"), ("video_to_text", "video to text")):
            if name in part:
                one = part[name]
                shares = [f"{100 * one[key]:.1f}" for key in ("r1", "r5", "r10")]
                ranks = [f"{each[key]:.1f}" for each in (one, one["tie_corrected"]) for key in _RANKS]
                found.append([title + label, *shares, *ranks, str(one["queries"]), str(one["tied"])])
    corrected = ("MdR,\ntie-corrected", "MnR,\ntie-corrected")
    return ["%", "R@1", "R@5", "R@10", "MdR", "MnR", *corrected, "queries", "tied"], found


class Quick(NamedTuple):
    """Result of :func:`quick`.

    Attributes:
        to_video, to_text: metrics of the clips that can be decoded.
        failed: reason by key of each other clip.
        damaged: keys of the compared clips whose files are damaged or truncated.
    """

    to_video: Retrieval
    to_text: Retrieval
    failed: dict[str, str]
    damaged: list[str]


def quick(
    model: BTAdapterVisionModel,
    text: TextEncoder,
    clips: Sequence[Clip],
    frames: int,
    batch: int = 16,
    workers: int = 0,
) -> Quick:
    """Compute retrieval metrics in both directions for a training loop, without storing anything.

    With a process group, every process must call it; each computes its part and gets the same metrics. Clips that
    cannot be decoded are skipped and named. A branch sharded by FSDP2 must be unsharded (``unshard()``) beforehand.

    Args:
        model, text: on their device, in any mode.
        clips: clips with captions.
        frames, batch, workers: as for ``extract``.

    Raises:
        CommandError: as ``extract``.
    """
    features = extract(model, clips, Look(frames), batch=batch, workers=workers)
    scores = score(features.vectors, [clips[number].captions for number in features.kept], text)
    failed = {clips[number].key: reason for number, reason in features.failed.items()}
    return Quick(*scores.both_ways(), failed, [clips[number].key for number in features.truncated])


def _named(pair: tuple[Retrieval, Retrieval]) -> dict[str, Any]:
    return {name: one.to_dict() for name, one in zip(("text_to_video", "video_to_text"), pair, strict=True)}
