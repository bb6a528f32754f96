"""Definition of gather_embed in plain PyTorch. Legend: B, T, P, N, D as in ``bt_kernels.visible``."""

import torch
from torch import Tensor

from bt_kernels._layout import frame_weights, mean_over_frames, patch_places, patch_rows, zero_padding


def forward(backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots) -> Tensor:
    mean_cls = mean_over_frames(backbone[:, :, 0], frame_counts)
    cls = (0.5 * (mean_cls + cls_token + pos[0])).to(time.dtype)
    place = index.clamp(min=0)
    rows = patch_rows(backbone, index) + zero_padding(pos[1 + place // frames] + time[place % frames], index)
    return torch.cat([cls[:, None], rows.to(time.dtype)], 1)


def backward(grad, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs):
    batch = backbone.shape[0]
    acc = torch.promote_types(grad.dtype, torch.float32)
    half_cls = 0.5 * grad[:, 0].to(acc)  # [B, D]
    rows = zero_padding(grad[:, 1:], index).to(acc)  # [B, N, D]
    _, frame, token = patch_places(index, frames)
    grads: list[Tensor | None] = [None] * 4
    if needs[0]:
        weights = frame_weights(frame_counts, batch, frames, backbone)
        grads[0] = torch.zeros(backbone.shape, dtype=acc, device=grad.device)
        grads[0][:, :, 0] = weights[:, :, None] * half_cls[:, None]
        grads[0].index_put_(patch_places(index, frames), rows, accumulate=True)
    if needs[1]:
        grads[1] = half_cls.sum(0)
    if needs[2]:
        grads[2] = torch.zeros(pos.shape, dtype=acc, device=grad.device)
        grads[2][0] = half_cls.sum(0)
        grads[2].index_add_(0, token.flatten(), rows.flatten(0, 1))
    if needs[3]:
        grads[3] = torch.zeros(time.shape, dtype=acc, device=grad.device)
        grads[3].index_add_(0, frame.flatten(), rows.flatten(0, 1))
    dtypes = (backbone.dtype, *[grad.dtype] * 3)
    return tuple(None if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))
