"""Video chat models in vLLM: this package's encoder of stills and videos beside vLLM's own language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from bt_adapter.vllm.encoder import VisualEncoder
from bt_adapter.vllm.inputs import video_token
from bt_adapter.vllm.names import ENCODER, LANGUAGE, RENAMED
from bt_adapter.vllm.processing import VideoChatDummyInputs, VideoChatInfo, VideoChatProcessor


@MULTIMODAL_REGISTRY.register_processor(VideoChatProcessor, info=VideoChatInfo, dummy_inputs=VideoChatDummyInputs)
class VideoChatForVLLM(nn.Module, SupportsMultiModal, SupportsLoRA, SupportsPP):
    """A video chat model for vLLM: a video becomes P+1 tokens of the prompt, whatever its number of frames.

    Adapters (LoRA) apply to the language model; an adapter of another part is refused. The encoder is not sharded:
    every process of a tensor-parallel group computes all of it.
    """

    # Methods of vLLM's mixins, which type checkers do not know where vLLM is not installed.
    configure_mm_token_handling: Callable[..., None]
    _mark_tower_model: Callable[..., Any]
    _mark_language_model: Callable[..., Any]

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex=dict(RENAMED))

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return the text that marks a still or video in a prompt without a chat template."""
        if modality in ("image", "video"):
            return f"<{modality}>"
        raise ValueError(f"modality must be image or video, but is {modality}")

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.config = config
        self.configure_mm_token_handling(
            vocab_size=config.text_config.vocab_size, mm_token_ids=[config.image_token_index, video_token(config)]
        )
        with self._mark_tower_model(vllm_config, {"image", "video"}):
            self.encoder = VisualEncoder(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=config.text_config, prefix=maybe_prefix(prefix, LANGUAGE)
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, **inputs: Any) -> list[Tensor]:
        """Encode the stills, or the videos, of a step as embeddings, one ``[tokens, W]`` each."""
        found: list[Tensor] = []
        stills, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
        if stills is not None:
            known = [None] * len(stills) if sizes is None else [(int(h), int(w)) for h, w in sizes]
            found += self.encoder.stills(list(stills), known)
        if (videos := inputs.get("pixel_values_videos")) is not None:
            found += self.encoder.videos(list(videos))
        return found

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Run the language model on the tokens of a step, or on their embeddings with stills and videos in place."""
        if intermediate_tensors is not None:  # this process holds a later part of the layers
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Compute the logits over the vocabulary."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a video chat model's files; returns the names of those that were loaded."""
        with torch.no_grad():
            return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

    def get_mm_mapping(self) -> MultiModelKeys:
        """Return the parts of the model by their purpose, which vLLM uses to tell adapters apart."""
        return MultiModelKeys.from_string_field(
            language_model=LANGUAGE, connector=f"{ENCODER}.chat.model.multi_modal_projector", tower_model=ENCODER
        )
