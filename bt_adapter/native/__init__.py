"""Video chat models as Hugging Face models, which the Auto classes of transformers know once this is imported."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from bt_adapter.native.collator import VideoChatCollator
from bt_adapter.native.modeling import (
    NATIVE_CLASSES,
    BTAdapterBlip2ForConditionalGeneration,
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaNextForConditionalGeneration,
    BTAdapterVipLlavaForConditionalGeneration,
    VideoModel,
    VideoPrompts,
)
from bt_adapter.native.processing import (
    PROCESSORS,
    BTAdapterBlip2Processor,
    BTAdapterInstructBlipProcessor,
    BTAdapterLlavaNextProcessor,
    BTAdapterLlavaProcessor,
    make_processor,
)

__all__ = [
    "NATIVE_CLASSES",
    "PROCESSORS",
    "BTAdapterBlip2ForConditionalGeneration",
    "BTAdapterBlip2Processor",
    "BTAdapterInstructBlipForConditionalGeneration",
    "BTAdapterInstructBlipProcessor",
    "BTAdapterLlavaForConditionalGeneration",
    "BTAdapterLlavaNextForConditionalGeneration",
    "BTAdapterLlavaNextProcessor",
    "BTAdapterLlavaProcessor",
    "BTAdapterVipLlavaForConditionalGeneration",
    "VideoChatCollator",
    "VideoModel",
    "VideoPrompts",
    "make_processor",
]

for _name, _native in NATIVE_CLASSES.items():
    _config = _native.config_class
    AutoConfig.register(_config.model_type, _config)
    AutoModelForImageTextToText.register(_config, _native)
    AutoProcessor.register(_config, PROCESSORS[_name])
