"""Encode videos as the language model's embeddings with the modules of a video chat model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bt_adapter.chat.families import family_of
from bt_adapter.chat.families.attachment import attachment_of


def split_videos(pixel_values: Tensor | Sequence[Tensor], frame_counts: Tensor | None = None) -> list[Tensor]:
    """Split a batch into the frames of each video, ``[T, 3, h, w]``, without padding.

    Args:
        pixel_values: ``[V, T, 3, h, w]``, or a list of ``[T, 3, h, w]``.
        frame_counts: int ``[V]``, number of frames of each video without padding; None: all.

    Raises:
        TypeError, ValueError: a wrong type, shape or count.
    """
    videos = list(pixel_values)
    for number, video in enumerate(videos):
        if not isinstance(video, Tensor) or not video.is_floating_point():
            raise TypeError(f"pixel_values_videos[{number}] must be a float tensor, but is {type(video).__name__}")
        if video.ndim != 4 or video.shape[1] != 3 or not len(video):
            raise ValueError(
                f"pixel_values_videos[{number}] must be frames [T, 3, h, w], T 1 or more, but is {list(video.shape)}"
            )
    if frame_counts is None:
        return videos
    counts = frame_counts.tolist()
    if len(counts) != len(videos):
        raise ValueError(f"video_frame_counts must name {len(videos)} videos, but names {len(counts)}")
    for number, (count, video) in enumerate(zip(counts, videos, strict=True)):
        if not 1 <= count <= len(video):
            raise ValueError(f"video_frame_counts[{number}] must lie in 1..{len(video)}, but is {count}")
    return [video[:count] for video, count in zip(videos, counts, strict=True)]


def encode_videos(
    chat: Any, videos: Sequence[Tensor], use_branch: bool | None, question: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """Encode each video as embeddings ``[tokens, W]``; videos of the same length run as one batch.

    Args:
        chat: the model.
        videos: normalised frames ``[T, 3, h, w]`` each.
        use_branch: False: the mean over the frames instead of the branch; None: the model's setting.
        question: ``input_ids`` and ``attention_mask`` for InstructBLIP's Q-Former, one row per video.
    """
    family, attachment = family_of(chat), attachment_of(chat)
    groups: dict[torch.Size, list[int]] = {}
    for number, video in enumerate(videos):
        groups.setdefault(video.shape, []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in groups.values():
        pixels = torch.stack([videos[number].as_subclass(Tensor) for number in numbers])
        tokens = attachment.encode(pixels, long=chat.config.long_videos, branch=use_branch)
        rows_of_group = None if question is None else {name: rows[numbers] for name, rows in question.items()}
        found |= zip(numbers, family.project(tokens, rows_of_group), strict=True)
    return [found[number] for number in range(len(videos))]
