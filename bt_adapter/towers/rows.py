"""Compute LayerNorms, residual sums and gradients of biases outside of autograd, on states ``[B, rows, D]``.

Where a function takes ``kernels``, it is computed by the row ops of ``bt_kernels``, which read and write each element
once, or, for None, by torch's operators: see :func:`find_kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bt_kernels import passes


class Norm(NamedTuple):
    """The parameters of a LayerNorm."""

    weight: Tensor
    bias: Tensor
    eps: float


def has_kernels(x: Tensor) -> bool:
    """Whether sums, LayerNorms and activations are computed by the row ops of ``bt_kernels``.

    On a CPU torch's operators, some of them in place, are faster; a compiler fuses torch's operators itself. The row
    ops have no kernels in C++.
    """
    is_eager_gpu = x.device.type != "cpu" and not torch.compiler.is_compiling()
    return is_eager_gpu and passes.forced_backend() not in ("cpu", "cuda")


class RowKernels(NamedTuple):
    """The row ops of ``bt_kernels``, on a forced backend or, for None, on the one that they choose.

    With ``products`` the products of ``bt_kernels`` too, which add or activate before they write.
    """

    backend: str | None
    products: bool = False


def find_kernels(x: Tensor, products: str = "torch") -> RowKernels | None:
    """Return the row ops if they compute on ``x`` (:func:`has_kernels`), or None.

    Raises:
        ValueError: ``products`` is "bt_kernels", but only torch's operators can run on ``x``.
    """
    if has_kernels(x):
        return RowKernels(passes.forced_backend(), products == "bt_kernels")
    if products == "bt_kernels":
        raise ValueError(
            "products='bt_kernels' needs a GPU, no torch.compile, and neither of the backends 'cpu' and 'cuda' forced, "
            f"but the tokens are on {x.device}, and the forced backend is {passes.forced_backend()}"
        )
    return None


def normalize(x: Tensor, norm: Norm, dtype: torch.dtype, kernels: RowKernels | None) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a LayerNorm, computed in the dtype of ``x``.

    Returns:
        The result in ``dtype``, and each row's mean and reciprocal standard deviation, which
        :func:`normalize_backward` needs.
    """
    if kernels is not None:
        _, normed, mean, rstd = passes.residual_norm(x, None, None, norm, dtype, kernels.backend)
        return normed, mean, rstd
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), weight, bias, norm.eps)
    return normed.to(dtype), mean, rstd


def add_and_normalize(
    z: Tensor, update: Tensor, scale: Tensor | None, norm: Norm, dtype: torch.dtype, kernels: RowKernels | None
) -> tuple[Tensor, Tensor]:
    """Add ``scale · update`` to the state and apply a LayerNorm to the sum.

    Args:
        z: state ``[B, 1+N, D]``.
        update: ``[B, 1+N, D]``, or one of the patch rows alone ``[B, N, D]``; possibly overwritten.
        scale: of each row of the update, ``[B, 1+N, 1]``; None: 1.

    Returns:
        The sum in the dtype of ``z``, and its LayerNorm in ``dtype``.
    """
    if kernels is not None:
        factors = None if scale is None else scale[:, :, 0]
        summed, normed, _, _ = passes.residual_norm(z, update, factors, norm, dtype, kernels.backend)
        return summed, normed
    summed = add_rows(z, update if scale is None else update.mul_(scale))
    return summed, normalize(summed, norm, dtype, None)[0]


def normalize_backward(
    grad: Tensor, passed: Tensor, x: Tensor, moments: Sequence[Tensor], norm: Norm, kernels: RowKernels | None,
    update_rows: int, scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the gradients of :func:`add_and_normalize`: of state and update, from those of both results.

    Args:
        grad: gradient of the LayerNorm's result, ``[B, 1+N, D]``.
        passed: gradient of the state from elsewhere, ``[B, 1+N, D]``, which is added.
        x: the sum, ``[B, 1+N, D]``. moments: mean and reciprocal standard deviation of its rows.
        update_rows: number of rows of the update, the last of the state.
        scale: of each row of the update, ``[B, rows, 1]``; None: 1.

    Returns:
        The gradient of the state in its dtype; that of the update, ``[B, rows, D]`` in the dtype of ``grad``; and those
        of the LayerNorm's weight and bias.
    """
    if kernels is not None:
        # the op reads shape and dtype of the update alone
        update = grad.new_empty(x.shape[-1]).expand(len(x), update_rows, -1)
        factors = None if scale is None else scale[:, :, 0]
        return passes.residual_norm_backward(
            passed, grad, x, update, factors, norm, x, moments, (True,) * 4, kernels.backend
        )
    grad_x, of_weight, of_bias = _norm_backward(grad, x, moments, norm)
    grad_x.add_(passed)
    grad_update = grad_x[:, x.shape[1] - update_rows :].to(grad.dtype)
    if scale is not None:
        grad_update = (grad_update * scale).to(grad.dtype)  # draws are float32 under autocast too
    return grad_x, grad_update, of_weight, of_bias


def normalize_patches_backward(
    grad: Tensor, passed: Tensor, z: Tensor, moments: Sequence[Tensor], norm: Norm, kernels: RowKernels | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of a LayerNorm of the patch rows ``z[:, 1:]``.

    Args:
        grad: gradient of the LayerNorm's result, ``[B, N, D]``; with ``kernels`` behind zeros for CLS, ``[B, 1+N, D]``,
            so that the op writes all rows and none are copied to lie behind CLS.
        passed: gradient of the state from elsewhere, ``[B, 1+N, D]``, which is added; possibly overwritten.
        z: the state, ``[B, 1+N, D]``. moments: mean and reciprocal standard deviation of its patch rows.

    Returns:
        The gradients of the state, of weight and of bias.
    """
    if kernels is not None:
        padded = F.pad(torch.stack([moment.flatten(1) for moment in moments]), (1, 0)).unbind(0)
        grad_z, _, of_weight, of_bias = passes.residual_norm_backward(
            passed, grad, z, None, None, norm, z.new_empty(0), padded, (True, False, True, True), kernels.backend
        )
        return grad_z, of_weight, of_bias
    grad_rows, of_weight, of_bias = _norm_backward(grad, z[:, 1:], moments, norm)
    passed[:, 1:] += grad_rows
    return passed, of_weight, of_bias


def _norm_backward(grad: Tensor, x: Tensor, moments: Sequence[Tensor], norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, (x.shape[-1],), *moments, weight, bias, [True, True, True]
    )


def bias_grad(grad: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Compute the gradient of a linear layer's bias, the sum over all rows, in ``dtype``; None: as ``grad``."""
    return grad.sum((0, 1), dtype=dtype)


def add_rows(z: Tensor, update: Tensor) -> Tensor:
    """Add an update ``[B, 1+N, D]``, or one of the patch rows alone ``[B, N, D]``, to the state z ``[B, 1+N, D]``."""
    if update.shape == z.shape:
        return z + update
    if torch.compiler.is_compiling():  # the compiler takes no view as out=, and fuses this sum
        return z + F.pad(update, (0, 0, 1, 0))
    out = torch.empty_like(z)
    out[:, :1] = z[:, :1]
    torch.add(z[:, 1:], update, out=out[:, 1:])
    return out
