"""Compute the matrix products of tower and branch, and their gradients, with the fastest available library.

On AVX-512 CPUs not made by Intel, MKL, which torch uses for float32 products, falls back to AVX2. oneDNN, which torch
also contains, does not, and is 1.1-1.6 times as fast (``bench/NOTES.md``).

The choice depends only on the processor and is not measured, unlike that of a dtype (``dtypes.py``). The two libraries
round differently, and their difference in speed is within the noise of a short measurement on a busy machine. With a
measurement, two processes of a run, or a run and its resumption, could choose differently, and their losses would no
longer be equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.towers.fp8 import Fp8Weight


def linear(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """Compute ``x·weightᵀ + bias`` in the dtype of ``x``: ``[..., I]`` by ``[O, I]`` to ``[..., O]``."""
    if isinstance(weight, Fp8Weight):
        return weight.linear(x, bias)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a float tensor, but is {weight.dtype}: call a quantised layer as a module")
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Compute the gradient of a product's input, ``grad·weight``."""
    return linear(grad, weight.t()) if _by_onednn(grad) else grad @ weight.to(grad.dtype)


def input_grad_behind(grad: Tensor, weight: Tensor) -> Tensor:
    """Compute :func:`input_grad` of ``[B, N, O]`` and write it behind a row of zeros of each sequence: ``[B, 1+N, I]``.

    Without another copy of it: as a batch of products, one of each sequence.
    """
    out = grad.new_empty(len(grad), 1 + grad.shape[1], weight.shape[1])
    out[:, :1].zero_()
    torch.bmm(grad, weight.to(grad.dtype).expand(len(grad), -1, -1), out=out[:, 1:])
    return out


def weight_grad(grad: Tensor, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the gradient of a product's weight, ``gradᵀ·x`` over all rows.

    ``dtype`` is that of the weight. On a GPU the sums, which are float32, are then written in it; otherwise, and for
    None, the result has the dtype of ``grad``.
    """
    left, right = grad.flatten(0, -2).t(), x.flatten(0, -2).t()
    is_eager_gpu = grad.device.type != "cpu" and not torch.compiler.is_compiling()
    if is_eager_gpu and grad.dtype.itemsize == 2 and dtype == torch.float32:
        return torch.mm(left, right.t(), out_dtype=dtype)
    # oneDNN is slower if the result has more rows than columns. Computing the transpose instead does not help: autograd
    # copies a gradient whose strides differ from its parameter's.
    return linear(left, right) if len(left) <= len(right) and _by_onednn(grad) else left @ right.t()


def convert(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return tensors in a dtype; those in another are converted by one kernel."""
    found = [each if each.dtype == dtype else torch.empty_like(each, dtype=dtype) for each in tensors]
    others = [place for place, each in enumerate(tensors) if each.dtype != dtype]
    if others:
        torch._foreach_copy_([found[place] for place in others], [tensors[place] for place in others])
    return found


def join(parts: Sequence[Tensor]) -> Tensor:
    """Return frozen parameters as one tensor, joined along the first dimension.

    The first call moves their values next to each other in one memory, so that later calls copy nothing. Converting or
    moving the parameters separates them again; the next call joins them anew.
    """
    first = parts[0]
    memory, end = first.untyped_storage()._cdata, first.storage_offset()
    for part in parts:
        if part.untyped_storage()._cdata != memory or part.storage_offset() != end or not part.is_contiguous():
            break
        end += part.numel()
    else:
        rows = sum(len(part) for part in parts)
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    with torch.inference_mode(False):  # the parameters live on after a block of inference mode
        joined = torch.cat([part.detach() for part in parts])
        for part, values in zip(parts, joined.split([len(part) for part in parts]), strict=True):
            part.data = values
    return joined


def _by_onednn(x: Tensor) -> bool:
    # oneDNN's product has no derivative, so it is used only in frozen layers and inside autograd functions. A compiler
    # makes its own choice.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0 and _onednn_is_faster()


@cache
def _onednn_is_faster() -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    cpu = Path("/proc/cpuinfo")
    intel = not cpu.exists() or "GenuineIntel" in cpu.read_text()[:4096]
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not intel
