"""The backward of alignment_loss for all kernels: it scales the gradients that the forward has computed."""

import torch


def count_of(index: torch.Tensor) -> torch.Tensor:
    """Count the visible tokens of the batch, at least 1; the result stays on the device."""
    return (index >= 0).sum().clamp(min=1)


def scale_gradients(
    grad, branch, target, head_weight, head_bias, head_norm_weight, head_norm_bias, target_norm_weight,
    target_norm_bias, target_projection, target_projection_bias, index, frame_counts, patches, frames, slots, head_eps,
    target_eps, product, wanted, *sums_and_needs,
):  # fmt: skip
    """Return the gradients of the mean, from those of the sum over the tokens."""
    *sums, needs = sums_and_needs
    if any(need and not want for need, want in zip(needs, wanted, strict=True)):
        raise RuntimeError("alignment_loss: the backward needs a gradient that the forward was not told to compute")
    scale = grad.to(torch.promote_types(grad.dtype, torch.float32)) / count_of(index)
    dtype = branch.dtype
    return tuple((each * scale).to(dtype) if need else None for each, need in zip(sums, needs, strict=True))
