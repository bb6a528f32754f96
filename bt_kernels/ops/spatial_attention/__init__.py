"""The op spatial_attention: attention inside each frame, with the video's only CLS in every frame."""

import torch
from torch import Tensor

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels._dispatch import Kernel
from bt_kernels._library import define_op
from bt_kernels._native import why_not_cpu_kernel
from bt_kernels._triton import triton_kernel, why_not_without_float64
from bt_kernels.ops.spatial_attention import native, reference
from bt_kernels.visible import VisibleTokens


def _fake(qkv, frame_weight, index, frame_counts, patches, frames, slots):
    batch, rows, _, heads, width = qkv.shape
    steps, groups = (frames, patches) if slots is None else (slots, (rows - 1) // slots)
    acc = torch.promote_types(qkv.dtype, torch.float32)
    return (
        qkv.new_empty(batch, rows, heads, width),
        qkv.new_empty(batch, steps, heads, 1 + groups, dtype=acc),
        qkv.new_empty(batch, steps, heads, width, dtype=acc),
    )


# lse [B, S, H, 1+G]: natural log-sum-exp of each query of a frame: CLS first, then the token of group g of a grid or of
# patch g when ragged (0 if not visible). cls_out [B, S, H, E]: the result of the CLS query in each frame. Both are in
# float32 or wider.
_OP = define_op(
    "spatial_attention",
    "Tensor qkv, Tensor? frame_weight",
    differentiable=("qkv",),
    kernels=(
        triton_kernel(f"{__name__}.triton", why_not=why_not_without_float64),
        Kernel("cpu", native.forward, native.backward, why_not_cpu_kernel),
        Kernel("reference", reference.forward, reference.backward),
    ),
    fake=_fake,
    autocast="lower",
    autocast_skip=("frame_weight",),
    keep=("out",),
    saved=("lse", "cls_out"),
)


def spatial_attention(
    qkv: Tensor,
    visible: VisibleTokens,
    frame_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Compute softmax attention inside each frame over CLS and the frame's visible patches, with scale 1/√E.

    The video has one CLS. It is query and key in every frame, and its row of the result is the weighted sum of its
    results in the frames. A frame without visible patches contains only CLS. Equivalent to (regular grid)::

        rows = qkv[:, 1:].unflatten(1, (K, S)).transpose(1, 2)                  # [B, S, K, 3, H, E]
        x = torch.cat([qkv[:, None, :1].expand(-1, S, -1, -1, -1, -1), rows], 2)
        out = F.scaled_dot_product_attention(*x.permute(3, 0, 1, 4, 2, 5)).transpose(2, 3)
        out = torch.cat([out[:, :, 0].mean(1, keepdim=True), out[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)

    Source: the branch's spatial layers, arXiv 2309.15785 section 3.1.

    Args:
        qkv: packed projections, ``[B, 1+N, 3, H, E]``, CLS first; any float dtype.
        visible: the tokens and their order.
        frame_weight: ``[B, S]`` (S slots of a grid, frames when ragged): weight of each frame in the CLS row, for
            stochastic depth and padding; float32 or the dtype of ``qkv``; no gradient flows to it. None: the mean
            over the real frames. Patch rows are not weighted.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses automatically.

    Returns:
        ``[B, 1+N, H, E]``; padding rows (index -1) are zero.

    Raises:
        ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        BackendUnavailable: ``backend`` cannot run this call.
    """
    check_is_visible(visible)
    check_tensor("qkv", qkv, "[B, 1+N, 3, H, E]", (None, 1 + visible.tokens, 3, None, None))
    check_visible(visible, "qkv", qkv)
    if frame_weight is not None:
        check_tensor("frame_weight", frame_weight, "[B, S]", (visible.batch, visible.steps))
        if frame_weight.dtype not in (qkv.dtype, torch.float32):
            raise TypeError(f"frame_weight must be float32 or {qkv.dtype}, but is {frame_weight.dtype}")
        if frame_weight.device != qkv.device:
            raise ValueError(f"frame_weight must be on {qkv.device}, but is on {frame_weight.device}")
        frame_weight = frame_weight.detach()
    return _OP(qkv, frame_weight, *visible.as_arguments(), backend)[0]
