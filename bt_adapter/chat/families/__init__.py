"""One interface, `family_of`, to the image chat models that a branch can be attached to.

Engine, prompts and tuning use the `Family`, never the model's class. The differences are in ``projector`` (LLaVA-1.5,
LLaVA-NeXT, ViP-LLaVA: a projector after a CLIP) and ``qformer`` (BLIP-2, InstructBLIP: a Q-Former after an EVA-CLIP).
"""

from __future__ import annotations

from typing import Any

from bt_adapter.chat.families.base import Family
from bt_adapter.chat.families.projector import Llava, LlavaNext, VipLlava
from bt_adapter.chat.families.qformer import Blip2, InstructBlip
from bt_adapter.chat.families.visuals import Visuals
from bt_adapter.chat.families.wrapped import unwrapped

__all__ = ["FAMILIES", "Family", "Visuals", "family_of"]

FAMILIES: tuple[type[Family], ...] = (Llava, LlavaNext, VipLlava, Blip2, InstructBlip)


def family_of(chat: Any) -> Family:
    """Return the family of a chat model, which gives access to its parts. A ``PeftModel`` is unwrapped.

    Raises:
        TypeError: ``chat`` is not one of the supported models.
    """
    kinds = {kind: family for family in FAMILIES for kind in (family.model_class, family.inner_class) if kind}
    inner = unwrapped(chat, tuple(kinds))
    for kind, family in kinds.items():
        if isinstance(inner, kind):
            return family(inner)
    names = ", ".join(family.model_class.__name__ for family in FAMILIES)
    raise TypeError(f"image_chat_model must be one of {names}, but is {type(chat).__name__}")
