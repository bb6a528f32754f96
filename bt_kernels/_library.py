"""Defining an op: schema, fake kernels, autograd and autocast for one forward and one backward.

Forward and backward are each a registered op, so ``torch.compile`` sees both whole. An op's tensors are followed by
the flattened ``VisibleTokens`` and the backend, which must be positional (autocast registration refuses keywords).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from bt_kernels._dispatch import Kernel, choose, forced_backend
from bt_kernels.visible import VisibleTokens

_LIBRARY = torch.library.Library("bt_kernels", "DEF")
_VISIBLE = "Tensor index, Tensor? frame_counts, SymInt patches, SymInt frames, SymInt? slots"

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """A registered op: its name, its kernels in order of preference, and the names of its tensor arguments."""

    name: str
    kernels: tuple[Kernel, ...]
    arguments: tuple[str, ...]

    def __call__(self, *args):
        """Call the registered op, positionally."""
        return getattr(torch.ops.bt_kernels, self.name)(*args)


def visible_arguments(visible: VisibleTokens, index: Tensor | None = None) -> tuple:
    """``visible`` as the registered ops take it; ``index`` replaces its own (token alignment's target)."""
    return (
        visible.index if index is None else index,
        visible.frame_counts,
        visible.patches,
        visible.frames,
        visible.slots,
    )


def define_op(
    name: str,
    tensors: str,
    differentiable: tuple[str, ...],
    kernels: tuple[Kernel, ...],
    fake: Callable[..., Tensor],
    extra: str = "",
    autocast: str = "widest",
    uncast: tuple[str, ...] = (),
) -> Op:
    """Register ``bt_kernels::name`` and ``bt_kernels::name_backward`` and return the op.

    Args:
        name: of the op.
        tensors: schema of the tensor arguments, for example ``"Tensor backbone, Tensor? gate"``.
        differentiable: the arguments that may get a gradient; the backward op returns one tensor for each (of size
            0 where it is not needed).
        kernels: see :class:`Kernel`. ``forward(*args)`` and ``backward(grad, *args, needs)``, where ``args`` are
            tensors, visible tokens and extras, and ``needs`` one bool for each differentiable argument.
        fake: shape of the output from ``args``.
        extra: schema of what follows the visible tokens, for example ``", float eps"``.
        autocast: "lower" casts floating-point inputs to autocast's dtype (as matrix products do), "widest" to the
            widest of theirs (as ``torch.cat`` does).
        uncast: tensor arguments that autocast leaves alone.
    """
    arguments = f"{tensors}, {_VISIBLE}{extra}"
    names = tuple(part.split()[-1] for part in arguments.split(","))
    places = tuple(names.index(each) for each in differentiable)
    results = "Tensor" if len(places) == 1 else f"({', '.join(['Tensor'] * len(places))})"
    backward_name = f"{name}_backward"
    _LIBRARY.define(f"{name}({arguments}, str? backend) -> Tensor")
    _LIBRARY.define(f"{backward_name}(Tensor grad, {arguments}, bool[{len(places)}] needs, str? backend) -> {results}")

    def forward(*args):
        *args, asked = args
        return choose(name, kernels, asked, tuple(args)).forward(*args)

    def backward(grad, *args):
        *args, needs, asked = args
        grads = choose(name, kernels, asked, tuple(args)).backward(grad, *args, tuple(needs))
        grads = tuple(grad.new_empty(0) if g is None else g for g in grads)
        return grads[0] if len(grads) == 1 else grads

    def fake_backward(grad, *args):
        *args, needs, _ = args
        grads = tuple(
            torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else grad.new_empty(0)
            for place, need in zip(places, needs, strict=True)
        )
        return grads[0] if len(grads) == 1 else grads

    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward_name, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bt_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    torch.library.register_fake(f"bt_kernels::{backward_name}", fake_backward, lib=_LIBRARY)
    _register_autograd(name, places)
    _refuse_second_derivative(backward_name)
    skipped = {names.index(each) for each in uncast}
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _autocast(name, device.lower(), autocast, skipped), f"Autocast{device}")
    OPS[name] = Op(name, kernels, names)
    return OPS[name]


def _register_autograd(name: str, places: tuple[int, ...]) -> None:
    def setup_context(ctx, inputs, output) -> None:
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.save_for_backward(*[inputs[i] for i in tensors])
        ctx.tensors = tensors
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.inputs[-1] = forced_backend(inputs[-1])  # a block that forces a backend holds for its backward too

    def run_backward(ctx, grad):
        inputs = list(ctx.inputs)
        for place, tensor in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[place] = tensor
        *args, asked = inputs
        needs = [ctx.needs_input_grad[place] for place in places]
        grads = getattr(torch.ops.bt_kernels, f"{name}_backward")(grad, *args, needs, asked)
        if len(places) == 1:
            grads = (grads,)
        result = [None] * len(inputs)
        for place, need, value in zip(places, needs, grads, strict=True):
            result[place] = value if need else None
        return tuple(result)

    torch.library.register_autograd(f"bt_kernels::{name}", run_backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(backward_name: str) -> None:
    """Without a rule of its own the backward op would be taken for a constant, after a warning."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"bt_kernels::{backward_name} has no derivative: the ops can be differentiated once")

    torch.library.register_autograd(f"bt_kernels::{backward_name}", refuse, lib=_LIBRARY)


def _autocast(name: str, device: str, policy: str, skipped: set[int]) -> Callable[..., Tensor]:
    def cast_and_call(*args):
        floats = {
            i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and i not in skipped
        }
        widest = reduce(torch.promote_types, (a.dtype for a in floats.values()))
        # float64 keeps its precision, as in torch's own autocast rules
        lower = policy == "lower" and widest != torch.float64
        dtype = torch.get_autocast_dtype(device) if lower else widest
        cast = [a.to(dtype) if i in floats else a for i, a in enumerate(args)]
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.bt_kernels, name)(*cast)

    return cast_and_call
