"""A chat model for videos: load it, encode frames as tokens, answer questions."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bt_adapter.chat.attach import attached_branch, video_tokens
from bt_adapter.chat.conversation import Conversation, Reply, Visual
from bt_adapter.chat.families import family_of
from bt_adapter.chat.loading import LoadOptions
from bt_adapter.chat.native.processing import make_processor
from bt_adapter.chat.native.saving import save_video_model
from bt_adapter.chat.quantize import Quantize
from bt_adapter.chat.tuned import load_by_name, load_saved
from bt_adapter.data import Video, read_video
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.progress import Progress

__all__ = ["Reply", "VideoChat", "peak_memory", "read"]


class VideoChat:
    """A video chat model with its processor, which encodes videos and answers questions.

    Args:
        model: a chat model with a branch (``bt_adapter.attach``, or loaded as a video chat model).
        processor: the model's; or the image chat model's, or only its tokenizer, from which `make_processor` makes one.
            Its image processor resizes, crops and normalises the frames.
        image_processor, qformer_tokenizer: used together with a tokenizer, see `make_processor`.

    Raises:
        ValueError, TypeError: ``model`` has no branch; see also `make_processor`.
    """

    def __init__(self, model: Any, processor: Any, image_processor: Any = None, qformer_tokenizer: Any = None) -> None:
        attached_branch(model)  # ValueError if there is none
        self.model, self.family = model.eval(), family_of(model)
        self.processor = make_processor(model, processor, image_processor, qformer_tokenizer)
        self.images: ImageSettings = self.processor.frame_settings
        self.mean, self.std = self.images.mean, self.images.std
        attached_branch(model).images = self.images  # a branch that is tuned here is stored with them

    @staticmethod
    def mini(stage: str = "tuned", device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoChat:
        """Load the small stack, whose weights come in the package ``bt-adapter-mini``.

        Args:
            stage: "fresh": CLIP, SmolLM2 and an untrained projector. "image": tuned on questions about stills only.
                Both have the branch pretrained on clips and captions. "tuned": the image stage tuned on questions about
                videos, with its tuned branch. "control": the same without a branch: a video is the mean of its frames.

        Raises:
            ValueError: there is no such stage. MiniError: a part is not installed.
        """
        return VideoChat(*load_by_name(f"mini:{stage}", None, LoadOptions(device, dtype)))

    @staticmethod
    def load(
        model: str | os.PathLike[str],
        branch: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        quantize: Quantize | None = None,
        require_same_tower: bool = True,
        use_branch: bool = True,
    ) -> VideoChat:
        """Load a video chat model from a local folder or by its hub name.

        Args:
            model: a video chat model that :meth:`save`, or ``save_pretrained`` of model and processor, wrote; an image
                chat model that `attach` takes; or a folder of tuned parts (``bt_adapter.tune``).
            branch: a folder, hub name or published checkpoint. An image chat model needs one; for the other kinds it
                replaces the stored branch.
            dtype: None for the stored dtype.
            quantize: load the language model in 4 ("nf4") or 8 bits ("int8"); the tower, the projector and the branch
                are not quantised.
            require_same_tower: see `attach`; a model that was tuned with False is also loaded with False.
            use_branch: False: an image chat model may have no branch. Video tokens are then the mean of the tower's
                tokens over the frames, as for :meth:`encode` with ``branch=False``.

        Raises:
            ValueError: an unsupported kind of chat model, a missing branch, or a branch that does not fit. Both
                configurations are compared before any weights are read.
            QuantizeError: the package that quantizes is not installed.
            Also the errors of transformers, `attach` and ``bt_adapter.tune.load``.
        """
        options = LoadOptions(device, dtype, quantize, require_same_tower, use_branch)
        return VideoChat(*load_saved(model, branch, options))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model, branch and processor as a folder that :meth:`load` and transformers' Auto classes read.

        ``AutoModelForImageTextToText`` and ``AutoProcessor`` accept it once ``bt_adapter.native`` is imported. The
        folder is renamed to its final name when complete.

        Raises:
            FileExistsError: the folder exists and is not empty. ValueError: the model has adapters that are not merged
                into its weights.
        """
        save_video_model(self.model, self.processor, folder)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer: the image chat model's with a token for videos."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @property
    def branch(self) -> BTAdapterVisionModel:
        """The attached branch, with the chat model's own tower."""
        return attached_branch(self.model)

    def prepare(self, frames: Tensor) -> Tensor:
        """Resize and normalise frames uint8 ``[T, 3, H, W]`` to ``[1, T, 3, h, w]``, in the tower's dtype."""
        return self.images.prepare(frames)[None].to(self.device, self.branch.tower.dtype)

    @torch.no_grad()
    def encode(
        self,
        video: Video | Tensor,
        branch: bool | None = None,
        progress: Progress | None = None,
        question: str | None = None,
    ) -> Tensor:
        """Encode decoded frames as a video's tokens for the language model, ``[1, V, W]``.

        video: decoded frames; a tensor is uint8 ``[T, 3, H, W]``. branch: False for the mean of the frames' tokens
        instead; None: ``use_branch`` of the model's configuration. progress: see ``video_tokens``. question: see
        :meth:`project`. For files of any length use `bt_adapter.chat.watch.watch`.
        """
        pixels = self.prepare(video.frames if isinstance(video, Video) else video)
        tokens = self.project(video_tokens(self.model, pixels, progress, branch=branch), question)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
        return tokens

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Visual:
        """Encode a still, uint8 ``[3, H, W]``, the way the image chat model itself does."""
        if self.family.has_qformer:  # it reads the tower's tokens, which equal the mean of one frame
            return self.visual("image", self.branch.frame_mean_tokens(self.prepare(image[None])))
        pixels, sizes = self.prepare(image[None])[0], {}
        if self.family.name == "llava_next":  # it splits a still into tiles
            cut = self.processor.image_processor(
                images=[image.cpu().numpy()], return_tensors="pt", input_data_format="channels_first"
            )
            pixels, sizes = cut["pixel_values"].to(pixels), {"image_sizes": cut["image_sizes"]}
        (tokens,) = self.family.home.get_image_features(pixels, **sizes).pooler_output
        return Visual("image", tokens)

    @torch.no_grad()
    def visual(self, kind: str, tokens: Tensor) -> Visual:
        """Wrap tokens of the tower and branch, ``[n, P+1, D]``, for a conversation."""
        if not self.family.needs_question:
            return Visual(kind, self.project(tokens).flatten(0, 1))
        count = tokens.new_empty(len(tokens) * self.family.video_length, 0)
        return Visual(kind, count, reads=lambda question: self.project(tokens, question).flatten(0, 1))

    def project(self, tokens: Tensor, question: str | None = None) -> Tensor:
        """Project tokens of the tower and branch, ``[n, P+1, D]``, to the language model's embeddings, ``[n, V, W]``.

        question: for InstructBLIP, whose Q-Former reads it. Raises ValueError if it is required and missing.
        """
        if not self.family.needs_question or question is None:
            return self.family.project(tokens)
        ids = self.processor.qformer_tokenizer([question] * len(tokens), return_tensors="pt").to(self.device)
        return self.family.project(tokens, {name: ids[name] for name in ("input_ids", "attention_mask")})

    def converse(self, static: bool = False) -> Conversation:
        """Begin a conversation with this model; see `Conversation`."""
        return Conversation(self.model, self.processor, static)

    def ask(
        self,
        video_tokens: Tensor,
        question: str,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer one question about an encoded video greedily; on_text is called with each new piece of text."""
        conversation = self.converse()
        conversation.add(Visual("video", video_tokens.flatten(0, -2)))
        return conversation.ask(question, max_new_tokens, on_text)


def read(
    path: str | os.PathLike[str],
    frames: int,
    repeat: bool = False,
    progress: Progress | None = None,
    side: int | None = None,
) -> Video:
    """Decode `frames` evenly spaced frames of a video file (`repeat` them if it has fewer). Raises VideoError.

    side: target side of the resize in pixels, see `read_video`.
    """
    return read_video(Path(path), frames=frames, sampling="middle", repeat=repeat, progress=progress, side=side)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Return the peak memory in bytes: of a GPU's allocator, else the resident memory of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
