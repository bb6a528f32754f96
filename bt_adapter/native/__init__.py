"""Video chat models as Hugging Face models, which the Auto classes of transformers know once this is imported."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

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
    # files have the names that the family's files have: transformers writes a model that it loaded under the names it
    # found, also one that `attach` made a video chat model
    if (_names := get_checkpoint_conversion_mapping(_name)) is not None:
        register_checkpoint_conversion_mapping(_config.model_type, _names, overwrite=True)
