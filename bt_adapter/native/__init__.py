"""Video chat models as Hugging Face models, which the Auto classes of transformers know once this is imported."""

from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping

from bt_adapter.native.collator import VideoChatCollator
from bt_adapter.native.modeling import (
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

# Files have the names of tensors that the family's files have: transformers writes a model that it loaded under the
# names it found, also one that `attach` made a video chat model. It looks names up by type of model and by class.
_alike = {name: native.config_class.model_type for name, native in NATIVE_CLASSES.items()}
for _native in (*NATIVE_CLASSES.values(), *INNER_CLASSES.values()):
    _alike[_native.__name__.removeprefix("BTAdapter")] = _native.__name__
for _theirs, _ours in _alike.items():
    if (_names := get_checkpoint_conversion_mapping(_theirs)) is not None:
        register_checkpoint_conversion_mapping(_ours, _names, overwrite=True)
