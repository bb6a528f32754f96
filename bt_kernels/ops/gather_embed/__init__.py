"""The op gather_embed: it gathers the branch's first input from the tower's tokens."""

from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, unmeasured
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel, why_not_cuda_kernel
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.gather_embed import native, reference
from bt_kernels.visible import VisibleTokens

_OP = define_op(
    "gather_embed",
    "Tensor backbone, Tensor cls_token, Tensor pos, Tensor time",
    differentiable=("backbone", "cls_token", "pos", "time"),
    kernels=(
        Kernel("cuda", native.forward, native.backward, why_not_cuda_kernel, unmeasured),
        triton_kernel(f"{__name__}.triton"),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    autocast_skip=("backbone",),
    fake=lambda backbone, cls_token, pos, time, index, *_: _empty_out(backbone, time, index),
    shape_only=("backbone", "cls_token", "pos", "time"),
)


def _empty_out(backbone: Tensor, time: Tensor, index: Tensor) -> Tensor:
    return time.new_empty(backbone.shape[0], 1 + index.shape[1], backbone.shape[3])


def gather_embed(
    backbone: Tensor,
    cls_token: Tensor,
    pos: Tensor,
    time: Tensor,
    visible: VisibleTokens,
    backend: str | None = None,
) -> Tensor:
    """Compute the input of the branch's first layer: visible tower tokens plus position and time, and the branch's CLS.

    ``out[b, 0] = ½(mean_t backbone[b, t, 0] + cls_token + pos[0])`` and, for row n, patch p of frame t,
    ``out[b, 1+n] = backbone[b, t, 1+p] + pos[1+p] + time[t]``. Equivalent to (all tokens visible)::

        x = (backbone[:, :, 1:] + pos[1:] + time[:T, None]).transpose(1, 2).flatten(1, 2)
        cls = (backbone[:, :, 0].mean(1) + cls_token + pos[0]) / 2
        out = torch.cat([cls[:, None], x], 1)

    Source: "embed" of the branch, arXiv 2309.15785 section 3.1. Differentiable in every float argument.

    Args:
        backbone: output of a tower layer, ``[B, T, 1+P, D]``, CLS first; any strides, any float dtype, also under
            autocast: it is read as it is.
        cls_token: ``[D]``.
        pos: the tower's position table, ``[1+P, D]``.
        time: time table, ``[M, D]`` with M ≥ T rows.
        visible: the tokens and their order.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        ``[B, 1+N, D]`` in the dtype of the tables; padding rows (index -1) are zero.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    check_tensor("backbone", backbone, "[B, T, 1+P, D]", (None, visible.frames, 1 + visible.patches, None))
    check_visible(visible, "backbone", backbone)
    width = backbone.shape[3]
    check_tensor("cls_token", cls_token, "[D]", (width,), ("backbone", backbone), any_dtype=True)
    like = ("cls_token", cls_token)
    check_tensor("pos", pos, "[1+P, D]", (1 + visible.patches, width), like)
    check_tensor("time", time, "[M, D]", (None, width), like)
    if time.shape[0] < visible.frames:
        raise ValueError(f"time must have a row for each of {visible.frames} frames, but has {time.shape[0]}")
    return _OP(backbone, cls_token, pos, time, *visible.as_arguments(), backend)
