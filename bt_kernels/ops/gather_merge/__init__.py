"""The op gather_merge: it gathers the tokens of a tower layer and mixes them into the branch."""

from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, unmeasured
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel, why_not_cuda_kernel
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.gather_merge import native, reference
from bt_kernels.visible import VisibleTokens

_OP = define_op(
    "gather_merge",
    "Tensor backbone, Tensor branch, Tensor? gate",
    differentiable=("backbone", "branch", "gate"),
    kernels=(
        Kernel("cuda", native.forward, native.backward, why_not_cuda_kernel, unmeasured),
        triton_kernel(f"{__name__}.triton"),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    autocast_skip=("backbone",),
    fake=lambda backbone, branch, *_: branch.new_empty(branch.shape),
)


def gather_merge(
    backbone: Tensor,
    branch: Tensor,
    gate: Tensor | None,
    visible: VisibleTokens,
    backend: str | None = None,
) -> Tensor:
    """Mix the tower's tokens of one layer into the branch: visible rows gathered, CLS averaged over frames.

    With m[b, 0] = mean_t backbone[b, t, 0] and m[b, 1+n] = backbone[b, t, 1+p] for row n, patch p of frame t:
    ``out = (1 - gate)·branch + gate·m``, or ``branch + m`` without a gate. Equivalent to (all tokens visible)::

        m = backbone.transpose(1, 2)                                        # [B, 1+P, T, D]
        m = torch.cat([m[:, 0].mean(1, keepdim=True), m[:, 1:].flatten(1, 2)], 1)
        out = torch.lerp(branch, m, gate)

    Source: "merge" of the branch, arXiv 2309.15785 section 3.1. Differentiable in every float argument.

    Args:
        backbone: output of a tower layer, ``[B, T, 1+P, D]``, CLS first; any strides, any float dtype, also under
            autocast: it is read as it is.
        branch: ``[B, 1+N, D]``, CLS first.
        gate: ``[D]`` in (0, 1), or None for the sum.
        visible: the tokens and their order.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        ``[B, 1+N, D]`` in the dtype of ``branch``; padding rows (index -1) are zero.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    check_tensor("backbone", backbone, "[B, T, 1+P, D]", (None, visible.frames, 1 + visible.patches, None))
    check_visible(visible, "backbone", backbone)
    width = backbone.shape[3]
    check_tensor(
        "branch", branch, "[B, 1+N, D]", (visible.batch, 1 + visible.tokens, width), ("backbone", backbone),
        any_dtype=True,
    )  # fmt: skip
    like = ("branch", branch)
    if gate is not None:
        check_tensor("gate", gate, "[D]", (width,), like)
    return _OP(backbone, branch, gate, *visible.as_arguments(), backend)
