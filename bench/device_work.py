"""Read the work of one operator on a GPU off its schema and arguments: bytes, operations, launches, host waits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Matrix products, with the place of the left operand among the arguments.
PRODUCTS = {
    "mm": 0, "bmm": 0, "mv": 0, "addmm": 1, "baddbmm": 1, "addmv": 1, "convolution": 0, "_scaled_mm": 0,
    "_linear_pointwise": 0,
}  # fmt: skip
# Fused attention of torch. A backward takes five products where the forward takes two.
ATTENTION = {
    "_scaled_dot_product_flash_attention": 4, "_scaled_dot_product_efficient_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 10, "_scaled_dot_product_efficient_attention_backward": 10,
}  # fmt: skip
# Operators that start no kernel and move nothing.
FREE = (
    "empty",
    "new_empty",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "_reshape_alias",
    "set_",
    "resize_",
    "squeeze_",
)
# Kernels that CUDA starts for these, where it is not one. Counts of torch 2.11; some depend on sizes.
SEVERAL = {
    "native_layer_norm_backward": 2, "slice_backward": 2, "select_backward": 2, "constant_pad_nd": 2, "sort": 4,
    "argsort": 4, "nonzero": 4, "_index_put_impl_": 6, "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
}  # fmt: skip
# Operators that write their first argument without reading it.
OVERWRITING = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_")
# Operators that read as many elements of their first argument as they return.
GATHERING = ("index", "index_select", "gather", "embedding")
# Operators whose result, or its shape, the host reads.
WAITING = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique")


def name_of(func: Any) -> str:
    """Return the name of an operator without namespace and overload."""
    return func.overloadpacket.__name__


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """Identify the memory behind a tensor, also of meta tensors."""
    return tensor.untyped_storage()._cdata


def bytes_of(tensor: Tensor) -> int:
    """Return the bytes of a tensor's distinct elements: an expanded dimension counts once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return math.prod(sizes) * tensor.element_size()


def has_boolean_index(func: Any, args: Sequence[Any]) -> bool:
    """Return whether an operator indexes by a bool tensor, whose number of true elements the host has to read."""
    if "index" not in name_of(func):
        return False
    return any(t.dtype == torch.bool for arg in args if isinstance(arg, (list, tuple)) for t in tensors_in(arg))


def host_waits(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether the host waits for the device: a value or shape is read, or a copy passes pageable memory.

    A copy from or to pageable memory synchronises even if it was requested as ``non_blocking``.
    """
    name = name_of(func)
    if name in WAITING or has_boolean_index(func, args):
        return True
    if name == "_to_copy":
        (source, *_), target = args, kwargs.get("device")
        target_is_pinned = bool(kwargs.get("pin_memory"))
    elif name == "copy_":
        (into, source, *_), target = args, args[0].device
        target_is_pinned = into.device.type == "cpu" and into.is_pinned()
    else:
        return False
    if target is None or (torch.device(target).type == "cpu") == (source.device.type == "cpu"):
        return False
    pinned = target_is_pinned if torch.device(target).type == "cpu" else source.is_pinned()
    non_blocking = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
    return not (pinned and non_blocking)


def operations(name: str, args: Sequence[Any], result: Any) -> int:
    """Return the floating-point operations of a matrix product or a fused attention; 0 for other operators."""
    if name in PRODUCTS:
        inner = args[PRODUCTS[name]].shape[-1]
        if name == "convolution":
            inner = args[1][0].numel()
        return 2 * result.numel() * inner
    if name in ATTENTION:
        queries, keys = args[1:3] if name.endswith("_backward") else args[:2]
        return ATTENTION[name] * queries.numel() * keys.shape[-2]
    return 0


def bytes_moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that an operator reads and writes if it reads each element once and writes each result once."""
    name = name_of(func)
    read: dict[tuple, int] = {}
    written: dict[int, int] = {}
    for place, argument in enumerate(func._schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        for tensor in tensors_in(value):
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            if is_written:
                written[memory_of(tensor)] = bytes_of(tensor)
            if is_written and (argument.is_out or name.startswith(OVERWRITING)):
                continue
            size = bytes_of(tensor)
            if place == 0 and name in GATHERING:
                size = min(size, sum(map(bytes_of, tensors_in(result))))
            read[memory_of(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()] = size
    made = (t for t in tensors_in(result) if memory_of(t) not in written)
    return sum(read.values()) + sum(written.values()) + sum(map(bytes_of, made))


def launches_of(func: Any, result: Any) -> int:
    """Return the number of kernels that CUDA starts for an operator; library products count as one."""
    name = name_of(func)
    if name == "_foreach_copy_":  # returns nothing; tensors of different dtypes too are copied by one kernel
        return 1
    if func.is_view or name.startswith(FREE) or not any(t.numel() for t in tensors_in(result)):
        return 0
    return SEVERAL.get(name, 1)
