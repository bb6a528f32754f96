"""Losses of pretraining: the contrastive loss, and token alignment for cases that its op does not support."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bt_kernels import VisibleTokens
from bt_kernels.passes import patch_rows


def contrastive_loss(
    video: Tensor, text: Tensor, temperature: float | Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the symmetric video-text contrastive loss: the sum of both directions' mean negative log-likelihoods.

    Video b and text b are a pair; all others of the batch are negatives. Source: VTC, arXiv 2309.15785 section 3.2
    (the sum, not the mean, of the two directions, as published).

    Args:
        video: ``[B, F]``, of any norm. text: ``[B, F]``.
        temperature: τ; cosine similarities are divided by it.
        group: processes whose equally large batches form one global batch. Each process compares its own part with the
            whole, so that no process holds the full matrix. The mean of the results over processes is the loss of the
            global batch, and the mean of the parameters' gradients, as in DDP and FSDP, is its gradient: gradients pass
            through the exchange.

    Returns:
        A scalar, computed in float32 or wider.
    """
    return contrastive_losses((video,), text, temperature, group)[0]


def contrastive_losses(
    videos: Sequence[Tensor], text: Tensor, temperature: float | Tensor, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, ...]:
    """Compute the contrastive loss of each of several embeddings of the same videos with the same text.

    Equal to :func:`contrastive_loss` for each, in one product; ``videos``: ``[B, F]`` each. Backward from some of the
    results gives the embeddings of the others gradients of zeros.
    """
    for video in videos:
        if video.ndim != 2 or video.shape != text.shape:
            raise ValueError(f"video and text must both be [B, F], but are {list(video.shape)} and {list(text.shape)}")
    dtype = reduce(torch.promote_types, (video.dtype for video in videos), torch.float32)
    with torch.autocast(text.device.type, enabled=False):  # cosines over τ = 0.01: bfloat16 would be off by a third
        video = F.normalize(torch.stack([video.to(dtype) for video in videos]), dim=-1)  # [V, B, F]
        text = F.normalize(text.to(dtype), dim=-1)
        if group is None:
            logits = video @ text.T / temperature
            both = logits, logits.mT
            first = 0
        else:
            of_all = _Gathered.apply(video.transpose(0, 1), group).transpose(0, 1)
            both = video @ _Gathered.apply(text, group).T / temperature, text @ of_all.mT / temperature
            first = dist.get_rank(group) * len(text)
        own = slice(first, first + len(text))
        likelihoods = [part.log_softmax(-1)[..., own].diagonal(0, -2, -1).mean(-1) for part in both]
    return (-(likelihoods[0] + likelihoods[1])).unbind(0)


def called_alignment(
    branch: Tensor,
    target: Tensor,
    visible: VisibleTokens,
    head: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute masked branch token alignment with the head called as a module, unlike ``bt_kernels.alignment_loss``.

    The mean over the visible tokens of ``2 - 2·cos(a, b)`` (arXiv 2309.15785 section 3.2), a = ``head`` of the branch's
    tokens, b = ``project`` of the tower's tokens at the same positions. No gradient flows to the tower's side.

    Args:
        branch: ``[B, 1+N, D]``, CLS first. target: ``[B, T, 1+P, D]``.
        visible: the branch's tokens.
        head: maps ``[B, N, D]`` to ``[B, N, F]``. project: the same for the tower.

    Returns:
        A scalar of the dtype of ``branch``; 0 if no token is visible.
    """
    dtype = torch.promote_types(branch.dtype, torch.float32)
    index = visible.target_index
    real = index >= 0
    with torch.no_grad():
        wanted = project(patch_rows(target, index)).to(dtype)
    found = head(branch[:, 1:].masked_fill(~real[:, :, None], 0)).to(dtype)
    loss = (2 - 2 * F.cosine_similarity(found, wanted, dim=-1)) * real
    return (loss.sum() / real.sum().clamp(min=1)).to(branch.dtype)


@dataclass(frozen=True)
class ChatLayer:
    """Inputs of the losses MBCA and MBTA at the layer that chat reads.

    Attributes:
        mean: ``[B, D]``, the mean of a video's patch tokens as a projector reads them: the average of the tower's mean
            and the branch's mean over the visible tokens.
        distance: a scalar in float32 or wider, the mean over the visible tokens of ``2 - 2·cos(branch, tower)``.
    """

    mean: Tensor
    distance: Tensor


def compare_chat_layer(tower: Tensor, branch: Tensor, visible: VisibleTokens) -> ChatLayer:
    """Compare tower and branch at the layers that a chat model reads: tower layer L-2 and branch layer d-2.

    The losses of arXiv 2309.15785 section 3.2 use the outputs of the last layers, which chat does not run. Here they
    use the tokens of section 3.3, without a head, because the tokens that chat reads should stay near the tower's.

    Args:
        tower: ``[B, T, 1+P, D]``, CLS first; no gradient flows to it. branch: ``[B, 1+N, D]``, CLS first.
        visible: the branch's tokens.

    Raises:
        ValueError: ``visible`` has padding frames (``frame_counts``), which is not supported here.
    """
    if visible.frame_counts is not None:
        raise ValueError("visible must have no frame_counts if align_layer is 'chat'")
    dtype = torch.promote_types(branch.dtype, torch.float32)
    index = visible.target_index
    real = (index >= 0)[:, :, None]
    count = real.sum(1).clamp(min=1)
    with torch.no_grad():
        wanted, tower_mean = patch_rows(tower, index).to(dtype), tower[:, :, 1:].to(dtype).mean((1, 2))
    found = branch[:, 1:].to(dtype).masked_fill(~real, 0)
    distance = (2 - 2 * F.cosine_similarity(found, wanted, dim=-1)) * real[:, :, 0]
    return ChatLayer((tower_mean + found.sum(1) / count) / 2, distance.sum() / count.sum())


class _Gathered(torch.autograd.Function):
    """A gather of all processes' rows, ``[B, …]`` to ``[k·B, …]``, whose backward sums gradients over processes."""

    @staticmethod
    def forward(ctx, rows, group):
        ctx.group, ctx.count = group, len(rows)
        whole = rows.new_empty(len(rows) * dist.get_world_size(group), *rows.shape[1:])
        dist.all_gather_into_tensor(whole, rows.contiguous(), group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad[dist.get_rank(ctx.group) * ctx.count :][: ctx.count], None
