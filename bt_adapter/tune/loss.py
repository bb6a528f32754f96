"""Cross-entropy of answer tokens without all their logits in memory (for GPUs see arXiv 2410.10989)."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def answer_loss(hidden: Tensor, targets: Tensor, head: nn.Linear, chunk: int = 512) -> Tensor:
    """Sum over ``n`` answer tokens of the cross-entropy of ``head(hidden)`` with their targets.

    On a GPU with liger-kernel installed its fused kernel computes it. Elsewhere at most ``chunk`` tokens have logits at
    a time: more tokens than that go through the head piece by piece, and once more in backward.

    Args:
        hidden: last hidden states, ``[n, W]``. targets: token ids, int64 ``[n]``.
        head: maps hidden states to logits over the vocabulary. chunk: tokens whose logits may exist at once.

    Returns:
        A scalar, float32 or float64; 0 where n is 0.
    """
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel") is not None:
        return _liger(hidden, targets, head)
    if len(hidden) <= chunk:  # backward begins here, so that keeping the logits takes no more than making them again
        return _piece(hidden, targets, head)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for rows, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        total = total + checkpoint(_piece, rows, wanted, head, use_reentrant=False)
    return total


def _piece(rows: Tensor, wanted: Tensor, head: nn.Linear) -> Tensor:
    logits = head(rows)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")


def _liger(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return loss(head.weight, hidden.to(head.weight.dtype), targets, head.bias)
