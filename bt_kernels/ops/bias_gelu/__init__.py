"""The op bias_gelu: it adds a bias and applies an activation of the GELU kind."""

from torch import Tensor

from bt_kernels._checks import check_tensor
from bt_kernels._dispatch import Kernel
from bt_kernels._library import define_op
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.bias_gelu import reference

_OP = define_op(
    "bias_gelu",
    "Tensor x, Tensor? bias",
    differentiable=("x", "bias"),
    kernels=(
        triton_kernel(f"{__name__}.triton"),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=lambda x, *_: x.new_empty(x.shape),
    extra=", str act",
    autocast="none",
    takes_visible=False,
)


def bias_gelu(x: Tensor, bias: Tensor | None, act: str = "quick_gelu", backend: str | None = None) -> Tensor:
    """Compute ``act(x + bias)`` in one pass over ``x``, as between the two products of an MLP.

    With y = x + bias, ``act`` is one of (Hugging Face's names)::

        "quick_gelu"          y * sigmoid(1.702 * y)
        "gelu"                F.gelu(y)
        "gelu_pytorch_tanh"   F.gelu(y, approximate="tanh")

    It is computed in float32 or wider, and autocast casts nothing. Differentiable in ``x`` and ``bias``. Only these two
    are kept for backward, which computes both gradients in one pass. The bias's gradient, a sum over rows, has the same
    bits each time. Source: GELU, arXiv 1606.08415; quick-GELU is the activation of OpenAI's CLIP.

    Args:
        x: ``[..., F]``, any strides.
        bias: ``[F]``, of any float dtype, or None.
        act: "quick_gelu", "gelu" or "gelu_pytorch_tanh".
        backend: "reference" or "triton"; None chooses automatically.

    Returns:
        ``[..., F]`` in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape, dtype, device or ``act`` does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_tensor("x", x, "[..., F]", (None,) * max(getattr(x, "ndim", 1), 1))
    if bias is not None:
        check_tensor("bias", bias, "[F]", (x.shape[-1],), ("x", x), any_dtype=True)
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(reference.ACTIVATIONS)}, but is {act!r}")
    return _OP(x, bias, act, backend)
