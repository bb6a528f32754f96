"""Checks whether a layer can be computed from its weights only, without calling it.

A fused op reads ``layer.weight`` and never calls ``layer``. It would silently ignore an adapter (LoRA), a hook, a
parametrisation, or a quantised, sharded or offloaded weight. So every op that reads weights runs these checks at every
call, and calls the layers if a check fails.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _all_modules

_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Identity)


def why_not_plain(module: nn.Module, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Return why ``module`` cannot be computed from only its class and weights, or None if it can.

    Only the module itself is checked, not its children; see :func:`why_not_all_plain`.

    Args:
        module: a layer.
        classes: classes the caller can compute, in addition to torch's ``Linear``, ``LayerNorm``, ``Conv2d``,
            ``Embedding`` and ``Identity``. A subclass of one of them does not count.
    """
    kind = type(module)
    if kind not in _LAYERS and kind not in classes:
        return f"is a {kind.__module__}.{kind.__name__}"
    if (
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or (module._forward_hooks and not all(_only_records(hook) for hook in module._forward_hooks.values()))
    ):
        return "has hooks"
    # Other libraries replace forward on the instance, for offloading and casting.
    if "forward" in module.__dict__:
        return "has another forward than its class"
    for name, weight in module._parameters.items():
        if weight is None:
            continue
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"has a {name} that is a {type(weight).__name__}"
        if weight.is_meta:
            return f"has a {name} on the meta device, which has no values"
    return None


def why_not_all_plain(module: nn.Module, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Return the name of the first module in ``module`` that is not plain, with the reason; None if all are plain.

    Args:
        module: a tree of layers.
        classes: as for :func:`why_not_plain`.
    """
    if has_global_hooks():
        return "every module has hooks (torch.nn.modules.module.register_module_…_hook)"
    for name, part in module.named_modules():
        if (reason := why_not_plain(part, classes)) is not None:
            return f"{name or type(module).__name__} {reason}"
    return None


def is_plain(layer: nn.Module) -> bool:
    """Return whether calling ``layer`` computes only what its class does from its weights."""
    return not has_global_hooks() and why_not_plain(layer) is None


def has_global_hooks() -> bool:
    """Return whether hooks that apply to all modules of the process are registered."""
    return bool(
        _all_modules._global_forward_hooks
        or _all_modules._global_forward_pre_hooks
        or _all_modules._global_backward_hooks
        or _all_modules._global_backward_pre_hooks
    )


def _only_records(hook: object) -> bool:
    """Return whether a forward hook is that of transformers that only records outputs for ``output_hidden_states``."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
