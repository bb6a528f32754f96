"""Registration of an op: schema, fake kernels, autograd and autocast for one forward and, if any, one backward.

Forward and backward are each a registered op, so ``torch.compile`` sees each as one call. The arguments are tensors,
the flattened ``VisibleTokens`` (of an op that takes them), options and the backend, all positional (autocast
registration refuses keywords).

In eager mode a call goes around torch's dispatcher, which would enter Python five times for a forward and a backward:
:class:`_Eager` runs the kernels in one autograd function. Whatever has to see the registered op (a compiler, a dispatch
mode, ``torch.func``, a tensor subclass) still does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from bt_kernels._dispatch import Kernel, choose, forced_backend

_LIBRARY = torch.library.Library("bt_kernels", "DEF")
_VISIBLE = "Tensor index, Tensor? frame_counts, SymInt patches, SymInt frames, SymInt? slots"

OPS: dict[str, Op] = {}
# Types of arguments that need nothing but autograd and autocast.
_ORDINARY = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype))


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
        places: positions of ``differentiable`` in ``arguments``.
        shapes_of: positions of the arguments of which the backward needs the shape only; the value is the position of
            the argument without which the tensor is needed after all, or None.
        same_gradient: see :func:`define_op`.
        autocast: returns the arguments as autocast for a device type casts them.
    """

    name: str
    kernels: tuple[Kernel, ...]
    arguments: tuple[str, ...]
    differentiable: tuple[str, ...]
    results: int
    kept: tuple[int, ...]
    places: tuple[int, ...]
    shapes_of: dict[int, int | None]
    same_gradient: Callable[..., bool]
    autocast: Callable[[str, tuple], list]

    def __call__(self, *args):
        """Call the op with ``arguments`` and the backend; autograd and autocast apply."""
        device = args[0].device.type
        if device not in ("cpu", "cuda") or _is_watched(args):
            return getattr(torch.ops.bt_kernels, self.name)(*args)
        if not torch.is_autocast_enabled(device):
            return self._call(args)
        args = self.autocast(device, args)
        torch.set_autocast_enabled(device, False)
        try:
            return self._call(args)
        finally:
            torch.set_autocast_enabled(device, True)

    def _call(self, args):
        learning = (args[place] for place in self.places)
        if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in learning):
            return _Eager.apply(self, *args)
        return self.run_forward(*args)

    def forward(self, *args):
        """Run the forward's kernel on ``arguments`` and the backend, without autograd."""
        if _is_watched(args):
            return getattr(torch.ops.bt_kernels, self.name)(*args)
        return self.run_forward(*args)

    def backward(self, *args):
        """Run the backward's kernel, without autograd.

        ``args`` are the gradient of each result, ``arguments``, the results that are kept, the saved tensors, whether
        each differentiable argument needs a gradient, and the backend.
        """
        # With gradients enabled a second derivative is asked for, which the registered op refuses.
        if _is_watched(args) or torch.is_grad_enabled():
            return getattr(torch.ops.bt_kernels, f"{self.name}_backward")(*args)
        return self.run_backward(*args)

    def run_forward(self, *args):
        """Choose a kernel and run it: the implementation of the registered op."""
        *args, requested = args
        return choose(self.name, self.kernels, requested, args).forward(*args)

    def run_backward(self, *args):
        """Choose a kernel and run its backward: the implementation of the registered op."""
        *args, needs, requested = args
        chosen = choose(self.name, self.kernels, requested, args[self.results : self.results + len(self.arguments)])
        found = chosen.backward(*args, tuple(needs))
        empty = args[self.results].new_empty
        return _unpack_single(tuple(empty(0) if g is None else g for g in found))


def _is_watched(args: Iterable) -> bool:
    """Return whether something else than autograd and autocast has to see the registered op."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or not _ORDINARY.issuperset(map(type, args))
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
            0 where it is not needed). If there are none, there is no backward op.
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
    _LIBRARY.define(f"{name}({arguments}, str? backend) -> {_tensors(len(results) + len(saved))}")

    skipped = {names.index(each) for each in autocast_skip}
    shapes_of: dict[int, int | None] = {names.index(each): None for each in shape_only}
    shapes_of |= {names.index(each): names.index(other) for each, other in (stored_without or {}).items()}
    op = Op(
        name, kernels, names, differentiable, len(results), kept, places, shapes_of, same_gradient,
        lambda device, args: _autocast(device, args, autocast, skipped),
    )  # fmt: skip

    _LIBRARY.impl(name, op.run_forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bt_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY)
    if differentiable:
        _define_backward(op, arguments, results, (*keep, *saved))
    for device in ("cpu", "cuda"):

        def cast_and_call(*args, device=device):
            args = op.autocast(device, args)
            with torch.autocast(device, enabled=False):
                return getattr(torch.ops.bt_kernels, name)(*args)

        _LIBRARY.impl(name, cast_and_call, f"Autocast{device.upper()}")
    OPS[name] = op
    return op


def _define_backward(op: Op, arguments: str, results: tuple[str, ...], kept: tuple[str, ...]) -> None:
    """Register the backward of an op and its autograd; ``kept`` names the tensors that the backward reads."""
    name, backward_name = op.name, f"{op.name}_backward"
    grads_in = ["Tensor grad"] if len(results) == 1 else [f"Tensor? grad_{each}" for each in results]
    kept_in = [f"Tensor {each}" for each in kept]
    backward_in = ", ".join([*grads_in, arguments, *kept_in, f"bool[{len(op.places)}] needs", "str? backend"])
    _LIBRARY.define(f"{backward_name}({backward_in}) -> {_tensors(len(op.places))}")

    def fake_backward(*args):
        *args, needs, _ = args
        args = args[len(results) :]
        return _unpack_single(
            tuple(
                torch.empty_like(args[place], memory_format=torch.contiguous_format) if need else args[0].new_empty(0)
                for place, need in zip(op.places, needs, strict=True)
            )
        )

    _LIBRARY.impl(backward_name, op.run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bt_kernels::{backward_name}", fake_backward, lib=_LIBRARY)
    torch.library.register_autograd(
        f"bt_kernels::{name}",
        lambda ctx, *grads: _backward(ctx, op, grads),
        setup_context=lambda ctx, inputs, output: _keep(ctx, op, inputs, output),
        lib=_LIBRARY,
    )
    _refuse_second_derivative(backward_name)


def _tensors(count: int) -> str:
    return "Tensor" if count == 1 else f"({', '.join(['Tensor'] * count)})"


def _unpack_single(values: tuple) -> Any:
    return values[0] if len(values) == 1 else values


class _Eager(torch.autograd.Function):
    """A forward and its backward as one autograd function, for all ops."""

    @staticmethod
    def forward(ctx, op: Op, *args):
        output = op.run_forward(*args)
        _keep(ctx, op, args, output)
        ctx.op = op
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, *_backward(ctx, ctx.op, grads)


def _keep(ctx, op: Op, inputs: tuple, output: Any) -> None:
    """Store in an autograd context what the backward needs."""
    outputs = output if isinstance(output, tuple) else (output,)
    tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    saved = outputs[op.results :]
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # do not allocate zeros for a result without a gradient
    stored = [_storable(op, i, inputs) if i in op.shapes_of else inputs[i] for i in tensors]
    ctx.save_for_backward(*stored, *[outputs[i] for i in op.kept], *saved)
    ctx.tensors = tensors
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.inputs[-1] = forced_backend(inputs[-1])  # a block that forces a backend forces it for the backward too


def _storable(op: Op, place: int, inputs: tuple) -> Tensor:
    """Return the input at ``place``, one of ``op.shapes_of``, or a tensor of its shape if that suffices."""
    tensor, other = inputs[place], op.shapes_of[place]
    if other is not None and inputs[other] is None:
        return tensor
    # The memory of one row, uninitialised; in one operator, as expanding it would be two.
    return tensor.new_empty_strided(tensor.shape, (0,) * (tensor.ndim - 1) + (1,))


def _backward(ctx, op: Op, grads_in: tuple) -> tuple:
    """Return the gradient of each input of the op, or None."""
    inputs = list(ctx.inputs)
    result = [None] * len(inputs)
    if all(grad is None for grad in grads_in[: op.results]):
        return tuple(result)
    tensors = ctx.saved_tensors
    for place, tensor in zip(ctx.tensors, tensors, strict=False):
        inputs[place] = tensor
    *args, requested = inputs
    needed = ctx.needs_input_grad[-len(inputs) :]  # the eager function has one more input
    needs = [needed[place] for place in op.places]
    shared = len(needs) > 1 and needs[1] and op.same_gradient(*args)
    if shared:
        needs[:2] = True, False
    grads = op.backward(*grads_in[: op.results], *args, *tensors[len(ctx.tensors) :], needs, requested)
    if len(op.places) == 1:
        grads = (grads,)
    for place, need, value in zip(op.places, needs, grads, strict=True):
        result[place] = value if need else None
    if shared:
        result[op.places[1]] = grads[0]
    return tuple(result)


def _refuse_second_derivative(backward_name: str) -> None:
    """Make a second derivative raise. Without this rule autograd warns and treats the backward op as a constant."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"bt_kernels::{backward_name} has no derivative: the ops can be differentiated once only")

    torch.library.register_autograd(f"bt_kernels::{backward_name}", refuse, lib=_LIBRARY)


def _autocast(device: str, args: tuple, policy: str, skipped: set[int]) -> list:
    """Return ``args`` with floating-point tensors cast by ``policy`` (see :func:`define_op`), except ``skipped``."""
    if policy == "none":
        return list(args)
    floats = {i: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point() and i not in skipped}
    widest = reduce(torch.promote_types, (a.dtype for a in floats.values()))
    # float64 keeps its precision, as in torch's own autocast rules
    lower = policy == "lower" and widest != torch.float64
    dtype = torch.get_autocast_dtype(device) if lower else widest
    return [a.to(dtype) if i in floats else a for i, a in enumerate(args)]
