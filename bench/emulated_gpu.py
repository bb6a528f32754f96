"""Run code on meta tensors as CUDA would run it: its autocast rule, its attention, its copies from the host.

Meta tensors stand for a GPU's: they have shapes and dtypes and no values, so that a whole training step runs in seconds
on any machine. Inside :func:`emulated_gpu`, ``torch.autocast("meta")`` follows CUDA's rule, which returns float32 from
LayerNorm, softmax, sums and losses where the CPU's does not. The rule is listed below as torch states it
(``aten/src/ATen/autocast_mode.h``); ``tests/test_budget.py`` compares it with torch's own kernels for CUDA.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental.proxy_tensor  # noqa: F401  # torch.autocast looks there while a function mode is on
import torch.nn.functional as F
from device_work import memory_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from bt_kernels import plain

DEVICE = "meta"
OFFLOADED = "on the meta device, which has no values"  # ends a reason of bt_kernels.plain.why_not_plain
LOWER = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "addbmm", "addmv", "addr", "mv", "einsum", "conv1d", "conv2d",
    "conv3d", "convolution",
)  # fmt: skip
FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "cosine_similarity", "nll_loss", "mse_loss", "smooth_l1_loss",
    "kl_div", "binary_cross_entropy_with_logits", "cosine_embedding_loss", "exp", "log", "log1p", "expm1", "rsqrt",
    "reciprocal", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "logsumexp", "dist", "cdist",
)  # fmt: skip
FLOAT32_RESULT = (
    "sum", "sum.dim_IntList", "prod", "prod.dim_int", "cumsum", "cumprod", "softmax.int", "log_softmax.int",
    "linalg_vector_norm",
)  # fmt: skip
WIDEST = ("addcdiv", "addcmul", "dot", "bilinear", "cross", "tensordot", "scatter_add", "index_put")

Call = Callable[..., Any]


def operator(name: str) -> Any:
    """Return the overload of an aten operator, from ``name`` or ``name.overload``."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def rules(cast: Callable[[Any, torch.dtype], Any]) -> dict[str, Call]:
    """Map the operators with a rule to functions that cast the arguments by ``cast`` and call the operator."""

    def lower(op: Any) -> Call:
        return lambda *args, **kwargs: _call(op, cast((args, kwargs), torch.get_autocast_dtype("cuda")))

    def float32(op: Any) -> Call:
        return lambda *args, **kwargs: _call(op, cast((args, kwargs), torch.float32))

    def float32_result(op: Any) -> Call:
        names = [argument.name for argument in op._schema.arguments]

        def call(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(names, args, strict=False)) | kwargs
            if _is_eligible(args[0]) and named.get("dtype") is None:
                named["dtype"] = torch.float32
            return _call(op, ((), named))

        return call

    def widest(op: Any) -> Call:
        def call(*args: Any, **kwargs: Any) -> Any:
            dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if _is_eligible(leaf)}
            to = torch.float32 if torch.float32 in dtypes else torch.get_autocast_dtype("cuda")
            return _call(op, cast((args, kwargs), to))

        return call

    kinds = ((LOWER, lower), (FLOAT32, float32), (FLOAT32_RESULT, float32_result), (WIDEST, widest))
    return {name: kind(operator(name)) for names, kind in kinds for name in names}


def _call(op: Any, arguments: tuple[tuple, dict]) -> Any:
    args, kwargs = arguments
    with _outside_autocast():
        return op(*args, **kwargs)


def _outside_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA))


def _is_eligible(value: Any) -> bool:
    is_float = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
    return is_float and value.device.type == DEVICE


class _Casts:
    """Casts of arguments. As in torch, a parameter that learns is cast once in an autocast block."""

    def __init__(self) -> None:
        self.done: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __call__(self, values: Any, dtype: torch.dtype) -> Any:
        with _outside_autocast():
            return tree_map(lambda value: self._cast(value, dtype), values)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not _is_eligible(value) or value.dtype == dtype:
            return value
        if not (value.requires_grad and value.is_leaf and value.dtype == torch.float32 and not value._is_view()):
            return value.to(dtype)
        if (id(value), dtype) not in self.done:
            self.done[id(value), dtype] = value, value.to(dtype)
        return self.done[id(value), dtype][1]


class _Functions(TorchFunctionMode):
    """Replaces functions that CUDA runs otherwise than meta tensors would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE:
            return func(*args, **{**kwargs, "device": None}).to(DEVICE)  # made on the host and copied
        return func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float | None = None, **more: Any) -> Tensor:
    """Choose as torch does on a GPU: flash attention in 16 bits, memory-efficient attention in float32."""
    if rest or more:
        raise NotImplementedError("the emulated GPU has attention without mask and dropout only")
    parts = (q, k, v)
    if torch.is_autocast_enabled("cuda"):
        parts = tuple(part.to(torch.get_autocast_dtype("cuda")) for part in parts)
    if parts[0].dtype.itemsize == 2:
        return torch.ops.aten._scaled_dot_product_flash_attention(*parts, scale=scale)[0]
    learns = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    return torch.ops.aten._scaled_dot_product_efficient_attention(*parts, None, learns, scale=scale)[0]


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """Let meta tensors stand for those of a GPU inside the block (see the module)."""
    casts = _Casts()
    pinned: dict[int, Tensor] = {}
    refuses = plain.why_not_plain
    autocast, is_enabled, dtype_of, clear = (
        torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, torch.clear_autocast_cache,
    )  # fmt: skip

    def renamed(device_type: str) -> str:
        return "cuda" if device_type == DEVICE else device_type

    class Autocast(autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(renamed(device_type), *args, **kwargs)

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned[memory_of(copy)] = copy
        return copy

    def why_not_plain(*args: Any) -> str | None:
        reason = refuses(*args)  # weights on the meta device are those of offloaded layers elsewhere
        return None if reason and reason.endswith(OFFLOADED) else reason

    def clear_casts() -> None:
        casts.done.clear()
        clear()

    with ExitStack() as stack:
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch's own kernels, which pass meta tensors on, are replaced
            for name, call in rules(casts).items():
                library.impl(name, call, "AutocastCUDA")
        for owner, name, value in (
            (torch, "autocast", Autocast),
            (torch, "is_autocast_enabled", lambda kind="cuda": is_enabled(renamed(kind))),
            (torch, "get_autocast_dtype", lambda kind: dtype_of(renamed(kind))),
            (torch, "clear_autocast_cache", clear_casts),
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *args: True),
            (plain, "why_not_plain", why_not_plain),
            (Tensor, "pin_memory", pin_memory),
            (Tensor, "is_pinned", lambda tensor: memory_of(tensor) in pinned),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(torch._C._IncludeDispatchKeyGuard(torch._C.DispatchKey.AutocastCUDA))
        stack.enter_context(_Functions())
        yield
