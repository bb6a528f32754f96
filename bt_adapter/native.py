"""Video chat models as Hugging Face models; importing this module registers them with transformers' Auto classes."""

from bt_adapter.chat.native import *  # noqa: F403
from bt_adapter.chat.native import __all__ as __all__
