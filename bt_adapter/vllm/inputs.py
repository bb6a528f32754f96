"""Pixels and numbers of tokens of stills and videos, by the processor of a video chat model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Pixels = dict[str, list[Tensor]]


def prepare(
    processor: Any, images: Sequence[Any], videos: Sequence[Any], options: Mapping[str, object] | None = None
) -> Pixels:
    """Convert stills and videos to a model's inputs, each with one tensor per still or video.

    Args:
        processor: the model's, with the mixin ``VideoProcessing``.
        images: stills, in a format of the processor's image processor.
        videos: frames in memory each: PIL images, or uint8 ``[T, H, W, 3]`` or ``[T, 3, H, W]``.
        options: ``num_frames``, the number of frames that are taken of each video, evenly spread; without it all are.

    Returns:
        "pixel_values" (``[3, h, w]`` each; LLaVA-NeXT: ``[tiles, 3, h, w]``) and, of LLaVA-NeXT, "image_sizes" (int
        ``[2]`` each) if there are stills, "pixel_values_videos" (float32 ``[T, 3, h, w]`` each) if there are videos.

    Raises:
        ValueError: another option. TypeError: a video in another form.
    """
    options = dict(options or {})
    frames = options.pop("num_frames", None)
    if options:
        raise ValueError(f"mm_processor_kwargs take only num_frames, but have {', '.join(sorted(options))}")
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool) or frames < 1):
        raise ValueError(f"num_frames must be a positive int, but is {frames!r}")
    found: Pixels = {}
    if images:
        batches = [processor.image_processor(images=[image], return_tensors="pt") for image in images]
        for name in ("pixel_values", "image_sizes"):
            if name in batches[0]:
                found[name] = [batch[name][0] for batch in batches]
    if videos:
        read = processor.video_processor
        found["pixel_values_videos"] = [read(video, num_frames=frames) for video in videos]
    return found


def count_tokens(processor: Any, height: int, width: int) -> int:
    """Return the number of tokens of a still of that size, in pixels, in a prompt; a video has ``video_length``."""
    (count,) = processor._get_num_multimodal_tokens([(height, width)])["num_image_tokens"]
    return int(count)


def video_token(config: Any) -> int:
    """Return the id of a video's token. Raises ValueError if the configuration names none."""
    if (token := config.video_token_index) is None:
        raise ValueError(
            "config.json names no video_token_index: write the folder with bt-adapter export or VideoChat.save, or set "
            "it by make_processor(model, processor) before model.save_pretrained"
        )
    return int(token)
