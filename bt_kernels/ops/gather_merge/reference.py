"""Definition of gather_merge in plain PyTorch. Legend: B, T, P, N, D as in ``bt_kernels.visible``."""

import torch
from torch import Tensor

from bt_kernels._layout import frame_weights, mean_over_frames, patch_places, patch_rows, zero_padding


def forward(backbone, branch, gate, index, frame_counts, patches, frames, slots) -> Tensor:
    incoming = _incoming(backbone, index, frame_counts, branch.dtype)  # [B, 1+N, D]
    merged = branch + incoming if gate is None else (1 - gate) * branch + gate * incoming
    return torch.cat([merged[:, :1], zero_padding(merged[:, 1:], index)], 1)


def backward(grad, backbone, branch, gate, index, frame_counts, patches, frames, slots, needs):
    grad = torch.cat([grad[:, :1], zero_padding(grad[:, 1:], index)], 1)
    acc = torch.promote_types(grad.dtype, torch.float32)
    grad_backbone = grad_branch = grad_gate = None
    if needs[0]:
        incoming = (grad if gate is None else gate * grad).to(acc)
        weights = frame_weights(frame_counts, backbone.shape[0], frames, backbone)  # [B, T]
        grad_backbone = torch.zeros(backbone.shape, dtype=acc, device=grad.device)
        grad_backbone[:, :, 0] = weights[:, :, None] * incoming[:, :1]
        grad_backbone.index_put_(patch_places(index, frames), incoming[:, 1:], accumulate=True)
        grad_backbone = grad_backbone.to(backbone.dtype)
    if needs[1]:
        grad_branch = grad.clone() if gate is None else (1 - gate) * grad
    if needs[2]:
        difference = _incoming(backbone, index, frame_counts, branch.dtype).to(acc) - branch.to(acc)
        difference = torch.cat([difference[:, :1], zero_padding(difference[:, 1:], index)], 1)
        grad_gate = (grad.to(acc) * difference).sum((0, 1)).to(grad.dtype)
    return grad_backbone, grad_branch, grad_gate


def _incoming(backbone: Tensor, index: Tensor, frame_counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    cls = mean_over_frames(backbone[:, :, 0], frame_counts).to(dtype)
    return torch.cat([cls[:, None], patch_rows(backbone, index).to(dtype)], 1)
