"""The backward of alignment_loss for all kernels: it scales the gradients that the forward has computed."""

import torch


def count_of(index: torch.Tensor, slots: int | None) -> torch.Tensor | int:
    """Count the visible tokens of the batch, at least 1: all of a regular grid; ragged, a tensor on the device."""
    return (index >= 0).sum().clamp(min=1) if slots is None else max(index.numel(), 1)


def scale_gradients(
    grad, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps,
    target_eps, product, wanted, *sums_and_needs,
):  # fmt: skip
    """Return the gradients of the mean, from those of the sum over the tokens."""
    *sums, needs = sums_and_needs
    if any(need and not want for need, want in zip(needs, wanted, strict=True)):
        raise RuntimeError("alignment_loss: the backward needs a gradient that the forward was not told to compute")
    scale = grad.to(torch.promote_types(grad.dtype, torch.float32)) / count_of(index, slots)
    needed = [i for i, need in enumerate(needs) if need]
    grads: list[torch.Tensor | None] = [None] * len(needs)
    for i, scaled in zip(needed, torch._foreach_mul([sums[i] for i in needed], scale), strict=True):  # one launch
        grads[i] = scaled.to(branch.dtype)
    return tuple(grads)
