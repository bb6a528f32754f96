"""The op residual_norm: it adds an update to a residual stream and normalises the sum by LayerNorm."""

import torch
from torch import Tensor

from bt_kernels._checks import check_tensor
from bt_kernels._dispatch import Kernel
from bt_kernels._library import define_op
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.residual_norm import reference


def _fake(x, update, scale, weight, bias, eps, dtype):
    mean = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    normed = x.new_empty(x.shape, dtype=dtype or x.dtype)
    return x.new_empty(0 if update is None else x.shape), normed, mean, torch.empty_like(mean)


def _has_one_gradient(x, update, scale, *_) -> bool:
    """Return whether the gradient of the update is that of x."""
    return update is not None and scale is None and (x.shape, x.dtype) == (update.shape, update.dtype)


_OP = define_op(
    "residual_norm",
    "Tensor x, Tensor? update, Tensor? scale, Tensor weight, Tensor bias",
    differentiable=("x", "update", "weight", "bias"),
    kernels=(
        triton_kernel(f"{__name__}.triton"),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=_fake,
    extra=", float eps, ScalarType? dtype",
    autocast="none",
    results=("summed", "normed"),
    keep=("summed",),
    saved=("mean", "rstd"),
    shape_only=("x", "update"),
    stored_without={"x": "update"},
    same_gradient=_has_one_gradient,
    takes_visible=False,
)


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add an update to a residual stream and normalise the sum by LayerNorm, in one pass over both.

    Equivalent to (update of all rows)::

        summed = x + scale[:, :, None] * update
        normed = F.layer_norm(summed, (D,), weight, bias, eps).to(dtype)

    The tensors may have different float dtypes, such as a stream in float32 with an update and a result in bfloat16.
    All is computed in float32 or wider; the sum is rounded to the dtype of ``x`` before it is normalised. Autocast
    casts nothing: ``dtype`` names what the next matrix product takes. Differentiable in ``x``, ``update``, ``weight``
    and ``bias``. For backward the sum is kept, and in float32 the mean and 1/deviation of each row. The gradients of
    ``weight`` and ``bias``, sums over rows, have the same bits each time. Source: LayerNorm, arXiv 1607.06450, in
    pre-norm layers, arXiv 2002.04745.

    Args:
        x: residual stream, ``[B, R, D]``, any strides.
        update: ``[B, Q, D]`` with Q ≤ R, added to the last Q rows of each sequence (a layer may leave CLS alone); None:
            the stream itself is normalised.
        weight, bias: of the LayerNorm, ``[D]``.
        eps: added to the variance.
        scale: factor of each row of the update (stochastic depth), ``[B, Q]``, without a gradient; None: 1.
        dtype: of ``normed``; None: that of ``x``.
        backend: "reference" or "triton"; None chooses automatically.

    Returns:
        ``summed [B, R, D]`` in the dtype of ``x`` (``x`` itself without an update), and ``normed [B, R, D]``.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_tensor("x", x, "[B, R, D]", (None, None, None))
    batch, rows, width = x.shape
    like = ("x", x)
    if update is not None:
        check_tensor("update", update, "[B, Q, D]", (batch, None, width), like, any_dtype=True)
        if update.shape[1] > rows:
            raise ValueError(f"update must have at most the {rows} rows of x, but its shape is {list(update.shape)}")
    if scale is not None:
        if update is None:
            raise ValueError("scale is the factor of an update, but update is None")
        check_tensor("scale", scale, "[B, Q]", tuple(update.shape[:2]), like, any_dtype=True)
        scale = scale.detach()
    check_tensor("weight", weight, "[D]", (width,), like, any_dtype=True)
    check_tensor("bias", bias, "[D]", (width,), ("weight", weight))
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype or None, but is {dtype}")
    summed, normed, *_ = _OP(x, update, scale, weight, bias, float(eps), dtype, backend)
    return x if update is None else summed, normed
