"""The interface that all supported image chat models share.

Legend: B videos, T frames, P patches of a frame, D width of the vision tower, L its layers, W width of the language
model, V tokens of one video in a prompt.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from bt_adapter.chat.families.wrapped import unwrapped
from bt_adapter.data import CLIP_MEAN, CLIP_STD
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.time_steps import Long
from bt_adapter.progress import Progress
from bt_adapter.towers.config import TowerConfig
from bt_kernels.plain import has_global_hooks, why_not_plain

# implementations of the same attention, whose results differ only by rounding
_ATTENTIONS = (None, "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")


class Family(ABC):
    """A view of an image chat model, made by `family_of`; it holds no state but the model.

    Attributes:
        chat: the model.
        name: its ``config.model_type``.
        mean, std: normalisation that its tower was trained with.
        inner_class: class of an inner model that `family_of` also accepts; None: there is none.
        has_qformer: whether a Q-Former reads the tower's tokens.
        needs_question: whether :meth:`project` requires the question (InstructBLIP).
        layers_removed: number of last tower layers that the model's files lack, 0 or 1.
    """

    name: ClassVar[str]
    model_class: ClassVar[type]
    mean: ClassVar[tuple[float, ...]] = CLIP_MEAN
    std: ClassVar[tuple[float, ...]] = CLIP_STD
    inner_class: ClassVar[type | None] = None
    has_qformer: ClassVar[bool] = False
    needs_question: ClassVar[bool] = False
    layers_removed: ClassVar[int] = 0

    def __init__(self, chat: Any) -> None:
        self.chat = chat

    @property
    @abstractmethod
    def vision_tower(self) -> nn.Module:
        """The chat model's vision tower, or the wrapper around it."""

    @property
    @abstractmethod
    def tower_parts(self) -> tuple[type[nn.Module], ...]:
        """Transformers' classes of the tower (first) and of the modules inside it."""

    @property
    def plain_tower(self) -> Any:
        """The vision tower without wrappers."""
        tower = self.vision_tower
        return unwrapped(tower, self.tower_parts[0]) or tower

    @abstractmethod
    def tower(self) -> tuple[dict[str, Tensor], TowerConfig]:
        """Return the tower's tensors under the names of ``towers.tower.Tower``, not copied, and its configuration.

        Layers with adapters give their base tensors. Quantised and sharded tensors are left out. Raises TypeError if
        the tower is neither a CLIP nor an EVA-CLIP.
        """

    @abstractmethod
    def position_table(self) -> Tensor:
        """Return the tower's current position embeddings, ``[1+P, D]``."""

    @abstractmethod
    def call_layer(self, layer: int, tokens: Tensor) -> Tensor:
        """Call one of the tower's layers as a module, ``[n, 1+P, D]`` to the same shape."""

    def why_not_plain(self) -> str | None:
        """Return why the tower must be called as a module, not computed from its weights; None: it need not."""
        tower: Any = self.vision_tower
        if (kind := type(tower)) is not self.tower_parts[0]:
            return f"is a {kind.__module__}.{kind.__name__}"
        if has_global_hooks():
            return "has hooks, as all modules have"
        config: Any = tower.config
        known = (*self.tower_parts, nn.ModuleList, type(ACT2FN[config.hidden_act]))
        for name, part in tower.named_modules():
            if name == "post_layernorm":  # image tokens do not use it, or it is called as a module
                continue
            if (reason := why_not_plain(part, known)) is not None:
                return f"{name or 'it'} {reason}"
            if type(part) is nn.LayerNorm and part.eps != config.layer_norm_eps:
                return f"{name} has another eps than the configuration"
        if len(tower.encoder.layers) != config.num_hidden_layers:
            return f"has {len(tower.encoder.layers)} layers, not the configuration's {config.num_hidden_layers}"
        if (attention := getattr(config, "_attn_implementation", None)) not in _ATTENTIONS:
            return f"has the attention implementation {attention}"
        return None

    def tower_learns(self) -> bool:
        """Whether a tower parameter that image tokens depend on requires a gradient."""
        named = self.vision_tower.named_parameters()
        return any(p.requires_grad and "post_layernorm." not in name for name, p in named)

    def tower_place(self) -> tuple[torch.device, torch.dtype]:
        """Return the device on which the tower runs, and the dtype of its input images."""
        place: Tensor = self.plain_tower.embeddings.class_embedding
        device = place.device
        for module in self.vision_tower.modules() if place.is_meta else ():
            wanted = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if wanted is not None:
                return torch.device(wanted), place.dtype
        return device, place.dtype

    @property
    @abstractmethod
    def feature_layers(self) -> tuple[int, ...]:
        """Numbers of tower layers after which image tokens are read; several are concatenated along channels."""

    @property
    def home(self) -> Any:
        """The module that has ``get_image_features`` and in which the branch is registered as ``bt_adapter``."""
        return self.chat

    @property
    def tower_config(self) -> TowerConfig:
        """The tower configuration that a branch must match; it counts the layers that the chat model's files lack."""
        config = self.tower()[1]
        return replace(config, num_hidden_layers=config.num_hidden_layers + self.layers_removed)

    @property
    def image_size(self) -> int:
        """Height and width of a frame, in pixels."""
        size = self.chat.config.vision_config.image_size
        return size if isinstance(size, int) else size[0]

    @property
    def patches(self) -> int:
        """P, the number of patch tokens of one frame."""
        size = self.chat.config.vision_config.patch_size
        return (self.image_size // (size if isinstance(size, int) else size[0])) ** 2

    @property
    @abstractmethod
    def video_length(self) -> int:
        """V, the number of image tokens of one video in a prompt, for any number of frames."""

    @abstractmethod
    def image_length(self, height: int | None = None, width: int | None = None) -> int:
        """Return the number of image tokens of a still in a prompt; only LLaVA-NeXT needs the size of the picture."""

    @property
    def image_token_id(self) -> int:
        """Id of the token that visual tokens replace. Raises ValueError if the configuration names none."""
        token = self.chat.config.image_token_id
        if token is None:
            raise ValueError(f"the configuration of this {self.name} model names no image_token_index: set it")
        return token

    def image_token(self, tokenizer: Any) -> str:
        """Return the text of the image token. Raises ValueError if the tokenizer does not know it."""
        text = tokenizer.convert_ids_to_tokens(self.image_token_id)
        if text is None:
            raise ValueError(f"tokenizer has no token {self.image_token_id}, the chat model's image token")
        return text

    @abstractmethod
    def project(self, tokens: Tensor, question: Mapping[str, Tensor] | None = None) -> Tensor:
        """Project the result of :meth:`video_tokens` to the language model's embeddings, ``[B, V, W]``.

        question: required if ``needs_question``: ``input_ids`` and ``attention_mask`` ``[B, S]`` from the Q-Former's
        tokenizer. Gradients flow to the tokens and to the projector.
        """

    def video_tokens(
        self,
        model: BTAdapterVisionModel,
        pixel_values: Tensor | None = None,
        features: Tensor | None = None,
        start_layer: int | None = None,
        branch: bool = True,
        progress: Progress | None = None,
        long: Long = "average",
        draws: Iterable[Tensor] | None = None,
    ) -> Tensor:
        """Compute the tokens of videos before the projector or Q-Former, ``[B, P+1, D · number of feature layers]``.

        Args:
            model: the attached branch with its tower.
            pixel_values: normalised frames ``[B, T, 3, h, w]``, or None where ``features`` are given, stored for
                ``start_layer``, ``[B, T, 1+P, D]``: see ``BTAdapterVisionModel.video_tokens``.
            branch: False: the mean over the frames of the tower's tokens, without the branch (requires pixels).
            progress, long, draws: see there.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or value; the message names it.
        """
        if branch:
            return model.video_tokens(
                pixel_values, features=features, start_layer=start_layer, draws=draws, progress=progress, long=long
            )
        if pixel_values is None:
            raise ValueError("pixel_values must be given where branch is False")
        return model.frame_mean_tokens(pixel_values, progress)

    def stills(self, pixels: list[Tensor], sizes: list, kwargs: dict[str, Any]) -> list[Tensor]:
        """Encode stills with the image chat model's own code as embeddings, one tensor per still.

        Args:
            pixels: normalised stills ``[3, h, w]``, or ``[tiles, 3, h, w]`` for LLaVA-NeXT.
            sizes: the picture's (height, width) for each still in tiles, else None.
            kwargs: further arguments of its ``get_image_features``.
        """
        return list(self.home.get_image_features(torch.stack(pixels), **kwargs).pooler_output)

    def takes_videos(self, pixel_values: Tensor, image_sizes: Any = None) -> bool:
        """Whether a plain tensor passed as ``pixel_values`` holds videos ``[V, T, 3, h, w]``."""
        return pixel_values.ndim == 5

    @property
    @abstractmethod
    def language_model(self) -> nn.Module:
        """The decoder without its output layer: ``inputs_embeds [B, S, W]`` to ``last_hidden_state [B, S, W]``."""

    @property
    @abstractmethod
    def generator(self) -> Any:
        """The model whose ``generate(inputs_embeds=…)`` takes embeddings that already contain the visual tokens."""

    @property
    def lm_head(self) -> nn.Module:
        """The output layer, from hidden states ``[…, W]`` to logits over the vocabulary."""
        return self.chat.get_output_embeddings()

    @property
    def input_embeddings(self) -> nn.Module:
        """The embedding layer, from token ids to ``[…, W]``."""
        return self.chat.get_input_embeddings()


def plain_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep the plain floating-point tensors; quantised and sharded ones are left out.

    PEFT's ``base_layer`` is removed from names, so that a layer with an adapter has its usual name.
    """
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and type(tensor) in (Tensor, nn.Parameter)
    }


def read_table(owner: nn.Module, name: str) -> Tensor:
    """Read a parameter's current value, gathered if it is sharded, loaded if it is offloaded."""
    tensor = getattr(owner, name)
    if tensor.is_meta and (hook := getattr(owner, "_hf_hook", None)) is not None:
        for one in getattr(hook, "hooks", [hook]):  # accelerate may combine several hooks
            if (stored := getattr(one, "weights_map", None)) is not None:
                return stored[name].to(one.execution_device)
    return tensor.full_tensor().detach() if hasattr(tensor, "full_tensor") else tensor
