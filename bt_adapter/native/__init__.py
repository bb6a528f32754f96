"""Video chat models as Hugging Face models: configuration, model, processor, found by the Auto classes once imported."""

from transformers import AutoConfig, AutoModelForImageTextToText

from bt_adapter.native.modeling import (
    NATIVE_CLASSES,
    BTAdapterBlip2ForConditionalGeneration,
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaNextForConditionalGeneration,
    BTAdapterVipLlavaForConditionalGeneration,
    VideoModel,
)

__all__ = [
    "NATIVE_CLASSES",
    "BTAdapterBlip2ForConditionalGeneration",
    "BTAdapterInstructBlipForConditionalGeneration",
    "BTAdapterLlavaForConditionalGeneration",
    "BTAdapterLlavaNextForConditionalGeneration",
    "BTAdapterVipLlavaForConditionalGeneration",
    "VideoModel",
]

for _native in NATIVE_CLASSES.values():
    _config = _native.config_class  # type: ignore[attr-defined]
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _native)
