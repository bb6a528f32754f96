"""Processors of video chat models, which convert text, stills and video files to the model's inputs.

They decode videos with this package's own reader and need neither torchvision nor another decoder.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AddedToken,
    BatchFeature,
    Blip2Processor,
    InstructBlipProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.image_utils import make_flat_list_of_images
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from bt_adapter.chat.families import Family, family_of
from bt_adapter.chat.native.template import with_videos
from bt_adapter.data import read_video
from bt_adapter.data.image_settings import ImageSettings, settings_of_processor

VIDEO_TOKEN = "<video>"
_FRAMES = 8


class VideoReader:
    """A reader of video files and frames in memory that returns normalised frames of the tower's size.

    Args:
        images: settings of the resize, crop and normalisation of a frame.
        frames: default number of frames, if neither ``num_frames`` nor ``fps`` is given.
    """

    def __init__(self, images: ImageSettings, frames: int = _FRAMES) -> None:
        self.images, self.frames = images, frames

    def __call__(self, video: Any, num_frames: int | None = None, fps: float | None = None) -> Tensor:
        """Read frames as float32 ``[T, 3, h, w]``.

        Args:
            video: a file's name or bytes, from which ``num_frames`` evenly spaced frames, or ``fps`` frames per second,
                are taken (frames of shorter videos are repeated); or selected frames, which are all used unless
                ``num_frames`` is given: a list of PIL images, or uint8 ``[T, H, W, 3]`` or ``[T, 3, H, W]``.

        Raises:
            VideoError: the file cannot be read. TypeError, ValueError: not a video, or an invalid number.
        """
        if num_frames is not None and fps is not None:
            raise ValueError(f"only one of num_frames and fps may be given, but they are {num_frames} and {fps}")
        if isinstance(video, (str, os.PathLike, bytes)):
            frames = self._decode(video, num_frames, fps)
        else:
            frames = self.in_memory(video)
            if fps is not None:
                raise ValueError("fps must not be given with frames in memory, whose times are not known")
            if num_frames is not None and num_frames != len(frames):
                middle = (torch.arange(num_frames) + 0.5) * len(frames) / num_frames
                frames = frames[middle.long()]
        return self.images.prepare(frames)

    def _decode(self, video: Any, num_frames: int | None, fps: float | None) -> Tensor:
        if isinstance(video, str) and "://" in video:
            raise ValueError(f"video must be a local file, but is {video}: download it first")
        if fps is None:
            return read_video(
                video, frames=num_frames or self.frames, repeat=True, side=self.images.largest_side
            ).frames
        from bt_adapter.data.stream import FrameStream

        return torch.cat(list(FrameStream(video, fps=fps, side=self.images.largest_side)))

    @staticmethod
    def in_memory(video: Any) -> Tensor:
        """Convert frames in memory to uint8 ``[T, 3, H, W]``. Raises TypeError for anything else."""
        if isinstance(video, (list, tuple)):
            video = np.stack(
                [np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame) for frame in video]
            )
        frames = torch.as_tensor(video)
        if frames.ndim != 4 or frames.dtype != torch.uint8:
            raise TypeError(
                f"a video in memory must be uint8 [T, H, W, 3] or [T, 3, H, W], but is {frames.dtype} of "
                f"{list(frames.shape)}"
            )
        return frames if frames.shape[1] == 3 else frames.permute(0, 3, 1, 2)


def pad_videos(videos: Sequence[Tensor]) -> dict[str, Tensor]:
    """Pad videos ``[T, 3, h, w]`` to a batch ``pixel_values_videos``; ``video_frame_counts`` is added if T differs."""
    counts = torch.tensor([len(video) for video in videos])
    longest = int(counts.max())
    padded = [torch.cat([video, video.new_zeros(longest - len(video), *video.shape[1:])]) for video in videos]
    batch = {"pixel_values_videos": torch.stack(padded)}
    return batch if (counts == longest).all() else batch | {"video_frame_counts": counts}


class VideoProcessing:
    """A mixin that adds videos to every family's processor.

    Attributes:
        video_token, video_token_id: represent a video: once in a text, ``video_length`` times in ``input_ids``.
        video_length: number of tokens of a video.
        video_size: height and width of a frame, in pixels.
        video_frames: default number of frames from a video file, if neither ``num_frames`` nor ``fps`` is given.
    """

    image_processor: Any
    tokenizer: Any
    image_token: Any
    video_size: int
    video_length: int
    video_frames: int

    def _set_up_videos(self, video_size: int | None, video_length: int | None, video_frames: int) -> None:
        for name, value in (("video_size", video_size), ("video_length", video_length), ("video_frames", video_frames)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, but is {value!r}")
            setattr(self, name, value)
        self.video_token = VIDEO_TOKEN
        if VIDEO_TOKEN not in self.tokenizer.get_vocab():
            self.tokenizer.add_tokens([AddedToken(VIDEO_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.video_token_id = self.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)

    @property
    def frame_settings(self) -> ImageSettings:
        """Settings of the resize, crop and normalisation of frames, equal to the image processor's for stills.

        Raises CheckpointError if the image processor's output does not have the tower's size.
        """
        return settings_of_processor(self.image_processor, self.video_size)

    @property
    def video_processor(self) -> VideoReader:
        """The reader of videos; transformers' own video processors need torchvision."""
        return VideoReader(self.frame_settings, self.video_frames)

    def _process_videos(self, videos: Any, **kwargs: Any) -> tuple[dict[str, Tensor], list[str]]:
        videos = flat_videos(videos)
        num_frames, fps = kwargs.pop("num_frames", None), kwargs.pop("fps", None)
        if kwargs.pop("do_sample_frames", None) is False and (num_frames is not None or fps is not None):
            raise ValueError("do_sample_frames must not be False where num_frames or fps is given")
        for name in ("return_tensors", "return_metadata", "video_metadata"):
            kwargs.pop(name, None)
        if refused := sorted(name for name, value in kwargs.items() if value is not None):
            raise ValueError(f"{', '.join(refused)}: not supported; videos accept only num_frames or fps")
        read = self.video_processor
        frames = [read(video, num_frames, fps) for video in videos]
        return pad_videos(frames), [self.video_token * self.video_length for _ in frames]

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        """Return the text of a video's tokens."""
        return self.video_token * self.video_length

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        kwargs.pop("video_sizes", None)
        return super()._get_num_multimodal_tokens(image_sizes, **kwargs)  # type: ignore[misc]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs that a call returns."""
        return [*super().model_input_names, "pixel_values_videos", "video_frame_counts"]  # type: ignore[misc]


def flat_videos(videos: Any) -> list[Any]:
    """Flatten a video, a list of videos, or a list of lists (one per text) into one list.

    A list of pictures (PIL images, or arrays of rank 3) is one video.
    """
    if isinstance(videos, (str, bytes, os.PathLike)) or getattr(videos, "ndim", None) == 4:
        return [videos]
    if getattr(videos, "ndim", None) == 5:
        return list(videos)
    if not isinstance(videos, (list, tuple)):
        raise TypeError(f"videos must be files, frames or lists of them, but is {type(videos).__name__}")
    if videos and (hasattr(videos[0], "convert") or getattr(videos[0], "ndim", None) == 3):
        return [videos]
    return [video for part in videos for video in flat_videos(part)]


class _LlavaProcessing(VideoProcessing):
    """A mixin for LLaVA's processors, whose texts contain a token for each still and video."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        video_size: int | None = None,
        video_length: int | None = None,
        video_frames: int = _FRAMES,
        **kwargs: Any,
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            image_processor, tokenizer, patch_size, vision_feature_select_strategy, chat_template, image_token,
            num_additional_image_tokens, **kwargs,
        )  # fmt: skip
        self._set_up_videos(video_size, video_length, video_frames)

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Convert texts, stills and videos to the model's inputs.

        Args:
            images: stills, in a format of the image model's processor.
            text: one or several; ``<image>`` and ``<video>`` mark the positions of visuals.
            videos: files or frames, see :class:`VideoReader`, in the order of their tokens.
            kwargs: ``num_frames`` or ``fps`` of videos; options of the image model's processor.

        Returns:
            ``input_ids``, ``attention_mask``, ``pixel_values`` and ``pixel_values_videos`` (and ``video_frame_counts``
            if videos differ in length), the inputs of the model's ``generate``.
        """
        if videos is not None:  # transformers counts videos in the formats that it knows
            videos = [os.fspath(v) if isinstance(v, os.PathLike) else v for v in flat_videos(videos)]
            videos = [VideoReader.in_memory(v) if isinstance(v, (list, tuple)) else v for v in videos]
        if isinstance(text, list):
            text = list(text)  # transformers changes the list
        return super().__call__(images=images, text=text, videos=videos, **kwargs)  # type: ignore[misc]


class BTAdapterLlavaProcessor(_LlavaProcessing, LlavaProcessor):
    """The processor of LLaVA-1.5 and ViP-LLaVA with a branch: see :class:`VideoProcessing`."""


class BTAdapterLlavaNextProcessor(_LlavaProcessing, LlavaNextProcessor):
    """The processor of LLaVA-NeXT with a branch: see :class:`VideoProcessing`."""


class _QFormerProcessing(VideoProcessing):
    """A mixin for processors of models with a Q-Former; stills without a token in the text precede it."""

    num_query_tokens: int
    valid_processor_kwargs: Any

    def __call__(self, images: Any = None, text: Any = None, videos: Any = None, **kwargs: Any) -> BatchFeature:
        """Convert texts, stills and videos to the model's inputs: see :meth:`_LlavaProcessing.__call__`.

        InstructBLIP's Q-Former gets each text without visual tokens (``qformer_input_ids``).
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        image_token = str(self.image_token)
        if videos is None and not any(image_token in one for one in texts):
            return super().__call__(images=images, text=text, **kwargs)  # type: ignore[misc]
        merged = self._merge_kwargs(  # type: ignore[attr-defined]
            self.valid_processor_kwargs,
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        options = merged["text_kwargs"]
        tensors = options.pop("return_tensors", None)
        data: dict[str, Any] = {}
        lengths = {image_token: self.num_query_tokens, self.video_token: self.video_length}
        counts = {image_token: 0, self.video_token: 0}
        if images is not None:
            images = make_flat_list_of_images(images)
            counts[image_token] = len(images)
            data |= self.image_processor(images, **merged["images_kwargs"])
        if videos is not None:
            videos = flat_videos(videos)
            counts[self.video_token] = len(videos)
            data |= self._process_videos(videos, **merged["videos_kwargs"])[0]
        for token, count in counts.items():
            if (places := sum(one.count(token) for one in texts)) != count:
                raise ValueError(f"text has {places} places {token}, but {count} files or arrays were given for them")
        if (question_tokenizer := getattr(self, "qformer_tokenizer", None)) is not None:
            plain = [_without(one, lengths) for one in texts]
            data |= {f"qformer_{name}": rows for name, rows in question_tokenizer(plain, **options).items()}
        for token, length in lengths.items():
            texts = [one.replace(token, token * length) for one in texts]
        data |= self.tokenizer(texts, **options)
        data = {name: rows for name, rows in data.items() if name != "qformer_token_type_ids"}
        return BatchFeature(data, tensor_type=tensors)


def _without(text: str, tokens: Iterable[str]) -> str:
    for token in tokens:
        text = text.replace(f"{token}\n", "").replace(token, "")
    return text.strip()


class BTAdapterBlip2Processor(_QFormerProcessing, Blip2Processor):
    """The processor of BLIP-2 with a branch: see :class:`VideoProcessing`."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_query_tokens: int | None = None,
        chat_template: str | None = None,
        video_size: int | None = None,
        video_length: int | None = None,
        video_frames: int = _FRAMES,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, num_query_tokens, **kwargs)
        self.chat_template = chat_template
        self._set_up_videos(video_size, video_length, video_frames)


class BTAdapterInstructBlipProcessor(_QFormerProcessing, InstructBlipProcessor):
    """The processor of InstructBLIP with a branch: see :class:`VideoProcessing`."""

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        qformer_tokenizer: Any,
        num_query_tokens: int | None = None,
        chat_template: str | None = None,
        video_size: int | None = None,
        video_length: int | None = None,
        video_frames: int = _FRAMES,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, qformer_tokenizer, num_query_tokens, **kwargs)
        self.chat_template = chat_template
        self._set_up_videos(video_size, video_length, video_frames)


PROCESSORS: dict[str, type] = {
    "llava": BTAdapterLlavaProcessor,
    "llava_next": BTAdapterLlavaNextProcessor,
    "vipllava": BTAdapterLlavaProcessor,
    "blip-2": BTAdapterBlip2Processor,
    "instructblip": BTAdapterInstructBlipProcessor,
}


def make_processor(model: Any, processor: Any, image_processor: Any = None, qformer_tokenizer: Any = None) -> Any:
    """Make the processor of a video chat model from its image chat model's.

    The video token is added to a copy of the tokenizer, and set in the model's configuration.

    Args:
        model: one of this package's video chat models.
        processor: the image chat model's, or only its tokenizer, with or without a chat template. A processor of this
            package is returned unchanged.
        image_processor: used with a tokenizer; None: CLIP's (LLaVA-NeXT: its own), with the family's mean and standard
            deviation.
        qformer_tokenizer: used with a tokenizer, for InstructBLIP.

    Raises:
        TypeError: ``model`` belongs to no supported family. ValueError: InstructBLIP without the tokenizer of its
            Q-Former, a tokenizer without the model's image token, or a processor made for another model.
    """
    family = family_of(model)
    result = processor if isinstance(processor, VideoProcessing) else None
    if result is None:
        result = _make(family, processor, image_processor, qformer_tokenizer)
    elif wrong := _differences(result, family):
        raise ValueError(f"processor was made for another model than this {family.name}: {'; '.join(wrong)}")
    family.chat.config.video_token_index = result.video_token_id
    return result


def _differences(processor: VideoProcessing, family: Family) -> list[str]:
    """List the differences between a processor's settings and those that a model needs."""
    wanted = {
        "class": PROCESSORS[family.name].__name__, "video_size": family.image_size,
        "video_length": family.video_length, "image token": family.image_token_id,
    }  # fmt: skip
    token = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    found = {
        "class": type(processor).__name__, "video_size": processor.video_size,
        "video_length": processor.video_length, "image token": token,
    }  # fmt: skip
    return [f"{name} {found[name]}, expected {value}" for name, value in wanted.items() if found[name] != value]


def _image_processor(family: Family) -> Any:
    """Make the image processor of a model that has none."""
    size = {"height": family.image_size, "width": family.image_size}
    options: dict[str, Any] = {
        "size": {"shortest_edge": family.image_size}, "crop_size": size, "image_mean": family.mean,
        "image_std": family.std,
    }  # fmt: skip
    if family.name == "llava_next":
        return LlavaNextImageProcessorPil(image_grid_pinpoints=family.chat.config.image_grid_pinpoints, **options)
    return CLIPImageProcessorPil(**options)


def _make(family: Family, processor: Any, image_processor: Any, qformer_tokenizer: Any) -> Any:
    config = family.chat.config
    tokenizer = copy.deepcopy(getattr(processor, "tokenizer", processor))
    image_processor = getattr(processor, "image_processor", image_processor)
    qformer_tokenizer = getattr(processor, "qformer_tokenizer", qformer_tokenizer)
    tokenizer.chat_template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    image_token = family.image_token(tokenizer)
    template = with_videos(tokenizer, image_token, VIDEO_TOKEN)
    shared = {
        "image_processor": image_processor or _image_processor(family), "tokenizer": tokenizer,
        "chat_template": template, "video_size": family.image_size, "video_length": family.video_length,
    }  # fmt: skip
    if family.name in ("blip-2", "instructblip"):
        tokenizer.image_token = image_token
        options: dict[str, Any] = {"num_query_tokens": config.num_query_tokens}
        if family.needs_question:
            if qformer_tokenizer is None:
                raise ValueError("qformer_tokenizer must be given: InstructBLIP's Q-Former reads the question")
            options["qformer_tokenizer"] = qformer_tokenizer
    else:
        # from the model: processors saved by older versions of transformers lack both
        options = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
            "num_additional_image_tokens": 1,
            "image_token": image_token,
        }
    return PROCESSORS[family.name](**shared, **options)
