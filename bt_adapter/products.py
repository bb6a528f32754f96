"""Matrix products of tower and branch, and their gradients, by the fastest library at hand.

On a CPU with AVX-512 that is not Intel's, MKL, which torch asks for float32 products, stays with AVX2; oneDNN, which
comes with torch too, does not, and is 1.1-1.6 times as fast (``bench/NOTES.md``).

The choice follows from the processor alone and is not measured, unlike that of a dtype (``dtypes.py``): the two
libraries round differently, and the gap between them is within what other programs on the machine do to a short
measurement. Two processes of one run, or a run and its resumption, could so choose differently, and their losses would
no longer be equal bit for bit.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_adapter.fp8 import Fp8Weight


def linear(x: Tensor, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x·weightᵀ + bias`` in the dtype of ``x``: ``[..., I]`` by ``[O, I]`` to ``[..., O]``."""
    if isinstance(weight, Fp8Weight):
        return weight.linear(x, bias)
    if not weight.is_floating_point():
        raise TypeError(f"weight must be a float tensor, but is {weight.dtype}: a quantised layer must be called")
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if _by_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a product's input: ``grad·weight``."""
    return linear(grad, weight.t()) if _by_onednn(grad) else grad @ weight.to(grad.dtype)


def weight_grad(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of a product's weight, ``gradᵀ·x`` over all rows."""
    left, right = grad.flatten(0, -2).t(), x.flatten(0, -2).t()
    # oneDNN loses where the result has more rows than columns. Its transpose, which it is quick at, would be no help:
    # autograd copies a gradient that does not lie as its parameter does.
    return linear(left, right) if len(left) <= len(right) and _by_onednn(grad) else left @ right.t()


def _by_onednn(x: Tensor) -> bool:
    # oneDNN's product has no derivative: it serves frozen layers and the insides of autograd functions. A compiler
    # chooses for itself.
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
