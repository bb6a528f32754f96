"""The contrastive loss of pretraining. (Token alignment is an op: ``bt_kernels.alignment_loss``.)"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(video: Tensor, text: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric video-text contrastive loss: the sum of both directions' mean negative log-likelihoods.

    Video b and text b belong together; all others of the batch are negatives. Source: VTC, arXiv 2309.15785
    section 3.2 (the sum and not the mean of the two directions, as published).

    Args:
        video: ``[B, F]``, any length. text: ``[B, F]``.
        temperature: τ; cosine similarities are divided by it.

    Returns:
        A scalar, computed in float32 or wider.
    """
    if video.ndim != 2 or video.shape != text.shape:
        raise ValueError(f"video and text must both be [B, F], but are {list(video.shape)} and {list(text.shape)}")
    wide = torch.promote_types(video.dtype, torch.float32)
    with torch.autocast(video.device.type, enabled=False):  # cosines over τ = 0.01: bfloat16 would be off by a third
        video, text = F.normalize(video.to(wide), dim=-1), F.normalize(text.to(wide), dim=-1)
        logits = video @ text.T / temperature
        labels = torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)
