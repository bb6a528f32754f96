"""gather_embed in Triton; the kernels, shared with gather_merge, are in ``bt_kernels/_triton_gather*.py``."""

import torch

from bt_kernels._triton_gather import run_forward
from bt_kernels._triton_gather_backward import RowGrads, spread, sum_by_list
from bt_kernels._triton_rows import RowLists, sum_dtype


def forward(backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots):
    return run_forward(backbone, index, frame_counts, tables=(cls_token, pos, time))[0]


def backward(grad, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs):
    return _backward(RowGrads(grad), grad, backbone, pos, time, index, frame_counts, patches, frames, needs)[:4]


def forward_norm(
    backbone, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, patches, frames, slots, norm_eps
):  # fmt: skip
    norm = (norm_weight, norm_bias, norm_eps)
    return run_forward(backbone, index, frame_counts, tables=(cls_token, pos, time), norm=norm)


def backward_norm(
    grad_out, grad_normed, backbone, cls_token, pos, time, norm_weight, norm_bias, index, frame_counts, patches,
    frames, slots, norm_eps, out, mean, rstd, needs,
):  # fmt: skip
    if grad_normed is None:
        zeros = [torch.zeros_like(norm_weight), torch.zeros_like(norm_bias)]
        grads = backward(
            grad_out, backbone, cls_token, pos, time, index, frame_counts, patches, frames, slots, needs[:4]
        )
        return *grads, *zeros
    rows = RowGrads(grad_out, grad_normed, norm_weight, (out, mean, rstd))
    return _backward(rows, grad_out, backbone, pos, time, index, frame_counts, patches, frames, needs)


def _backward(rows: RowGrads, grad, backbone, pos, time, index, frame_counts, patches, frames, needs):
    """Return the gradients of backbone, cls_token, pos, time, norm weight and norm bias.

    If the tower and its position table are frozen (training), each gradient row is read once and summed by frame.
    """
    dtype, acc = rows.dtype, sum_dtype(rows.dtype)
    batch, tokens = index.shape
    half_cls = rows.empty(batch, rows.width, dtype=acc).zero_() if grad is None else 0.5 * grad[:, 0].to(acc)
    total = None
    if rows.norm and (needs[0] or needs[2]):
        total = rows.empty(batch, 1 + tokens, rows.width, dtype=acc).zero_()
        total[:, 0] = 2 * half_cls
    by_frame, *norm_grads = sum_by_list(rows, RowLists.by_frame(index, patches, frames), tokens, total)
    total_rows = rows if total is None else RowGrads(total)
    grad_backbone = grad_cls = grad_pos = grad_time = None
    if needs[0]:
        grad_backbone = spread(total_rows.grad, None, index, frame_counts, frames, patches, dtype, 0.5)
    if needs[1]:
        grad_cls = half_cls.sum(0).to(dtype)
    if needs[2]:
        by_patch = sum_by_list(total_rows, RowLists.by_patch(index, patches, frames), tokens)[0]
        grad_pos = torch.cat([half_cls.sum(0, keepdim=True), by_patch]).to(dtype)
    if needs[3]:
        grad_time = torch.nn.functional.pad(by_frame.to(dtype), (0, 0, 0, len(time) - frames))
    return grad_backbone, grad_cls, grad_pos, grad_time, *(g.to(dtype) for g in norm_grads)
