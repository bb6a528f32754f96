"""A plug-in for vLLM that runs video chat models of this package under ``vllm serve`` and ``vllm.LLM``.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins``. Nothing else of the package imports this
folder, and this module imports vLLM only when vLLM itself calls :func:`register`.
"""

from __future__ import annotations

LOADER = "bt_adapter"
"""Name of this package's video decoder in vLLM's registry of video loaders."""

MODEL = "bt_adapter.vllm.model:VideoChatForVLLM"
"""Class of the models, which vLLM imports when it loads one."""

_READER = "BTAdapterVideoReader"


def register() -> None:
    """Register models, configurations, processors and the video decoder with vLLM; repeated calls change nothing.

    vLLM calls it in each of its processes. Models of the families LLaVA, LLaVA-NeXT and ViP-LLaVA are registered. Their
    videos are decoded by this package, unless ``--media-io-kwargs '{"video": {"video_backend": ...}}'`` names another
    decoder; other models of vLLM keep theirs.
    """
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
    from vllm import ModelRegistry
    from vllm.multimodal.video import VIDEO_LOADER_REGISTRY

    from bt_adapter.native import NATIVE_CLASSES
    from bt_adapter.vllm.loader import BTAdapterVideoLoader
    from bt_adapter.vllm.names import SERVED

    for family in SERVED:
        native = NATIVE_CLASSES[family]
        ModelRegistry.register_model(native.__name__, MODEL)
        # vLLM chooses the decoder of a model by the name of its video processor, which it reads from this table
        VIDEO_PROCESSOR_MAPPING_NAMES[native.config_class.model_type] = _READER
    VIDEO_LOADER_REGISTRY.register(LOADER, video_processor=_READER)(BTAdapterVideoLoader)
