"""The backward of alignment_loss for all kernels: it scales the gradients that the forward has computed."""

import torch


def count_of(index: torch.Tensor, slots: int | None) -> torch.Tensor | int:
    """Count the visible tokens of the batch, at least 1: all of a regular grid; ragged, a tensor on the device."""
    return (index >= 0).sum().clamp(min=1) if slots is None else max(index.numel(), 1)


def stored(wanted: list[bool]) -> tuple[bool, bool, bool]:
    """Return whether the forward stores the gradients of the branch, of the head's weight, and of its three vectors.

    wanted: whether each differentiable argument gets one; those of the vectors are one tensor, ``[3, F]``.
    """
    return wanted[0], wanted[1], any(wanted[2:])


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
    of_vectors = sums[2].unbind(0) if any(needs[2:]) else (None,) * 3
    given = [each for each, need in zip((*sums[:2], *of_vectors), needs, strict=True) if need]
    scaled = iter(torch._foreach_mul(given, scale))  # one launch
    return tuple(next(scaled).to(branch.dtype) if need else None for need in needs)
