"""Image chat models with a branch, as Hugging Face models that accept stills and videos in one call.

Every class inherits from a mixin of this file and from the family's own class of transformers. A call without videos
runs the family's own code, so stills and text are answered bit for bit as before. In a call with videos, the features
of stills and videos are first inserted into the prompts' embeddings, and the family's code continues from there.

Legend: B prompts, S tokens of a prompt, V videos in all prompts, T frames, P patches of a frame, W width of the
language model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    VipLlavaForConditionalGeneration,
    VipLlavaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import Blip2ForConditionalGenerationModelOutput

from bt_adapter.chat.families import Visuals, family_of
from bt_adapter.chat.native.config import (
    BTAdapterBlip2Config,
    BTAdapterInstructBlipConfig,
    BTAdapterLlavaConfig,
    BTAdapterLlavaNextConfig,
    BTAdapterVipLlavaConfig,
)
from bt_adapter.chat.native.video_features import encode_videos, split_videos
from bt_adapter.model.branch import Branch, TemporalLayer

_IGNORED = -100  # label that the loss ignores
_VIDEO_ARGUMENTS = ("pixel_values_videos", "video_frame_counts", "use_branch")
# Layers that device maps and sharding by transformer layers must not split.
WHOLE = ("TemporalLayer", "SpatialLayer")
# Video tokens do not use the alignment head, and chat models have no shared embedding space for it.
NOT_SAVED = [
    f"{home}bt_adapter.alignment_head.{name}"
    for home in ("", "model.")
    for name in ("0.weight", "0.bias", "1.weight", "1.bias")
]
# Arguments that `VideoPrompts.embed_prompts` consumes; the language model gets the others.
_VISUAL_ARGUMENTS = (
    *_VIDEO_ARGUMENTS, "pixel_values", "image_sizes", "interpolate_pos_encoding", "vision_feature_layer",
    "vision_feature_layers", "vision_feature_select_strategy", "qformer_input_ids", "qformer_attention_mask",
)  # fmt: skip


def _takes_videos(
    base: Callable[..., Any], arguments: tuple[str, ...] = _VIDEO_ARGUMENTS
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a decorator that passes all arguments by name and adds those of videos to ``base``'s signature.

    transformers inspects signatures to find the arguments that ``generate`` and the Trainer may pass.
    """
    parameters = [
        # arguments that the family requires are optional here, as calls with videos or only text lack them
        p.replace(default=None)
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"
        else p
        for p in inspect.signature(base).parameters.values()
    ]
    rest = [p for p in parameters if p.kind is p.VAR_KEYWORD]
    added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in arguments]
    signature = inspect.Signature([*(p for p in parameters if p not in rest), *added, *rest])

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments
            for parameter in rest:
                given |= given.pop(parameter.name, {})
            return method(**given)

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


class VideoPrompts:
    """A mixin that inserts stills and videos into prompts, for the model that takes the pixels.

    In ``input_ids``, ``video_token_id`` is repeated once per token of a video (P+1 in LLaVA, the number of queries with
    a Q-Former), ``image_token_id`` once per token of a still. In addition to the family's arguments, ``forward`` and
    ``generate`` accept:

        pixel_values_videos: normalised frames ``[V, T, 3, h, w]`` in the order of their tokens, or a list of
            ``[T, 3, h, w]`` of different length.
        video_frame_counts: int ``[V]``, the number of frames of each video if shorter ones are padded at the end.
        use_branch: False for the mean over the frames instead of the branch; None: the configuration's.

    ``pixel_values`` may also hold videos ``[V, T, 3, h, w]`` at the positions of image tokens, or be a
    :class:`bt_adapter.chat.families.Visuals`. InstructBLIP's ``qformer_input_ids`` have one row per prompt or one per
    visual.

    The tower is frozen: videos run through it without gradients, unless its weights or the pixels require them.
    """

    config: Any
    get_image_features: Callable[..., Any]  # see `_image_features`

    @property
    def video_token_id(self) -> int:
        """Id of a video's token in ``input_ids``: the configuration's, else the image token's."""
        token = self.config.video_token_index
        return self.config.image_token_id if token is None else token

    def get_video_features(
        self,
        pixel_values_videos: Tensor | list[Tensor],
        video_frame_counts: Tensor | None = None,
        use_branch: bool | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode videos as the language model's embeddings.

        Args:
            pixel_values_videos, video_frame_counts, use_branch: see the class.
            qformer_input_ids, qformer_attention_mask: InstructBLIP's question, int ``[V, Q]``.

        Returns:
            An output whose ``pooler_output`` is a list of V tensors ``[tokens, W]``.

        Raises:
            TypeError, ValueError: an argument has a wrong type or shape; the message names it.
        """
        videos = split_videos(pixel_values_videos, video_frame_counts)
        question = None
        if qformer_input_ids is not None:
            mask = torch.ones_like(qformer_input_ids) if qformer_attention_mask is None else qformer_attention_mask
            question = {"input_ids": qformer_input_ids, "attention_mask": mask}
        output: Any = BaseModelOutputWithPooling()
        output.pooler_output = encode_videos(self, videos, use_branch, question)
        return output

    def embed_prompts(
        self,
        input_ids: Tensor,
        pixel_values: Any = None,
        pixel_values_videos: Tensor | list[Tensor] | None = None,
        video_frame_counts: Tensor | None = None,
        use_branch: bool | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        **stills: Any,
    ) -> Tensor:
        """Embed prompts ``[B, S]`` with their visuals as ``[B, S, W]``, the language model's input.

        Args:
            stills: further arguments of the family's ``get_image_features``.

        Raises:
            ValueError: the number of visual tokens in the prompts differs from that of the stills and videos.
        """
        family = family_of(self)
        image_places = input_ids == self.config.image_token_id
        video_places = input_ids == self.video_token_id
        # a video's token needs no embedding, because all of its positions are overwritten
        embeds = self.get_input_embeddings()(self.known_ids(input_ids))  # type: ignore[attr-defined]
        given = {"qformer_input_ids": qformer_input_ids, "qformer_attention_mask": qformer_attention_mask}
        question = {name: rows for name, rows in given.items() if rows is not None}

        def question_rows(places: Tensor, visuals: int) -> dict[str, Tensor]:
            """Repeat the rows of the question, so that each visual has the row of its prompt."""
            if not question or len(question["qformer_input_ids"]) == visuals:
                return question
            of_prompt = places.sum(1) // family.video_length
            return {name: rows.repeat_interleave(of_prompt, 0) for name, rows in question.items()}

        if pixel_values is not None:
            if self._holds_videos(pixel_values, stills.get("image_sizes")):
                visuals = Visuals.of(pixel_values)
                rows = question_rows(image_places, len(visuals))
                features = self._mixed_features(visuals, use_branch, rows, stills)
            else:
                rows = question_rows(image_places, len(pixel_values))
                features = list(self.get_image_features(pixel_values, **stills, **rows).pooler_output)
            embeds = _insert(embeds, image_places, features, "image")
        if pixel_values_videos is None:
            self.check_no_videos(input_ids)
            return embeds
        rows = question_rows(video_places, len(pixel_values_videos))
        output = self.get_video_features(pixel_values_videos, video_frame_counts, use_branch, **rows)
        return _insert(embeds, video_places, output.pooler_output, "video")

    def check_no_videos(self, ids: Tensor | None) -> None:
        """Raise ValueError if prompts without videos contain video tokens."""
        token = self.config.video_token_index
        if ids is not None and token is not None and (count := int((ids == token).sum())):
            raise ValueError(f"input_ids have {count} video tokens, but pixel_values_videos is None")

    def put_visuals(self, input_ids: Tensor, visuals: Sequence[Tensor]) -> Tensor:
        """Embed prompts ``[B, S]`` as ``[B, S, W]``, with precomputed features of stills and videos.

        Args:
            visuals: features ``[tokens, W]``, in the order of their image and video tokens.

        Raises:
            ValueError: the number of visual tokens in the prompts differs from that of the visuals.
        """
        ids = self.known_ids(input_ids)
        embeds = self.get_input_embeddings()(ids)  # type: ignore[attr-defined]
        return _insert(embeds, ids == self.config.image_token_id, visuals, "visual") if len(visuals) else embeds

    def known_ids(self, ids: Tensor) -> Tensor:
        """Replace video tokens, which may lie outside the vocabulary, by the image token."""
        return ids.masked_fill(ids == self.video_token_id, self.config.image_token_id)

    def _mixed_features(
        self, visuals: Visuals, use_branch: bool | None, question: dict[str, Tensor], stills: dict[str, Any]
    ) -> list[Tensor]:
        """Encode stills and videos that are at the positions of image tokens, in order."""
        stills = {name: value for name, value in stills.items() if name not in ("image_sizes", "return_dict")}
        is_video = [visuals.is_video(number) for number in range(len(visuals))]
        found: dict[int, Tensor] = {}
        for wanted in (True, False):
            numbers = [number for number, video in enumerate(is_video) if video == wanted]
            if not numbers:
                continue
            rows = {name: values[numbers] for name, values in question.items()}
            items = [visuals[number].as_subclass(Tensor) for number in numbers]
            if wanted:
                features = self.get_video_features(items, None, use_branch, **rows).pooler_output
            else:
                sizes = [visuals.image_sizes[number] for number in numbers]
                features = family_of(self).stills(items, sizes, {**stills, **rows})
            found |= zip(numbers, features, strict=True)
        return [found[number] for number in range(len(visuals))]

    def _holds_videos(self, pixel_values: Any, image_sizes: Any) -> bool:
        if isinstance(pixel_values, (list, tuple)):
            return True
        return isinstance(pixel_values, Tensor) and family_of(self).takes_videos(pixel_values, image_sizes)

    def _has_videos(self, given: dict[str, Any]) -> bool:
        """Whether a call has videos, so that the family's own code is not enough."""
        if given.get("pixel_values_videos") is not None:
            return True
        return self._holds_videos(given.get("pixel_values"), given.get("image_sizes"))

    def _embedded(self, given: dict[str, Any]) -> dict[str, Any]:
        """Replace the ids and visuals of a call's arguments by embeddings."""
        given = dict(given)
        ids = given.pop("input_ids", None)
        if ids is None:
            raise ValueError("input_ids must be given with videos: they mark the positions of the videos")
        if given.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds must not be given with videos: they are made from input_ids")
        arguments = {name: given.pop(name) for name in _VISUAL_ARGUMENTS if name in given}
        given["inputs_embeds"] = self.embed_prompts(ids, **{k: v for k, v in arguments.items() if v is not None})
        if given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(ids)
        return given


class VideoModel:
    """A mixin of all video chat models that adds the branch described by ``config.bt_adapter``."""

    config: Any
    _keys_to_ignore_on_save = NOT_SAVED

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        family = family_of(self)
        if family.home is not self:
            family.home.__class__ = INNER_CLASSES[family.name]
        family.home.bt_adapter = Branch(family.tower_config, config.branch_config(), config.bt_adapter.get("layers"))
        self.post_init()  # type: ignore[attr-defined]
        family.vision_tower.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model like transformers' own method, and freeze its tower."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        family_of(model).vision_tower.requires_grad_(False)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, Branch):
            nn.init.zeros_(module.cls_token)
            nn.init.normal_(module.time, std=0.02)
            for gate in (module.merge_gate, module.output_gate):
                if gate is not None:
                    nn.init.zeros_(gate)
        elif isinstance(module, TemporalLayer):
            nn.init.zeros_(module.fc.weight)
            nn.init.zeros_(module.fc.bias)


def _image_features(base: Any) -> Callable[..., Any]:
    """Make the family's ``get_image_features`` accept videos and `Visuals` as well as stills."""

    @_takes_videos(base.get_image_features, ("use_branch",))
    def get_image_features(self: Any, **given: Any) -> Any:
        pixels: Any = given.get("pixel_values")
        use_branch = given.pop("use_branch", None)
        if not self._holds_videos(pixels, given.get("image_sizes")):
            return base.get_image_features(self, **given)
        del given["pixel_values"]
        question = {name: given.pop(name) for name in list(given) if name.startswith("qformer_")}
        output: Any = BaseModelOutputWithPooling()
        output.pooler_output = self._mixed_features(Visuals.of(pixels), use_branch, question, given)
        return output

    return get_image_features


def _inner_methods(cls: Any, base: Any) -> Any:
    """Give LLaVA's inner class a ``forward`` that takes videos, around that of its family."""

    @_takes_videos(base.forward)
    def forward(self: Any, **given: Any) -> Any:
        return base.forward(self, **(self._embedded(given) if self._has_videos(given) else _without_videos(given)))

    return _set_methods(cls, base, forward, _image_features(base))


def _outer_methods(cls: Any, base: Any) -> Any:
    """Give a LLaVA ``forward`` and ``generate`` that take videos, around those of its family."""

    @_takes_videos(base.forward)
    def forward(self: Any, **given: Any) -> Any:
        given["labels"] = _without_placeholders(self, given.get("labels"))
        return base.forward(self, **given)  # its inner model takes the videos

    @_takes_videos(base.generate)
    def generate(self: Any, **given: Any) -> Any:
        ids = given["input_ids"] = given.get("input_ids", given.pop("inputs", None))
        if not self.model._has_videos(given):
            self.model.check_no_videos(ids)
            return base.generate(self, **_without_videos(given))
        given = self.model._embedded(given)
        # these ids are not embedded, but some logits processors index scores with them
        return _after_prompts(ids, base.generate(self, input_ids=self.model.known_ids(ids), **given))

    return _set_methods(cls, base, forward, generate)


def _qformer_methods(cls: Any, base: Any) -> Any:
    """Give a BLIP-2 ``forward`` and ``generate`` that take videos, around those of its family."""

    @_takes_videos(base.forward)
    def forward(self: Any, **given: Any) -> Any:
        if given.get("pixel_values") is not None and not self._has_videos(given):
            return base.forward(self, **_without_videos(given))
        given = self._embedded(given)
        given["labels"] = _without_placeholders(self, given.get("labels"))
        if self.config.use_decoder_only_language_model:  # such a model has no arguments for a decoder
            given = {name: value for name, value in given.items() if not name.startswith("decoder_")}
        as_tuple = given.pop("return_dict", None) is False
        outputs = self.language_model(**given, return_dict=True)
        result = Blip2ForConditionalGenerationModelOutput(
            loss=outputs.loss, logits=outputs.logits, language_model_outputs=outputs
        )
        return result.to_tuple() if as_tuple else result

    @_takes_videos(base.generate)
    def generate(self: Any, **given: Any) -> Any:
        if given.get("pixel_values") is not None and not self._has_videos(given):
            self.check_no_videos(given.get("input_ids"))
            return base.generate(self, **_without_videos(given))
        ids: Any = given.get("input_ids")
        given = self._embedded(given)
        if self.language_model.config.is_encoder_decoder:
            return self.language_model.generate(**given)
        return _after_prompts(ids, self.language_model.generate(input_ids=self.known_ids(ids), **given))

    return _set_methods(cls, base, forward, generate, _image_features(base))


def _set_methods(cls: Any, base: Any, *methods: Any) -> Any:
    for method in methods:
        method.__doc__, method.__qualname__ = (
            getattr(base, method.__name__).__doc__,
            f"{cls.__name__}.{method.__name__}",
        )
        setattr(cls, method.__name__, method)
    cls._no_split_modules = [*(base._no_split_modules or []), *WHOLE]
    return cls


def _around(make_methods: Callable[[Any, Any], Any], base: type) -> Callable[[Any], Any]:
    """Give a class methods that accept videos, around those of ``base``, and record how for `derive`."""

    def decorate(cls: Any) -> Any:
        cls._make_methods = staticmethod(make_methods)
        return make_methods(cls, base)

    return decorate


def _without_videos(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in _VIDEO_ARGUMENTS}


def _without_placeholders(model: Any, labels: Tensor | None) -> Tensor | None:
    """Ignore video tokens in the labels, because they are not in the vocabulary."""
    if labels is None or model.config.video_token_index is None:
        return labels
    return labels.masked_fill(labels == model.config.video_token_index, _IGNORED)


def _after_prompts(ids: Tensor, output: Any) -> Any:
    """Restore the original prompts at the start of the sequences that ``generate`` returned."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    sequences[:, : ids.shape[1]] = ids.repeat_interleave(len(sequences) // len(ids), 0)
    return output


def _insert(embeds: Tensor, places: Tensor, features: Sequence[Tensor], kind: str) -> Tensor:
    """Write the features, one after the other, into ``embeds`` where ``places`` is True."""
    rows = torch.cat([feature.flatten(0, -2) for feature in features]).to(embeds.device, embeds.dtype)
    if (count := int(places.sum())) != len(rows):
        raise ValueError(
            f"input_ids have {count} {kind} tokens, but the {len(features)} {kind}s take {len(rows)} of them"
        )
    return embeds.masked_scatter(places[..., None].to(embeds.device), rows)


@_around(_inner_methods, LlavaModel)
class BTAdapterLlavaModel(VideoPrompts, LlavaModel):
    """LLaVA-1.5 with a branch, without its head: see :class:`VideoPrompts`."""


@_around(_inner_methods, LlavaNextModel)
class BTAdapterLlavaNextModel(VideoPrompts, LlavaNextModel):
    """LLaVA-NeXT with a branch, without its head: see :class:`VideoPrompts`."""


@_around(_inner_methods, VipLlavaModel)
class BTAdapterVipLlavaModel(VideoPrompts, VipLlavaModel):
    """ViP-LLaVA with a branch, without its head: see :class:`VideoPrompts`."""


class _Llava(VideoModel):
    """A LLaVA with a branch; its methods for videos delegate to the inner model."""

    model: Any

    @property
    def video_token_id(self) -> int:
        """See :attr:`VideoPrompts.video_token_id`."""
        return self.model.video_token_id

    def get_video_features(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See :meth:`VideoPrompts.get_video_features`."""
        return self.model.get_video_features(*args, **kwargs)

    def embed_prompts(self, *args: Any, **kwargs: Any) -> Tensor:
        """See :meth:`VideoPrompts.embed_prompts`."""
        return self.model.embed_prompts(*args, **kwargs)


@_around(_outer_methods, LlavaForConditionalGeneration)
class BTAdapterLlavaForConditionalGeneration(_Llava, LlavaForConditionalGeneration):
    """LLaVA-1.5, or a converted LLaVA v1, with a branch: see :class:`VideoPrompts`."""

    config_class = BTAdapterLlavaConfig


@_around(_outer_methods, LlavaNextForConditionalGeneration)
class BTAdapterLlavaNextForConditionalGeneration(_Llava, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with a branch: see :class:`VideoPrompts`."""

    config_class = BTAdapterLlavaNextConfig


@_around(_outer_methods, VipLlavaForConditionalGeneration)
class BTAdapterVipLlavaForConditionalGeneration(_Llava, VipLlavaForConditionalGeneration):
    """ViP-LLaVA with a branch: see :class:`VideoPrompts`."""

    config_class = BTAdapterVipLlavaConfig


@_around(_qformer_methods, Blip2ForConditionalGeneration)
class BTAdapterBlip2ForConditionalGeneration(VideoModel, VideoPrompts, Blip2ForConditionalGeneration):
    """BLIP-2 with a branch: see :class:`VideoPrompts`."""

    config_class = BTAdapterBlip2Config


@_around(_qformer_methods, InstructBlipForConditionalGeneration)
class BTAdapterInstructBlipForConditionalGeneration(VideoModel, VideoPrompts, InstructBlipForConditionalGeneration):
    """InstructBLIP with a branch: see :class:`VideoPrompts`."""

    config_class = BTAdapterInstructBlipConfig


NATIVE_CLASSES: dict[str, Any] = {
    "llava": BTAdapterLlavaForConditionalGeneration,
    "llava_next": BTAdapterLlavaNextForConditionalGeneration,
    "vipllava": BTAdapterVipLlavaForConditionalGeneration,
    "blip-2": BTAdapterBlip2ForConditionalGeneration,
    "instructblip": BTAdapterInstructBlipForConditionalGeneration,
}
INNER_CLASSES: dict[str, Any] = {
    "llava": BTAdapterLlavaModel,
    "llava_next": BTAdapterLlavaNextModel,
    "vipllava": BTAdapterVipLlavaModel,
}


def derive(native: Any, image_class: type) -> Any:
    """Make a video chat model's class from ``image_class``, a subclass of the base of ``native``."""
    fields = {"config_class": native.config_class} if hasattr(native, "config_class") else {}
    return native._make_methods(type(f"BTAdapter{image_class.__name__}", (native, image_class), fields), image_class)
