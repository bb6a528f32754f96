"""Registration of an op: schema, fake kernels, autograd and autocast for one forward and one backward.

Forward and backward are each a registered op, so ``torch.compile`` sees each as one call. The arguments are tensors,
the flattened ``VisibleTokens`` (of an op that takes them), options and the backend, all positional (autocast
registration refuses keywords).
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
        name: name in ``torch.ops.bt_kernels``.
        kernels: its kernels in order of preference.
        arguments: names of its arguments, without the backend.
        differentiable: names of the arguments that can have a gradient.
        results: number of results; further tensors of the forward are saved for the backward.
        kept: positions of the results that the backward reads.
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
    """Flatten ``visible`` for a registered op; ``index`` replaces its index (token alignment passes its target)."""
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
    autocast_skip: tuple[str, ...] = (),
    results: tuple[str, ...] = ("out",),
    keep: tuple[str, ...] = (),
    saved: tuple[str, ...] = (),
    shape_only: tuple[str, ...] = (),
    stored_without: dict[str, str] | None = None,
    same_gradient: Callable[..., bool] = lambda *args: False,
    takes_visible: bool = True,
) -> Op:
    """Register ``bt_kernels::name`` and ``bt_kernels::name_backward`` and return the op.

    Args:
        name: name of the op.
        tensors: schema of the tensor arguments, for example ``"Tensor backbone, Tensor? gate"``.
        differentiable: the arguments that can have a gradient; the backward op returns one tensor for each (of size
            0 where it is not needed).
        kernels: see :class:`Kernel`. ``forward(*args)`` returns the results and saved tensors, as a tuple if there are
            several; ``backward(*grads, *args, *kept, *saved, needs)`` returns a tuple. ``args`` are tensors, visible
            tokens (if the op takes them) and extras, ``needs`` one bool for each differentiable argument, ``grads`` one
            for each result (None for a result without a gradient, if there are several results).
        fake: returns the forward's results and saved tensors for ``args``, with the right shape and dtype.
        extra: schema of the arguments after the visible tokens, for example ``", float eps"``.
        autocast: "lower" casts floating-point inputs to autocast's dtype (as matrix products do), "widest" to the
            widest dtype among them (as ``torch.cat`` does), "none" does not cast (as elementwise operators).
        autocast_skip: tensor arguments that autocast does not cast.
        results: names of the differentiable results of the forward.
        keep: those of ``results`` that the backward reads.
        saved: names of further tensors that the forward returns for the backward only.
        shape_only: tensor arguments of which the backward needs shape, dtype and device only; they are not stored.
        stored_without: of an argument in ``shape_only`` (key) the one (value) without which it is stored after all.
        same_gradient: takes ``args``; returns whether the gradients of the first two differentiable arguments are
            equal. They are then computed once, and autograd returns one tensor for both, as it does for ``a + b``.
        takes_visible: whether the arguments include visible tokens.
    """
    arguments = f"{tensors}, {_VISIBLE}{extra}" if takes_visible else f"{tensors}{extra}"
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
        *args, requested = args
        return choose(name, kernels, requested, tuple(args)).forward(*args)

    def backward(*args):
        *args, needs, requested = args
        chosen = choose(name, kernels, requested, tuple(args[len(results) :][: len(names)]))
        empty = args[len(results)].new_empty
        return _unpack_single(tuple(empty(0) if g is None else g for g in chosen.backward(*args, tuple(needs))))

    def fake_backward(*args):
        *args, needs, _ = args
        args = args[len(results) :]
        return _unpack_single(
            tuple(
                torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
                for place, need in zip(places, needs, strict=True)
            )
        )

    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    _LIBRARY.impl(backward_name, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bt_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    torch.library.register_fake(f"bt_kernels::{backward_name}", fake_backward, lib=_LIBRARY)
    shapes_of: dict[int, int | None] = {names.index(each): None for each in shape_only}
    shapes_of |= {names.index(each): names.index(other) for each, other in (stored_without or {}).items()}
    _register_autograd(name, places, kept, len(results), shapes_of, same_gradient)
    _refuse_second_derivative(backward_name)
    skipped = {names.index(each) for each in autocast_skip}
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, _autocast(name, device.lower(), autocast, skipped), f"Autocast{device}")
    OPS[name] = Op(name, kernels, names, differentiable, len(results), kept)
    return OPS[name]


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _unpack_single(values: tuple) -> Any:
    return values[0] if len(values) == 1 else values


def _register_autograd(
    name: str,
    places: tuple[int, ...],
    kept: tuple[int, ...],
    results: int,
    shapes_of: dict[int, int | None],
    same_gradient: Callable[..., bool],
) -> None:
    """``shapes_of`` maps the place of a ``shape_only`` argument to that of the one without which it is stored."""

    def storable(place: int, inputs: tuple) -> Tensor:
        tensor = inputs[place]
        other = shapes_of.get(place)
        if place not in shapes_of or (other is not None and inputs[other] is None):
            return tensor
        return tensor.new_empty(tensor.shape[-1:]).expand(tensor.shape)  # the memory of one row, uninitialised

    def setup_context(ctx, inputs, output) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        saved = outputs[results:]
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # do not allocate zeros for a result without a gradient
        ctx.save_for_backward(*[storable(i, inputs) for i in tensors], *[outputs[i] for i in kept], *saved)
        ctx.tensors = tensors
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.inputs[-1] = forced_backend(inputs[-1])  # a block that forces a backend forces it for the backward too

    def run_backward(ctx, *grads_in):
        inputs = list(ctx.inputs)
        if all(grad is None for grad in grads_in[:results]):
            return (None,) * len(inputs)
        tensors = ctx.saved_tensors
        for place, tensor in zip(ctx.tensors, tensors, strict=False):
            inputs[place] = tensor
        *args, requested = inputs
        kept_and_saved = tensors[len(ctx.tensors) :]
        needs = [ctx.needs_input_grad[place] for place in places]
        shared = len(needs) > 1 and needs[1] and same_gradient(*args)
        if shared:
            needs[:2] = True, False
        run = getattr(torch.ops.bt_kernels, f"{name}_backward")
        grads = run(*grads_in[:results], *args, *kept_and_saved, needs, requested)
        if len(places) == 1:
            grads = (grads,)
        result = [None] * len(inputs)
        for place, need, value in zip(places, needs, grads, strict=True):
            result[place] = value if need else None
        if shared:
            result[places[1]] = grads[0]
        return tuple(result)

    torch.library.register_autograd(f"bt_kernels::{name}", run_backward, setup_context=setup_context, lib=_LIBRARY)


def _refuse_second_derivative(backward_name: str) -> None:
    """Make a second derivative raise. Without this rule autograd warns and treats the backward op as a constant."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"bt_kernels::{backward_name} has no derivative: the ops can be differentiated once only")

    torch.library.register_autograd(f"bt_kernels::{backward_name}", refuse, lib=_LIBRARY)


def _autocast(name: str, device: str, policy: str, skipped: set[int]) -> Callable[..., Tensor]:
    def cast_and_call(*args):
        floats = {
            i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and i not in skipped
        }
        if policy != "none":
            widest = reduce(torch.promote_types, (a.dtype for a in floats.values()))
            # float64 keeps its precision, as in torch's own autocast rules
            lower = policy == "lower" and widest != torch.float64
            dtype = torch.get_autocast_dtype(device) if lower else widest
            args = tuple(a.to(dtype) if i in floats else a for i, a in enumerate(args))
        with torch.autocast(device, enabled=False):
            return getattr(torch.ops.bt_kernels, name)(*args)

    return cast_and_call
