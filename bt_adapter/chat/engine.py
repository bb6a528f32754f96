"""From a video file to a streamed answer, with the time and memory each stage took."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, TextStreamer

from bt_adapter.chat.attach import attach, attached_branch, branch_enabled
from bt_adapter.chat.prompts import video_prompt
from bt_adapter.data import CLIP_MEAN, CLIP_STD, Video, preprocess, read_video
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.progress import Progress


@dataclass
class Reply:
    """An answer and what it cost. seconds: "first token" (from the question to it) and "generate" (the rest)."""

    text: str
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        return (self.tokens - 1) / self.seconds["generate"] if self.tokens > 1 else 0.0


class VideoChat:
    """An image chat model with a branch, its tokenizer, and how frames are normalised for it.

    Args:
        model: a chat model a branch is attached to.
        tokenizer: with the model's image token and chat template.
        mean, std: of the frames' normalisation.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        tokenizer: Any,
        mean: tuple[float, ...] = CLIP_MEAN,
        std: tuple[float, ...] = CLIP_STD,
    ) -> None:
        attached_branch(model)  # ValueError unless one is
        self.model, self.tokenizer, self.mean, self.std = model.eval(), tokenizer, tuple(mean), tuple(std)

    @staticmethod
    def mini(stage: str = "tuned", device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoChat:
        """The small stack that comes with this package. FileNotFoundError, LanguageModelError: a part is missing."""
        from bt_adapter.mini.clip import load_clip
        from bt_adapter.mini.llava import branch_folder, load_chat

        model, tokenizer = load_chat(stage)
        attach(model, BTAdapterVisionModel.from_pretrained(branch_folder(stage), clip=load_clip()[0]))
        return VideoChat(model.to(device=device, dtype=dtype), tokenizer)

    @staticmethod
    def load(
        model: str | os.PathLike[str],
        branch: str | os.PathLike[str],
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> VideoChat:
        """A LLaVA-like model (local folder or hub name) with a branch (folder, or a published checkpoint).

        dtype: None for what the model was stored in. Raises what transformers and `attach` raise.
        """
        kind = AutoConfig.from_pretrained(model).model_type
        if kind != "llava":  # from_pretrained would build one of random weights
            raise ValueError(f"model {model} is of type {kind!r}, expected 'llava'")
        chat = LlavaForConditionalGeneration.from_pretrained(model, dtype=dtype or "auto").to(device)
        mean, std = CLIP_MEAN, CLIP_STD
        try:
            processor = AutoProcessor.from_pretrained(model)
            tokenizer = processor.tokenizer
            if getattr(processor, "chat_template", None):
                tokenizer.chat_template = processor.chat_template
            mean = getattr(processor.image_processor, "image_mean", mean)
            std = getattr(processor.image_processor, "image_std", std)
        except (OSError, ValueError, ImportError, AttributeError):  # a folder with a tokenizer alone
            tokenizer = AutoTokenizer.from_pretrained(model)
        attach(chat, branch)
        return VideoChat(chat, tokenizer, mean, std)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames uint8 ``[T, 3, H, W]`` -> normalised ``[1, T, 3, h, w]`` in the model's size, dtype and device."""
        size = self.model.config.vision_config.image_size
        pixels = preprocess(frames, size, self.mean, self.std)
        return pixels[None].to(self.device, self.model.dtype)

    @torch.no_grad()
    def encode(self, video: Video | Tensor, branch: bool = True, progress: Progress | None = None) -> Tensor:
        """A video (or its frames, uint8 ``[T, 3, H, W]``) -> its tokens for the language model ``[1, P+1, width]``.

        branch: False for the mean of the frames' tokens in the branch's place. progress: as for ``video_tokens``.
        """
        pixels = self.prepare(video.frames if isinstance(video, Video) else video)
        with branch_enabled(self.model, branch):
            tokens = self.model.model.get_image_features(pixels, progress=progress).pooler_output[0][None]
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
        return tokens

    @torch.no_grad()
    def ask(
        self,
        video_tokens: Tensor,
        question: str,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """The greedy answer to a question about an encoded video; on_text is given the text as it comes."""
        begin = time.perf_counter()
        inputs = video_prompt(self.model, self.tokenizer, question).to(self.device)
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        places = (inputs["input_ids"] == self.model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, video_tokens.to(embeds.dtype))
        streamer = _Stream(self.tokenizer, on_text or (lambda text: None))
        self.model.generate(
            inputs_embeds=embeds,
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            streamer=streamer,
        )
        first = streamer.first or time.perf_counter()
        seconds = {"first token": first - begin, "generate": time.perf_counter() - first}
        return Reply("".join(streamer.text).strip(), streamer.tokens, seconds)


def read(path: str | os.PathLike[str], frames: int, repeat: bool = False, progress: Progress | None = None) -> Video:
    """Decode `frames` evenly spread frames of a video file (fewer there: `repeat` them). Raises VideoError."""
    return read_video(Path(path), frames=frames, sampling="middle", repeat=repeat, progress=progress)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: on a GPU the most its allocator held, else the most this process had resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _Stream(TextStreamer):
    """Counts tokens, notes when the first came, and hands text on where words end."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.tokens = on_text, 0
        self.text: list[str] = []
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:  # the prompt comes first, and is empty where embeddings are given
            self.first = self.first or time.perf_counter()
            self.tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text.append(text)
        if text:
            self.on_text(text)
