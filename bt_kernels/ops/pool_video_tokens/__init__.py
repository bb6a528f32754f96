"""The op pool_video_tokens: it averages tower and branch to the tokens that a language model gets for a video."""

from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, unmeasured
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel, why_not_cuda_kernel
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.pool_video_tokens import native, reference
from bt_kernels.visible import VisibleTokens

_OP = define_op(
    "pool_video_tokens",
    "Tensor backbone, Tensor branch",
    differentiable=("backbone", "branch"),
    kernels=(
        Kernel("cuda", native.forward, native.backward, why_not_cuda_kernel, unmeasured),
        triton_kernel(f"{__name__}.triton"),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=lambda backbone, branch, index, frame_counts, patches, *_: branch.new_empty(
        branch.shape[0], patches + 1, branch.shape[2]
    ),
    autocast_skip=("backbone",),
    shape_only=("backbone", "branch"),
)


def pool_video_tokens(backbone: Tensor, branch: Tensor, visible: VisibleTokens, backend: str | None = None) -> Tensor:
    """Average tower and branch over time and take the mean of both: P+1 tokens for a video of any length.

    Row p < P is ``½(mean_t backbone[b, t, 1+p] + mean of the branch's rows of patch p)``; the last row is
    ``½(mean_t backbone[b, t, 0] + branch[b, 0])``. Equivalent to (all tokens visible)::

        patches = (backbone[:, :, 1:].mean(1) + branch[:, 1:].unflatten(1, (P, T)).mean(2)) / 2
        cls = (backbone[:, :, 0].mean(1) + branch[:, 0]) / 2
        out = torch.cat([patches, cls[:, None]], 1)

    Source: chat with videos, arXiv 2309.15785 section 3.3. Differentiable in both arguments.

    Args:
        backbone: output of a tower layer, ``[B, T', 1+P, D]``, CLS first. T' may differ from ``visible.frames``
            (long videos run the branch on averaged pairs of frames) unless ``visible.frame_counts`` is given, which
            counts the real frames of both tower and branch. Any strides, any float dtype, also under autocast: it is
            read as it is.
        branch: hidden state of the branch, ``[B, 1+N, D]``, usually of every token (N = P·T).
        visible: the tokens of the rows of ``branch``.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        ``[B, P+1, D]`` in the dtype of ``branch``, CLS last.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    frames = None if visible.frame_counts is None else visible.frames
    check_tensor("backbone", backbone, "[B, T, 1+P, D]", (None, frames, 1 + visible.patches, None))
    check_visible(visible, "backbone", backbone)
    size = (visible.batch, 1 + visible.tokens, backbone.shape[3])
    check_tensor("branch", branch, "[B, 1+N, D]", size, ("backbone", backbone), any_dtype=True)
    return _OP(backbone, branch, *visible.as_arguments(), backend)
