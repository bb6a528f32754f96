"""Softmax attention over short sequences in plain PyTorch, forward and backward, for the reference kernels.

Legend: ... leading dimensions, Q queries, K keys, H heads, E head width. Tensors are [..., Q or K, H, E].
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Compute softmax(q·kᵀ/√E)·v in float32 or wider. ``key_mask`` is bool [..., K], True = key may be attended to."""
    acc = torch.promote_types(q.dtype, torch.float32)
    p = _probabilities(q.to(acc), k.to(acc), key_mask)
    return torch.einsum("...hqk,...khe->...qhe", p, v.to(acc)).to(q.dtype)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; the probabilities are recomputed.

    dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP - rowsum(P ∘ dP)), dQ = dS·K/√E, dK = dSᵀ·Q/√E.
    """
    dtype = q.dtype
    acc = torch.promote_types(dtype, torch.float32)
    grad, q, k, v = (t.to(acc) for t in (grad, q, k, v))
    p = _probabilities(q, k, key_mask)
    dv = torch.einsum("...hqk,...qhe->...khe", p, grad)
    dp = torch.einsum("...qhe,...khe->...hqk", grad, v)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
    dq = torch.einsum("...hqk,...khe->...qhe", ds, k)
    dk = torch.einsum("...hqk,...qhe->...khe", ds, q)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def log_sum_exp(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    """Compute the log-sum-exp of the scores q·kᵀ/√E over the keys: ``[..., H, Q]``, in float32 or wider."""
    acc = torch.promote_types(q.dtype, torch.float32)
    return _scores(q.to(acc), k.to(acc), key_mask).logsumexp(-1)


def _probabilities(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    return _scores(q, k, key_mask).softmax(-1)


def _scores(q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
    scores = torch.einsum("...qhe,...khe->...hqk", q * q.shape[-1] ** -0.5, k)
    if key_mask is not None:
        # The lowest finite number, not -inf: a sequence without a visible token then stays finite. It is never read.
        scores = scores.masked_fill(~key_mask[..., None, None, :], torch.finfo(scores.dtype).min)
    return scores
