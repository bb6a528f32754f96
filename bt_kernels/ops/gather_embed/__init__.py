"""The op gather_embed: it gathers the branch's first input from the tower's tokens."""

from typing import overload

from torch import Tensor

from bt_kernels._checks import check_is_visible, check_norm, check_tensor, check_visible
from bt_kernels._dispatch import Kernel, unmeasured
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel, why_not_cuda_kernel
from bt_kernels._row_norm import fake_norm
from bt_kernels._triton import triton_kernel
from bt_kernels.ops.gather_embed import native, reference
from bt_kernels.visible import VisibleTokens

_TRITON = f"{__name__}.triton"
_OP = define_op(
    "gather_embed",
    "Tensor backbone, Tensor cls_token, Tensor pos, Tensor time",
    differentiable=("backbone", "cls_token", "pos", "time"),
    kernels=(
        Kernel("cuda", native.forward, native.backward, why_not_cuda_kernel, unmeasured),
        triton_kernel(_TRITON),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    autocast_skip=("backbone",),
    fake=lambda backbone, cls_token, pos, time, index, *_: _empty_out(backbone, time, index),
    shape_only=("backbone", "cls_token", "pos", "time"),
)
_NORM_OP = define_op(
    "gather_embed_norm",
    "Tensor backbone, Tensor cls_token, Tensor pos, Tensor time, Tensor norm_weight, Tensor norm_bias",
    differentiable=("backbone", "cls_token", "pos", "time", "norm_weight", "norm_bias"),
    kernels=(
        triton_kernel(_TRITON, "_norm"),
        Kernel("cpu", native.forward_norm, native.backward_norm, why_not_cpu_kernel),
        Kernel("reference", reference.forward_norm, reference.backward_norm),
    ),
    autocast_skip=("backbone",),
    fake=lambda backbone, cls_token, pos, time, weight, bias, index, *_: fake_norm(_empty_out(backbone, time, index)),
    extra=", float norm_eps",
    results=("out", "normed"),
    keep=("out",),
    saved=("mean", "rstd"),
    shape_only=("backbone", "cls_token", "pos", "time"),
)


def _empty_out(backbone: Tensor, time: Tensor, index: Tensor) -> Tensor:
    return time.new_empty(backbone.shape[0], 1 + index.shape[1], backbone.shape[3])


@overload
def gather_embed(
    backbone: Tensor,
    cls_token: Tensor,
    pos: Tensor,
    time: Tensor,
    visible: VisibleTokens,
    backend: str | None = ...,
    norm: None = ...,
) -> Tensor: ...
@overload
def gather_embed(
    backbone: Tensor,
    cls_token: Tensor,
    pos: Tensor,
    time: Tensor,
    visible: VisibleTokens,
    backend: str | None = ...,
    *,
    norm: tuple[Tensor, Tensor, float],
) -> tuple[Tensor, Tensor]: ...
def gather_embed(
    backbone: Tensor,
    cls_token: Tensor,
    pos: Tensor,
    time: Tensor,
    visible: VisibleTokens,
    backend: str | None = None,
    norm: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
        norm: ``(weight [D], bias [D], eps)`` of a LayerNorm of the patch rows, computed in the same pass.

    Returns:
        ``[B, 1+N, D]`` in the dtype of the tables, and with ``norm`` the patch rows normalised, ``[B, N, D]``;
        padding rows (index -1) are zero.

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
    if norm is None:
        return _OP(backbone, cls_token, pos, time, *visible.as_arguments(), backend)
    weight, bias, eps = check_norm(norm, width, like)
    return _NORM_OP(backbone, cls_token, pos, time, weight, bias, *visible.as_arguments(), eps, backend)[:2]
