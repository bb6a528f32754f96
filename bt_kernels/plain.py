"""Whether a layer may be computed from its weights alone, without calling it.

A fused op reads ``layer.weight`` and never calls ``layer``. Whatever stands in the layer's place or around it would
then be ignored without a word: an adapter (LoRA), a hook, a parametrisation, a quantised, sharded or offloaded weight.
So every op that reads weights asks here first, at every call, and calls the layers where the answer is no.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as _all_modules

_LAYERS = (nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, nn.Identity)


def why_not_plain(module: nn.Module, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Say why ``module`` does more than its weights and its class say, or None where it does not.

    Of the module alone, not of what it holds; see :func:`why_not_all_plain`.

    Args:
        module: a layer.
        classes: that the caller knows how to compute, beside torch's own ``Linear``, ``LayerNorm``, ``Conv2d``,
            ``Embedding`` and ``Identity``. A class derived from one of them is another class.
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
    # offloading and casting by other libraries put a function of their own there
    if "forward" in module.__dict__:
        return "has another forward than its class"
    for name, weight in module._parameters.items():
        if weight is None:
            continue
        if type(weight) is not nn.Parameter and type(weight) is not Tensor:
            return f"has a {name} that is a {type(weight).__name__}"
        if weight.is_meta:
            return f"has a {name} on the meta device, that is without values"
    return None


def why_not_all_plain(module: nn.Module, classes: tuple[type[nn.Module], ...] = ()) -> str | None:
    """Say which of ``module`` and the modules inside it is not plain, and why; None where all are.

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
    """Whether calling ``layer`` is what its class computes from its weights, and nothing else."""
    return not has_global_hooks() and why_not_plain(layer) is None


def has_global_hooks() -> bool:
    """Whether hooks on all modules of the process are registered."""
    return bool(
        _all_modules._global_forward_hooks
        or _all_modules._global_forward_pre_hooks
        or _all_modules._global_backward_hooks
        or _all_modules._global_backward_pre_hooks
    )


def _only_records(hook: object) -> bool:
    """Whether a forward hook is transformers' own, which hands on what it sees to ``output_hidden_states``."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
