"""The op temporal_attention: attention of each patch over its own frames."""

from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, unmeasured
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.temporal_attention import limits, native, reference
from bt_kernels.visible import VisibleTokens

_OP = define_op(
    "temporal_attention",
    "Tensor qkv",
    differentiable=("qkv",),
    kernels=(
        Kernel("cuda", native.forward, native.backward, limits.why_not_cuda, unmeasured),
        triton_kernel(f"{__name__}.triton", why_not=limits.why_not_triton),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=lambda qkv, *_: qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3], qkv.shape[4]),
    autocast="lower",
)


def temporal_attention(qkv: Tensor, visible: VisibleTokens, backend: str | None = None) -> Tensor:
    """Compute softmax attention of every visible token over the visible tokens of its patch, with scale 1/√E.

    On a regular grid the sequences are the K groups of S neighbouring rows. Equivalent to (regular grid)::

        q, k, v = qkv.unflatten(1, (K, S)).permute(3, 0, 1, 4, 2, 5)            # [B, K, H, S, E] each
        out = F.scaled_dot_product_attention(q, k, v)
        out = out.transpose(2, 3).flatten(1, 2)

    Source: the branch's temporal layers, arXiv 2309.15785 section 3.1 (divided space-time attention).

    Args:
        qkv: packed projections of the patch rows (no CLS), ``[B, N, 3, H, E]``; any float dtype.
        visible: the tokens and their order.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        ``[B, N, H, E]``; padding rows (index -1) are zero.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    check_tensor("qkv", qkv, "[B, N, 3, H, E]", (None, visible.tokens, 3, None, None))
    check_visible(visible, "qkv", qkv)
    return _OP(qkv, *visible.as_arguments(), backend)
