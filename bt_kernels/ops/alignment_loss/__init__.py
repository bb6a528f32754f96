"""The op alignment_loss: masked branch token alignment (MBTA)."""

import torch
from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, slower_than_compiled
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel
from bt_kernels._triton import triton_kernel, why_not_without_float64
from bt_kernels.ops.alignment_loss import gradients, native, reference
from bt_kernels.visible import VisibleTokens

_HEAD = ("branch", "head_weight", "head_bias", "head_norm_weight", "head_norm_bias")


def _fake(branch, target, head_weight, *rest):
    acc = torch.promote_types(branch.dtype, torch.float32)
    sizes = (branch.shape, head_weight.shape, (3, head_weight.shape[0]))
    stored = gradients.stored(rest[-1])
    grads = [
        branch.new_empty(size if each else (0,), dtype=dtype)
        for size, dtype, each in zip(sizes, (branch.dtype, acc, acc), stored, strict=True)
    ]
    return branch.new_empty(()), *grads


# The forward also computes the needed gradients, because a backward would repeat both matrix products. They are
# gradients of the sum over the tokens, not of the mean, which would be subnormal in float16.
_OP = define_op(
    "alignment_loss",
    "Tensor branch, Tensor target, Tensor head_weight, Tensor head_bias, Tensor head_norm_weight, "
    "Tensor head_norm_bias, Tensor target_norm_weight, Tensor target_norm_bias, Tensor target_projection, "
    "Tensor? target_projection_bias",
    differentiable=_HEAD,
    kernels=(
        triton_kernel(f"{__name__}.triton", why_not=why_not_without_float64),
        Kernel("cpu", native.forward, gradients.scale_gradients, why_not_cpu_kernel, slower_than_compiled),
        Kernel("reference", reference.forward, gradients.scale_gradients),
    ),
    fake=_fake,
    extra=", float head_norm_eps, float target_norm_eps, ScalarType? product, bool[5] wanted",
    autocast_skip=("target",),
    saved=("sum_grad_branch", "sum_grad_head_weight", "sum_grad_head_vectors"),  # the vectors: [3, F]
    shape_only=("branch", "target"),  # of which the backward reads the dtype of the one and nothing of the other
)


def alignment_loss(
    branch: Tensor,
    target: Tensor,
    visible: VisibleTokens,
    head_weight: Tensor,
    head_bias: Tensor,
    head_norm_weight: Tensor,
    head_norm_bias: Tensor,
    target_norm_weight: Tensor,
    target_norm_bias: Tensor,
    target_projection: Tensor,
    target_projection_bias: Tensor | None = None,
    head_norm_eps: float = 1e-5,
    target_norm_eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Average ``2 - 2·cos(a, b)`` over the visible tokens; a is a branch token, b the tower's token at the same place.

    Equivalent to::

        a = F.layer_norm(F.linear(branch[:, 1:], head_weight, head_bias), (F,), head_norm_weight, head_norm_bias)
        b = F.layer_norm(tower_rows, (D,), target_norm_weight, target_norm_bias) @ target_projection.T
        loss = (2 - 2 * F.cosine_similarity(a, b, -1)).mean()

    where ``tower_rows`` are the rows of ``target`` named by ``visible.target_index``. Source: MBTA, arXiv 2309.15785
    section 3.2. Gradients flow to ``branch`` and to the head's four tensors; the tower is treated as frozen.

    Under autocast the matrix products take operands in autocast's dtype, on devices other than the CPU, and sum in
    float32; all else is computed in float32 or wider.

    Args:
        branch: last hidden state of the branch, ``[B, 1+N, D]``; its CLS row is not used.
        target: last hidden state of the tower, ``[B, T, 1+P, D]``, of any float dtype: it is read as it is.
        visible: the tokens to compare.
        head_weight, head_bias: the alignment head's linear layer, ``[F, D]`` and ``[F]``.
        head_norm_weight, head_norm_bias: the alignment head's LayerNorm, ``[F]``.
        target_norm_weight, target_norm_bias: the tower's final LayerNorm, ``[D]``.
        target_projection, target_projection_bias: the tower's projection, ``[F, D]`` and ``[F]`` or None.
        head_norm_eps, target_norm_eps: epsilons of the two LayerNorms.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        A scalar in the dtype of ``branch``; 0 if no token is visible.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    check_tensor("branch", branch, "[B, 1+N, D]", (None, 1 + visible.tokens, None))
    check_visible(visible, "branch", branch)
    width = branch.shape[2]
    like = ("branch", branch)
    check_tensor(
        "target",
        target,
        "[B, T, 1+P, D]",
        (visible.batch, visible.frames, 1 + visible.patches, width),
        like,
        any_dtype=True,
    )
    check_tensor("head_weight", head_weight, "[F, D]", (None, width), like)
    shared = head_weight.shape[0]
    check_tensor("head_bias", head_bias, "[F]", (shared,), like)
    check_tensor("head_norm_weight", head_norm_weight, "[F]", (shared,), like)
    check_tensor("head_norm_bias", head_norm_bias, "[F]", (shared,), like)
    check_tensor("target_norm_weight", target_norm_weight, "[D]", (width,), like)
    check_tensor("target_norm_bias", target_norm_bias, "[D]", (width,), like)
    check_tensor("target_projection", target_projection, "[F, D]", (shared, width), like)
    if target_projection_bias is not None:
        check_tensor("target_projection_bias", target_projection_bias, "[F]", (shared,), like)
        target_projection_bias = _frozen(target_projection_bias)
    learning = (branch, head_weight, head_bias, head_norm_weight, head_norm_bias)
    wanted = [torch.is_grad_enabled() and each.requires_grad for each in learning]
    return _OP(
        branch, _frozen(target), head_weight, head_bias, head_norm_weight, head_norm_bias,
        _frozen(target_norm_weight), _frozen(target_norm_bias), _frozen(target_projection), target_projection_bias,
        *visible.as_arguments(visible.target_index), head_norm_eps, target_norm_eps,
        _product_dtype(branch), wanted, backend,
    )[0]  # fmt: skip


def _frozen(tensor: Tensor) -> Tensor:
    """Return the tensor as one that gets no gradient."""
    return tensor.detach() if tensor.requires_grad else tensor


def _product_dtype(branch: Tensor) -> torch.dtype | None:
    """Return autocast's dtype; None without autocast, and in float64, which autocast leaves alone."""
    device = branch.device.type
    if branch.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)
