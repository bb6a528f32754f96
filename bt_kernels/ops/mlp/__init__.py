"""The op mlp: two linear layers with an activation between them, added to a residual stream if there is one."""

import torch
from torch import Tensor

from bt_kernels._checks import check_tensor
from bt_kernels._dispatch import Kernel, import_on_call
from bt_kernels._library import define_op
from bt_kernels._triton import triton_kernel, why_not_default, why_not_without_float64
from bt_kernels.ops.bias_gelu.reference import ACTIVATIONS
from bt_kernels.ops.linear_add import check_scale, check_stream
from bt_kernels.ops.mlp import reference


def _fake(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stream, scale, act, keep):
    hidden = x.new_empty(*x.shape[:-1], fc1_weight.shape[0]) if keep else x.new_empty(0)
    return x.new_empty(*x.shape[:-1], fc2_weight.shape[0]) if stream is None else stream.new_empty(stream.shape), hidden


def _fake_hidden_grad(grad, fc2_weight, hidden, act):
    bias = hidden.new_empty(hidden.shape[-1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape), bias


_OP = define_op(
    "mlp",
    "Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? stream, Tensor? scale",
    differentiable=("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "stream"),
    kernels=(
        triton_kernel(f"{__name__}.triton", why_not=why_not_without_float64),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=_fake,
    extra=", str act, bool keep",
    autocast="lower",
    autocast_skip=("fc1_bias", "fc2_bias", "stream", "scale"),
    saved=("hidden",),
    shape_only=("fc1_bias", "fc2_bias", "stream"),
    takes_visible=False,
)

# The first product of the backward, for a layer that computes its other products itself: bt_kernels.passes.
define_op(
    "mlp_hidden_grad",
    "Tensor grad, Tensor fc2_weight, Tensor hidden",
    differentiable=(),
    kernels=(
        Kernel(
            "triton", import_on_call(f"{__name__}.triton", "hidden_grad"), why_not=why_not_without_float64,
            why_not_default=why_not_default,
        ),
        Kernel("reference", reference.hidden_grad),
    ),
    fake=_fake_hidden_grad,
    extra=", str act",
    autocast="none",
    results=("grad_hidden", "activated", "grad_bias"),
    takes_visible=False,
)  # fmt: skip


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    act: str = "quick_gelu",
    stream: Tensor | None = None,
    scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute the MLP of a transformer layer, and add it to the residual stream, in two products and nothing else.

    Equivalent to::

        hidden = act(F.linear(x, fc1_weight, fc1_bias))
        stream + scale[:, :, None] * F.linear(hidden, fc2_weight, fc2_bias)

    The first product activates before it writes and the second adds before it writes, so that a hidden layer is written
    and read once. Sums and activation are float32 or wider; the activated hidden layer is rounded to the dtype of
    ``x``, the result once, to that of ``stream``. Float32 operands are multiplied as torch's setting for its own
    products says (TF32 or not). Differentiable in all tensors but ``scale``. For backward the argument of the
    activation is kept, in the dtype of ``x``, if a gradient is needed; the activation is computed again, in the product
    that computes its gradient. Under autocast the products take autocast's dtype. Source: MLP of a transformer, arXiv
    1706.03762 section 3.3; the activations are those of :func:`bt_kernels.bias_gelu`.

    Args:
        x: ``[B, Q, D]``, any strides.
        fc1_weight: ``[F, D]``. fc1_bias: ``[F]`` or None.
        fc2_weight: ``[E, F]``. fc2_bias: ``[E]`` or None.
        act: "quick_gelu", "gelu" or "gelu_pytorch_tanh".
        stream: ``[B, R, E]`` with Q ≤ R, of any float dtype; the result is added to the last Q rows of each sequence.
            Not changed. None: nothing is added.
        scale: factor of each row of the result (stochastic depth), ``[B, Q]``, without a gradient; None: 1.
        backend: "reference" or "triton"; None chooses automatically.

    Returns:
        ``[B, R, E]`` in the dtype of ``stream``, or ``[B, Q, E]`` in that of ``x``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or ``act`` does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_tensor("x", x, "[B, Q, D]", (None, None, None))
    like = ("x", x)
    check_tensor("fc1_weight", fc1_weight, "[F, D]", (None, x.shape[2]), like)
    check_tensor("fc2_weight", fc2_weight, "[E, F]", (None, fc1_weight.shape[0]), like)
    for name, bias, weight in (("fc1_bias", fc1_bias, fc1_weight), ("fc2_bias", fc2_bias, fc2_weight)):
        if bias is not None:
            check_tensor(name, bias, f"[{'F' if weight is fc1_weight else 'E'}]", (weight.shape[0],), like)
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, but is {act!r}")
    if stream is not None:
        check_stream(stream, x, fc2_weight.shape[0])
    scale = check_scale(scale, x)
    learning = (x, fc1_weight, fc1_bias, fc2_weight)  # which the hidden layer is kept for
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in learning)
    return _OP(x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, stream, scale, act, keep, backend)[0]
