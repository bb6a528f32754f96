"""A chat model that takes videos: loading it, frames to tokens, questions to answers."""

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
from bt_adapter.chat.loading import load_with_branch
from bt_adapter.chat.quantize import Quantize
from bt_adapter.data import Video, read_video
from bt_adapter.image_settings import ImageSettings
from bt_adapter.model import BTAdapterVisionModel
from bt_adapter.native.processing import make_processor
from bt_adapter.native.saving import save_video_model
from bt_adapter.progress import Progress

__all__ = ["Reply", "VideoChat", "peak_memory", "read"]


class VideoChat:
    """A video chat model with its processor: videos to tokens, questions to answers.

    Args:
        model: a chat model with a branch (``bt_adapter.attach``, or loaded as a video chat model).
        processor: its own; or the image chat model's, or its tokenizer alone, of which `make_processor` makes one.
            Frames are resized, cropped and normalised as its image processor does it.
        image_processor, qformer_tokenizer: beside a tokenizer: see `make_processor`.

    Raises:
        ValueError, TypeError: ``model`` has no branch, or as `make_processor`.
    """

    def __init__(self, model: Any, processor: Any, image_processor: Any = None, qformer_tokenizer: Any = None) -> None:
        attached_branch(model)  # ValueError unless one is
        self.model, self.family = model.eval(), family_of(model)
        self.processor = make_processor(model, processor, image_processor, qformer_tokenizer)
        self.images: ImageSettings = self.processor.frame_settings
        self.mean, self.std = self.images.mean, self.images.std
        attached_branch(model).images = self.images  # a branch that is tuned here is stored with them

    @staticmethod
    def mini(stage: str = "tuned", device: str = "cpu", dtype: torch.dtype = torch.float32) -> VideoChat:
        """Load the small stack, whose weights come in the package ``bt-adapter-mini``.

        Args:
            stage: "fresh": CLIP, SmolLM2 and a projector that learned nothing. "image": tuned on questions about stills
                alone. Both have the branch pretrained on clips and captions attached. "tuned": the image stage tuned
                on questions about videos, with its branch as tuned. "control": the same without a branch: videos are
                the mean of their frames.

        Raises:
            ValueError: there is no such stage. MiniError: a part is not installed.
        """
        from bt_adapter.tune.loading import load_base

        return load_base(f"mini:{stage}", None, device, dtype)

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
        """A video chat model by its local folder or hub name.

        Args:
            model: a video chat model that :meth:`save`, or ``save_pretrained`` of model and processor, wrote; an image
                chat model that `attach` takes; or a folder of tuned parts (``bt_adapter.tune``).
            branch: a folder, hub name or published checkpoint. An image chat model needs one; given with one of the
                others, it takes the place of the branch that is there.
            dtype: None for what the model was stored in.
            quantize: the language model in 4 ("nf4") or 8 bits ("int8"); the tower, the projector and the branch
                stay as they are.
            require_same_tower: as for `attach`; a model that was tuned with False is loaded so.
            use_branch: False: an image chat model may come without a branch. Its videos are then the mean over their
                frames of the tower's tokens, as they are where :meth:`encode` is given ``branch=False``.

        Raises:
            ValueError: no such kind of chat model, it needs a branch and none is given, or the two do not fit, which
                their configurations tell before any weights are read.
            QuantizeError: the package that quantizes is not installed.
            Else what transformers, `attach` and ``bt_adapter.tune.load`` raise.
        """
        from bt_adapter import tune

        if tune.is_tuned(model):
            return tune.load(
                model, None, branch, device, dtype, quantize=quantize, require_same_tower=require_same_tower,
                use_branch=use_branch,
            )  # fmt: skip
        return VideoChat(*load_with_branch(model, branch, device, dtype, quantize, require_same_tower, use_branch))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write model, branch and processor as a folder that :meth:`load` and transformers' Auto classes read.

        ``AutoModelForImageTextToText`` and ``AutoProcessor`` know it once ``bt_adapter.native`` is imported. The folder
        appears when it is whole.

        Raises:
            FileExistsError: there is such a folder, with something in it. ValueError: the model holds adapters that
                are not merged into its weights.
        """
        save_video_model(self.model, self.processor, folder)

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer: the image chat model's with a token for videos."""
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def branch(self) -> BTAdapterVisionModel:
        """The attached branch, beside the chat model's own tower."""
        return attached_branch(self.model)

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames uint8 ``[T, 3, H, W]`` -> normalised ``[1, T, 3, h, w]`` in the tower's size, dtype and device."""
        return self.images.prepare(frames)[None].to(self.device, self.branch.tower.dtype)

    @torch.no_grad()
    def encode(
        self,
        video: Video | Tensor,
        branch: bool | None = None,
        progress: Progress | None = None,
        question: str | None = None,
    ) -> Tensor:
        """A video's tokens for the language model, ``[1, V, W]``, from frames that are there already.

        video: decoded frames, uint8 ``[T, 3, H, W]`` where a tensor is given. branch: False for the mean of the frames'
        tokens in the branch's place; None: as the model was tuned (``use_branch`` of its configuration). progress: as
        for ``video_tokens``. question: as for :meth:`project`. Files of any length: `bt_adapter.chat.watch`.
        """
        pixels = self.prepare(video.frames if isinstance(video, Video) else video)
        tokens = self.project(video_tokens(self.model, pixels, progress, branch=branch), question)
        if tokens.device.type == "cuda":
            torch.cuda.synchronize(tokens.device)
        return tokens

    @torch.no_grad()
    def see(self, image: Tensor) -> Visual:
        """A still, uint8 ``[3, H, W]``, as the image chat model itself takes it."""
        if self.family.has_qformer:  # it reads the tower's tokens, which are those of a one-frame mean
            return self.visual("image", self.branch.frame_mean_tokens(self.prepare(image[None])))
        pixels, sizes = self.prepare(image[None])[0], {}
        if self.family.name == "llava_next":  # which takes a still in pieces
            cut = self.processor.image_processor(
                images=[image.cpu().numpy()], return_tensors="pt", input_data_format="channels_first"
            )
            pixels, sizes = cut["pixel_values"].to(pixels), {"image_sizes": cut["image_sizes"]}
        (tokens,) = self.family.home.get_image_features(pixels, **sizes).pooler_output
        return Visual("image", tokens)

    @torch.no_grad()
    def visual(self, kind: str, tokens: Tensor) -> Visual:
        """Tokens of the tower and branch, ``[n, P+1, D]``, as a conversation takes them."""
        if not self.family.needs_question:
            return Visual(kind, self.project(tokens).flatten(0, 1))
        count = tokens.new_empty(len(tokens) * self.family.video_length, 0)
        return Visual(kind, count, reads=lambda question: self.project(tokens, question).flatten(0, 1))

    def project(self, tokens: Tensor, question: str | None = None) -> Tensor:
        """Tokens of the tower and branch, ``[n, P+1, D]``, as the language model takes them, ``[n, V, W]``.

        question: for InstructBLIP, whose Q-Former reads it. Raises ValueError where it is needed and not there.
        """
        if not self.family.needs_question or question is None:
            return self.family.project(tokens)
        ids = self.processor.qformer_tokenizer([question] * len(tokens), return_tensors="pt").to(self.device)
        return self.family.project(tokens, {name: ids[name] for name in ("input_ids", "attention_mask")})

    def converse(self, static: bool = False) -> Conversation:
        """A conversation with this model; see `Conversation`."""
        return Conversation(self.model, self.processor, static)

    def ask(
        self,
        video_tokens: Tensor,
        question: str,
        max_new_tokens: int = 64,
        on_text: Callable[[str], None] | None = None,
    ) -> Reply:
        """The greedy answer to one question about an encoded video; on_text is given the text as it comes."""
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
    """Decode `frames` evenly spread frames of a video file (fewer there: `repeat` them). Raises VideoError.

    side: the side in pixels that they will be resized to, as for `read_video`.
    """
    return read_video(Path(path), frames=frames, sampling="middle", repeat=repeat, progress=progress, side=side)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Bytes: on a GPU the most its allocator held, else the most this process had resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
