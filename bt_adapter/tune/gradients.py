"""Reduction of gradients over processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET = 1 << 24  # values per all-reduce


def share_gradients(parameters: Sequence[Tensor], factor: float, group: dist.ProcessGroup | None) -> None:
    """Replace every gradient by its sum over all processes, times ``factor``.

    DistributedDataParallel waits for every parameter in every step. Here a step of stills alone leaves the branch
    without a gradient, and text alone all but the adapters. So gradients are reduced once per step; missing ones are 0.
    """
    grads = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        grads.append(parameter.grad)
    if group is not None:
        for bucket in _buckets(grads):
            flat = torch.cat([grad.flatten() for grad in bucket])
            dist.all_reduce(flat, group=group)
            pieces = flat.split([grad.numel() for grad in bucket])
            for grad, piece in zip(bucket, pieces, strict=True):
                grad.copy_(piece.view_as(grad))
    torch._foreach_mul_(grads, factor)


def _buckets(grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors into buckets of at least BUCKET values."""
    buckets: list[list[Tensor]] = [[]]
    for grad in grads:
        if sum(other.numel() for other in buckets[-1]) >= BUCKET:
            buckets.append([])
        buckets[-1].append(grad)
    return buckets
