"""The op linear_add: it adds the result of a linear layer to a residual stream."""

from torch import Tensor

from bt_kernels._checks import check_tensor
from bt_kernels._dispatch import Kernel
from bt_kernels._library import define_op
from bt_kernels._triton import triton_kernel, why_not_without_float64
from bt_kernels.ops.linear_add import reference

_OP = define_op(
    "linear_add",
    "Tensor x, Tensor weight, Tensor? bias, Tensor stream, Tensor? scale, Tensor? offset",
    differentiable=("x", "weight", "bias", "stream", "offset"),
    kernels=(
        triton_kernel(f"{__name__}.triton", why_not=why_not_without_float64),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=lambda x, weight, bias, stream, *_: stream.new_empty(stream.shape),
    autocast="lower",
    autocast_skip=("bias", "stream", "scale", "offset"),
    shape_only=("bias", "stream", "offset"),
    takes_visible=False,
)


def linear_add(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stream: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Add a linear layer's result to a residual stream, in the product itself: the result alone is never written.

    Equivalent to (of a layer of all rows)::

        stream + scale[:, :, None] * F.linear(x, weight, bias) + offset

    The sums are float32 or wider and rounded once, to the dtype of ``stream``, which may differ from that of the
    product. Float32 operands are multiplied as torch's setting for its own products says (TF32 or not). Differentiable
    in ``x``, ``weight``, ``bias``, ``stream`` and ``offset``. Under autocast the product takes autocast's dtype.

    Args:
        x: ``[B, Q, K]``, any strides.
        weight: ``[D, K]``. bias: ``[D]`` or None.
        stream: ``[B, R, D]`` with Q ≤ R; the result is added to the last Q rows of each sequence (a layer may leave CLS
            alone). Not changed.
        scale: factor of each row of the result (stochastic depth), ``[B, Q]``, without a gradient; None: 1.
        offset: ``[D]``, a bias that is not scaled; None: 0.
        backend: "reference" or "triton"; None chooses automatically.

    Returns:
        ``[B, R, D]`` in the dtype of ``stream``.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_tensor("x", x, "[B, Q, K]", (None, None, None))
    check_tensor("weight", weight, "[D, K]", (None, x.shape[2]), ("x", x))
    if bias is not None:
        check_tensor("bias", bias, "[D]", (weight.shape[0],), ("x", x))
    check_stream(stream, x, weight.shape[0])
    scale = check_scale(scale, x)
    if offset is not None:
        check_tensor("offset", offset, "[D]", (weight.shape[0],), ("x", x))
    return _OP(x, weight, bias, stream, scale, offset, backend)


def check_stream(stream: Tensor, x: Tensor, width: int) -> None:
    """Raise unless ``stream`` is ``[B, R, width]`` with at least the rows of x ``[B, Q, K]``."""
    check_tensor("stream", stream, "[B, R, D]", (x.shape[0], None, width), ("x", x), any_dtype=True)
    if stream.shape[1] < x.shape[1]:
        raise ValueError(f"stream must have at least the {x.shape[1]} rows of x, but its shape is {list(stream.shape)}")


def check_scale(scale: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``scale`` without a gradient if it is a factor of each row of x ``[B, Q, K]``; raise if not."""
    if scale is None:
        return None
    check_tensor("scale", scale, "[B, Q]", tuple(x.shape[:2]), ("x", x), any_dtype=True)
    return scale.detach()
