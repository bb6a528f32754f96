"""Video chat models as Hugging Face models; importing this package registers them with transformers' Auto classes."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from bt_adapter.chat.native.collator import VideoChatCollator
from bt_adapter.chat.native.modeling import (
    INNER_CLASSES,
    NATIVE_CLASSES,
    BTAdapterBlip2ForConditionalGeneration,
    BTAdapterInstructBlipForConditionalGeneration,
    BTAdapterLlavaForConditionalGeneration,
    BTAdapterLlavaNextForConditionalGeneration,
    BTAdapterVipLlavaForConditionalGeneration,
    VideoModel,
    VideoPrompts,
)
from bt_adapter.chat.native.processing import (
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

# Our files use the tensor names of the family's files: transformers saves a loaded model under the names that it found,
# also after `attach` changed its class. It looks up the mapping of names by model type and by class.
_aliases = {name: native.config_class.model_type for name, native in NATIVE_CLASSES.items()}
for _native in (*NATIVE_CLASSES.values(), *INNER_CLASSES.values()):
    _aliases[_native.__name__.removeprefix("BTAdapter")] = _native.__name__
for _theirs, _ours in _aliases.items():
    if (_names := get_checkpoint_conversion_mapping(_theirs)) is not None:
        register_checkpoint_conversion_mapping(_ours, _names, overwrite=True)
