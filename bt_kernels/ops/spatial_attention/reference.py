"""Definition of spatial_attention in plain PyTorch. Legend: B, N, H, E; G sequences of S steps (``_layout``)."""

import torch
from torch import Tensor

from bt_kernels._layout import frame_weights, from_grid, to_grid, visible_grid
from bt_kernels._softmax_attention import attend, attend_backward, log_sum_exp


def forward(qkv, frame_weight, index, frame_counts, patches, frames, slots) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _frames(qkv, index, patches, frames, slots).unbind(3)  # [B, S, 1+G, H, E]
    mask = _key_mask(index, patches, frames, slots)
    out = attend(q, k, v, mask)
    weights = _weights(frame_weight, frame_counts, qkv, out.shape[1])
    cls_out = out[:, :, 0].to(weights.dtype).contiguous()
    cls = torch.einsum("bs,bshe->bhe", weights, cls_out).to(qkv.dtype)
    rows = from_grid(out[:, :, 1:].transpose(1, 2), index, slots)
    lse = log_sum_exp(q, k, mask)  # [B, S, H, 1+G]
    if mask is not None:
        lse = lse.masked_fill(~mask[:, :, None], 0)
    return torch.cat([cls[:, None], rows], 1), lse, cls_out


def backward(grad, qkv, frame_weight, index, frame_counts, patches, frames, slots, out, lse, cls_out, needs):
    q, k, v = _frames(qkv, index, patches, frames, slots).unbind(3)
    weights = _weights(frame_weight, frame_counts, qkv, q.shape[1])
    # float32 or wider: the CLS gradient is divided among the frames
    grad_cls = weights[:, :, None, None] * grad[:, None, 0].to(weights.dtype)
    grad_rows = to_grid(grad[:, 1:].to(weights.dtype), index, patches, frames, slots).transpose(1, 2)
    grad_out = torch.cat([grad_cls[:, :, None], grad_rows], 2)  # [B, S, 1+G, H, E]
    inputs = [t.to(weights.dtype) for t in (q, k, v)]
    grads = attend_backward(grad_out, *inputs, _key_mask(index, patches, frames, slots))
    grads = torch.stack(grads, 3)
    rows = from_grid(grads[:, :, 1:].transpose(1, 2), index, slots)
    return (torch.cat([grads[:, :, 0].sum(1, keepdim=True), rows], 1).to(qkv.dtype),)


def _frames(qkv: Tensor, index: Tensor, patches: int, frames: int, slots: int | None) -> Tensor:
    """Split ``[B, 1+N, 3, H, E]`` into one sequence per frame, with CLS first in each: ``[B, S, 1+G, 3, H, E]``."""
    rows = to_grid(qkv[:, 1:], index, patches, frames, slots).transpose(1, 2)
    cls = qkv[:, None, :1].expand(-1, rows.shape[1], -1, -1, -1, -1)
    return torch.cat([cls, rows], 2)


def _key_mask(index: Tensor, patches: int, frames: int, slots: int | None) -> Tensor | None:
    mask = visible_grid(index, patches, frames, slots)
    if mask is None:
        return None
    mask = mask.transpose(1, 2)  # [B, S, G]
    return torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2)


def _weights(frame_weight: Tensor | None, frame_counts: Tensor | None, qkv: Tensor, steps: int) -> Tensor:
    weights = frame_weights(frame_counts, qkv.shape[0], steps, qkv)
    return weights if frame_weight is None else frame_weight.to(weights.dtype)
