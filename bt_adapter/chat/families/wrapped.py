"""Find the module inside wrappers: PEFT's copies, compilation, data parallelism."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

Wanted = TypeVar("Wanted", bound=nn.Module)


def unwrapped(module: Any, wanted: type[Wanted] | tuple[type[Wanted], ...]) -> Wanted | None:
    """Return the module of class ``wanted`` that calling ``module`` runs, or None if there is none.

    Looks into PEFT's ``PeftModel`` and ``ModulesToSaveWrapper`` (its currently active copy), ``torch.compile``'s
    wrapper and those of data parallelism.
    """
    while isinstance(module, nn.Module):
        if isinstance(module, wanted):
            return module
        module = _inside(module)
    return None


def _inside(module: Any) -> Any:
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = module.active_adapters
        if module.disable_adapters or not active or active[0] not in module.modules_to_save:
            return module.original_module
        return module.modules_to_save[active[0]]
    if callable(get := getattr(module, "get_base_model", None)):
        return get()
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(module, name, None), nn.Module):
            return inner
    return None
