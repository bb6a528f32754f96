"""vLLM's processing of stills and videos for video chat models: pixels, and the tokens that take their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from bt_adapter.vllm.inputs import count_tokens, prepare, video_token

_PROFILED_FRAMES = 64  # of the video by which vLLM measures the memory that encoding takes


class VideoChatInfo(BaseProcessingInfo):
    """Facts about a model that vLLM asks for before it is loaded: kinds of inputs and their numbers of tokens."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return the kinds of inputs: any number of stills and videos."""
        return {"image": None, "video": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        """Return no names by kind of input: options are passed on as they are, and unknown ones refused."""
        return {}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Return the most tokens of a still and of a video."""
        processor = self.get_hf_processor()
        sides = self.largest_still()
        return {"image": count_tokens(processor, *sides), "video": processor.video_length}

    def largest_still(self) -> tuple[int, int]:
        """Return (height, width) of the still with the most tokens: LLaVA-NeXT cuts large ones into tiles."""
        processor = self.get_hf_processor()
        tiles = getattr(self.get_hf_config(), "image_grid_pinpoints", None)
        if not tiles:
            return processor.video_size, processor.video_size
        return max((tuple(size) for size in tiles), key=lambda size: count_tokens(processor, *size))


class VideoChatDummyInputs(BaseDummyInputsBuilder[VideoChatInfo]):
    """The largest inputs, by which vLLM measures the memory that encoding takes."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return a prompt with one token for each still and video."""
        processor = self.info.get_hf_processor()
        stills, videos = mm_counts.get("image", 0), mm_counts.get("video", 0)
        return processor.image_token * stills + processor.video_token * videos

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """Return white stills and videos in the numbers of ``mm_counts``."""
        height, width = self.info.largest_still()
        size = self.info.get_hf_processor().video_size
        return {
            "image": self._get_dummy_images(
                width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
            ),
            "video": self._get_dummy_videos(
                width=size, height=size, num_frames=_PROFILED_FRAMES, num_videos=mm_counts.get("video", 0),
                overrides=mm_options.get("video"),
            ),
        }  # fmt: skip


class VideoChatProcessor(BaseMultiModalProcessor[VideoChatInfo]):
    """The conversion of stills, videos and prompts with one token for each of them to the model's inputs."""

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        # transformers would ask for texts, which vLLM keeps to itself, and batch videos of different lengths
        options = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        pixels = prepare(self.info.get_hf_processor(), hf_data.get("images", ()), hf_data.get("videos", ()), options)
        dtype = self.info.ctx.model_config.dtype
        return BatchFeature(
            {
                name: [one.to(dtype) if one.is_floating_point() else one for one in items]
                for name, items in pixels.items()
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {
            "pixel_values": MultiModalFieldConfig.batched("image"),
            "image_sizes": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "pixel_values_videos": MultiModalFieldConfig.batched("video"),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, config = self.info.get_hf_processor(), self.info.get_hf_config()
        image, video = config.image_token_index, video_token(config)

        def still(number: int) -> list[int]:
            size = mm_items.get_items("image", ImageProcessorItems).get_image_size(number)
            return [image] * count_tokens(processor, size.height, size.width)

        return [
            PromptReplacement(modality="image", target=[image], replacement=still),
            PromptReplacement(modality="video", target=[video], replacement=[video] * processor.video_length),
        ]
