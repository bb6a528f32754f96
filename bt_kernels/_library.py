"""Defining an op: schema, fake kernels, autograd and autocast for one forward and one backward.

Forward and backward are each a registered op, so ``torch.compile`` sees both whole. An op's tensors are followed by
the flattened ``VisibleTokens`` and the backend, which must be positional (autocast registration refuses keywords).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from bt_kernels._dispatch import Kernel, choose, forced_backend
from bt_kernels.visible import VisibleTokens

_LIBRARY = torch.library.Library("bt_kernels", "DEF")
_VISIBLE = "Tensor index, Tensor? frame_counts, SymInt patches, SymInt frames, SymInt? slots"

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """A registered op.

    Attributes:
        name, kernels: its kernels in order of preference.
        arguments: names of its arguments, without the backend.
        differentiable: those that may get a gradient.
        results: how many tensors of the forward are results; the rest is saved for the backward.
        kept: places of the results that the backward reads.
    """

    name: str
    kernels: tuple[Kernel, ...]
    arguments: tuple[str, ...]
    differentiable: tuple[str, ...]
    results: int
    kept: tuple[int, ...]

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
    fake: Callable,
    extra: str = "",
    autocast: str = "widest",
    uncast: tuple[str, ...] = (),
    results: tuple[str, ...] = ("out",),
    keep: tuple[str, ...] = (),
    saved: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
) -> Op:
    """Register ``bt_kernels::name`` and ``bt_kernels::name_backward`` and return the op.

    Args:
        name: of the op.
        tensors: schema of the tensor arguments, for example ``"Tensor backbone, Tensor? gate"``.
        differentiable: the arguments that may get a gradient; the backward op returns one tensor for each (of size
            0 where it is not needed).
        kernels: see :class:`Kernel`. ``forward(*args)`` returns results and saved tensors (alone, not in a tuple, where
            there is one); ``backward(*grads, *args, *kept, *saved, needs)`` a tuple. ``args`` are tensors, visible
            tokens and extras, ``needs`` one bool for each differentiable argument, ``grads`` one for each result (None
            where no gradient came, if there are several).
        fake: the forward's results and saved tensors from ``args``, of the right shape and dtype.
        extra: schema of what follows the visible tokens, for example ``", float eps"``.
        autocast: "lower" casts floating-point inputs to autocast's dtype (as matrix products do), "widest" to the
            widest of theirs (as ``torch.cat`` does).
        uncast: tensor arguments that autocast leaves alone.
        results: names of what the forward returns and is differentiable in.
        keep: those of ``results`` that the backward reads.
        saved: names of further tensors that the forward returns for the backward alone.
        unread: tensor arguments of which the backward wants shape, dtype and device, not the values: they are not kept.
    """
    arguments = f"{tensors}, {_VISIBLE}{extra}"
    names = tuple(part.split()[-1] for part in arguments.split(", "))
    places = tuple(names.index(each) for each in differentiable)
    kept = tuple(results.index(each) for each in keep)
    grads_in = ["Tensor grad"] if len(results) == 1 else [f"Tensor? grad_{each}" for each in results]
    kept_in = [f"Tensor {each}" for each in (*keep, *saved)]
    backward_in = ", ".join([*grads_in, arguments, *kept_in, f"bool[{len(places)}] needs", "str? backend"])
    backward_name = f"{name}_backward"
    _LIBRARY.define(f"{name}({arguments}, str? backend) -> {_tensors(len(results) + len(saved))}")
    _LIBRARY.define(f"{backward_name}({backward_in}) -> {_tensors(len(places))}")

    def forward(*args):
        *args, asked = args
        return choose(name, kernels, asked, tuple(args)).forward(*args)

    def backward(*args):
        *args, needs, asked = args
        chosen = choose(name, kernels, asked, tuple(args[len(results) :][: len(names)]))
        empty = args[len(results)].new_empty
        return _alone(tuple(empty(0) if g is None else g for g in chosen.backward(*args, tuple(needs))))

    def fake_backward(*args):
        *args, needs, _ = args
        args = args[len(results) :]
        return _alone(
            tuple(
                torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
                for place, need in zip(places, needs, strict=True)
            )
        )

    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward_name, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bt_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    torch.library.register_fake(f"bt_kernels::{backward_name}", fake_backward, lib=_LIBRARY)
    _register_autograd(name, places, kept, len(results), frozenset(names.index(each) for each in unread))
    _refuse_second_derivative(backward_name)
    skipped = {names.index(each) for each in uncast}
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _autocast(name, device.lower(), autocast, skipped), f"Autocast{device}")
    OPS[name] = Op(name, kernels, names, differentiable, len(results), kept)
    return OPS[name]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _alone(values: tuple) -> Any:
    return values[0] if len(values) == 1 else values


def _register_autograd(
    name: str, places: tuple[int, ...], kept: tuple[int, ...], results: int, unread: frozenset[int]
) -> None:
    def worth_keeping(place: int, tensor: Tensor) -> Tensor:
        if place not in unread:
            return tensor
        return tensor.new_empty(tensor.shape[-1:]).expand(tensor.shape)  # one row stands for all

    def setup_context(ctx, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        saved = outputs[results:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # zeros of the size of every result without a gradient
        ctx.save_for_backward(*[worth_keeping(i, inputs[i]) for i in tensors], *[outputs[i] for i in kept], *saved)
        ctx.tensors = tensors
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.inputs[-1] = forced_backend(inputs[-1])  # a block that forces a backend holds for its backward too

    def run_backward(ctx, *grads_in):
        inputs = list(ctx.inputs)
        if all(grad is None for grad in grads_in[:results]):
            return (None,) * len(inputs)
        tensors = ctx.saved_tensors
        for place, tensor in zip(ctx.tensors, tensors, strict=False):
            inputs[place] = tensor
        *args, asked = inputs
        kept_and_saved = tensors[len(ctx.tensors) :]
        needs = [ctx.needs_input_grad[place] for place in places]
        run = getattr(torch.ops.bt_kernels, f"{name}_backward")
        grads = run(*grads_in[:results], *args, *kept_and_saved, needs, asked)
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
