"""Second definition of every op, by dense matrices and plain loops over all tokens.

Written from the mathematics alone and sharing no code with ``bt_kernels``: attention is a full N x N matrix with a
mask, selection is a one-hot matrix, pooling and alignment are loops. Slow and obvious; call it in float64.

Legend: B videos, P patches, T frames, N rows of a video, S slots of a grid, H heads, E head width, D = H·E, F width
of the shared space. Row n of ``visible.index`` is p·T + t; -1 marks padding. All results are differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bt_kernels import VisibleTokens


def rows(visible: VisibleTokens, video: int) -> list[tuple[int, int, int] | None]:
    """(place p·T + t, temporal sequence, spatial sequence) of each row of one video; None where it is padding.

    In a grid the sequences are those of the grid: group n // S and slot n mod S. Ragged: the row's own patch, frame.
    """
    out: list[tuple[int, int, int] | None] = []
    for n, place in enumerate(visible.index[video].tolist()):
        if place < 0:
            out.append(None)
        elif visible.slots is not None:
            out.append((place, n // visible.slots, n % visible.slots))
        else:
            out.append((place, place // visible.frames, place % visible.frames))
    return out


def real_frames(visible: VisibleTokens, video: int) -> int:
    """Number of frames of one video that are not padding."""
    return visible.frames if visible.frame_counts is None else int(visible.frame_counts[video])


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention [Q,H,E] x [M,H,E] under a bool mask [Q,M]; a query that may see nothing comes out as zero."""
    out = q.new_zeros(q.shape)
    seeing = allowed.any(1)
    score = torch.einsum("qhe,mhe->hqm", q[seeing], k) / q.shape[-1] ** 0.5
    weight = score.masked_fill(~allowed[seeing], -torch.inf).softmax(-1)
    result = torch.einsum("hqm,mhe->qhe", weight, v)
    return out.index_put((seeing.nonzero()[:, 0],), result)


def one_hot(visible: VisibleTokens, video: int, dtype: torch.dtype, target: bool = False) -> Tensor:
    """[N, P·T] selection of patch-major tokens; a padded row is all zeros."""
    index = (visible.target_index if target else visible.index)[video].tolist()
    matrix = torch.zeros(len(index), visible.patches * visible.frames, dtype=dtype)
    for n, place in enumerate(index):
        if visible.index[video, n] >= 0:
            matrix[n, place] = 1
    return matrix


def patch_major(backbone: Tensor) -> Tensor:
    """Patch tokens of one video, [T,1+P,D] -> [P·T,D], token (p, t) at p·T + t."""
    frames, patches = backbone.shape[0], backbone.shape[1] - 1
    return torch.stack([backbone[t, 1 + p] for p in range(patches) for t in range(frames)])


def mean_of_real_frames(values: Tensor, count: int) -> Tensor:
    """Mean of [T,...] over the first ``count`` frames; zero where there is none."""
    total = torch.zeros_like(values[0])
    for t in range(count):
        total = total + values[t]
    return total / max(count, 1)


def gather_embed(backbone: Tensor, cls_token: Tensor, pos: Tensor, time: Tensor, visible: VisibleTokens) -> Tensor:
    """z_cls = ½(mean_t X[:,t,0] + c + pos[0]); z(p,t) = X[:,t,1+p] + pos[1+p] + time[t]."""
    videos = []
    for b in range(visible.batch):
        cls = (mean_of_real_frames(backbone[b, :, 0], real_frames(visible, b)) + cls_token.reshape(-1) + pos[0]) / 2
        full = torch.stack(
            [
                backbone[b, t, 1 + p] + pos[1 + p] + time[t]
                for p in range(visible.patches)
                for t in range(visible.frames)
            ]
        )
        videos.append(torch.cat([cls[None], one_hot(visible, b, full.dtype) @ full]))
    return stacked(videos, (0, 1 + visible.tokens, backbone.shape[-1]), backbone)


def gather_merge(backbone: Tensor, branch: Tensor, gate: Tensor | None, visible: VisibleTokens) -> Tensor:
    """z <- (1-w)·z + w·m with m the tower's tokens at the rows' places; z + m without a gate."""
    videos = []
    for b in range(visible.batch):
        cls = mean_of_real_frames(backbone[b, :, 0], real_frames(visible, b))
        tower = torch.cat([cls[None], one_hot(visible, b, backbone.dtype) @ patch_major(backbone[b])])
        mixed = branch[b] + tower if gate is None else (1 - gate) * branch[b] + gate * tower
        real = torch.tensor([True] + [row is not None for row in rows(visible, b)])
        videos.append(torch.where(real[:, None], mixed, torch.zeros_like(mixed)))
    return stacked(videos, branch.shape, backbone)


def temporal_attention(qkv: Tensor, visible: VisibleTokens) -> Tensor:
    """Full N x N attention in which a row may see the rows of its own temporal sequence."""
    videos = []
    for b in range(visible.batch):
        layout = rows(visible, b)
        allowed = torch.tensor(
            [[m is not None and n is not None and m[1] == n[1] for m in layout] for n in layout],
            dtype=torch.bool,
        ).reshape(visible.tokens, visible.tokens)
        q, k, v = qkv[b].unbind(1)
        videos.append(masked_attention(q, k, v, allowed))
    return stacked(videos, (0, *qkv.shape[1:2], *qkv.shape[3:]), qkv)


def spatial_attention(qkv: Tensor, visible: VisibleTokens, frame_weight: Tensor | None = None) -> Tensor:
    """Attention over CLS and all rows: a patch row sees CLS and its own spatial sequence; CLS asks once per frame.

    The CLS row is the weighted sum of its answers, by default their mean over the real frames. A frame without any
    visible patch has CLS alone, whose answer then is its own value.
    """
    steps = visible.frames if visible.slots is None else visible.slots
    videos = []
    for b in range(visible.batch):
        layout = rows(visible, b)
        q, k, v = qkv[b].unbind(1)
        patch_sees = torch.tensor(
            [[n is not None] + [m is not None and n is not None and m[2] == n[2] for m in layout] for n in layout],
            dtype=torch.bool,
        ).reshape(visible.tokens, 1 + visible.tokens)
        cls_sees = torch.tensor(
            [[True] + [m is not None and m[2] == step for m in layout] for step in range(steps)],
            dtype=torch.bool,
        )
        answers = masked_attention(q[:1].expand(steps, -1, -1), k, v, cls_sees)
        if frame_weight is None:
            cls = mean_of_real_frames(answers, steps if visible.slots is not None else real_frames(visible, b))
        else:
            cls = (answers * frame_weight[b, :, None, None]).sum(0)
        videos.append(torch.cat([cls[None], masked_attention(q[1:], k, v, patch_sees)]))
    return stacked(videos, (0, *qkv.shape[1:2], *qkv.shape[3:]), qkv)


def pool_video_tokens(backbone: Tensor, branch: Tensor, visible: VisibleTokens) -> Tensor:
    """Row p: ½(mean_t X[t,1+p] + mean_t z(p,t)); last row: ½(mean_t X[t,0] + z_cls)."""
    videos = []
    for b in range(visible.batch):
        count = backbone.shape[1] if visible.frame_counts is None else real_frames(visible, b)
        out = []
        for p in range(visible.patches):
            own = [branch[b, 1 + n] for n, row in enumerate(rows(visible, b)) if row and row[0] // visible.frames == p]
            branch_mean = torch.stack(own).sum(0) / len(own) if own else torch.zeros_like(branch[b, 0])
            out.append((mean_of_real_frames(backbone[b, :, 1 + p], count) + branch_mean) / 2)
        out.append((mean_of_real_frames(backbone[b, :, 0], count) + branch[b, 0]) / 2)
        videos.append(torch.stack(out))
    return stacked(videos, (0, visible.patches + 1, backbone.shape[-1]), backbone)


def alignment_loss(
    branch: Tensor,
    target: Tensor,
    visible: VisibleTokens,
    head_weight: Tensor,
    head_bias: Tensor,
    head_norm_weight: Tensor,
    head_norm_bias: Tensor,
    target_norm_weight: Tensor,
    target_norm_bias: Tensor,
    target_projection: Tensor,
    target_projection_bias: Tensor | None = None,
    head_norm_eps: float = 1e-5,
    target_norm_eps: float = 1e-5,
) -> Tensor:
    """Mean over visible tokens of 2 - 2·cos(a, b), a the head of the branch's row, b the tower's token of its place."""
    terms = []
    for b in range(visible.batch):
        for n, row in enumerate(rows(visible, b)):
            if row is None:
                continue
            place = int(visible.target_index[b, n])
            patch, frame = divmod(place, visible.frames)
            a = normed(head_weight @ branch[b, 1 + n] + head_bias, head_norm_weight, head_norm_bias, head_norm_eps)
            token = normed(target[b, frame, 1 + patch], target_norm_weight, target_norm_bias, target_norm_eps)
            tower = target_projection @ token
            if target_projection_bias is not None:
                tower = tower + target_projection_bias
            terms.append(2 - 2 * (a @ tower) / (a.norm() * tower.norm()))
    return torch.stack(terms).mean() if terms else branch.sum() * 0


def residual_norm(
    x: Tensor, update: Tensor | None, weight: Tensor, bias: Tensor, scale: Tensor | None = None, dtype=None
) -> tuple[Tensor, Tensor]:
    """Each row plus its update, of which the first rows may have none, and LayerNorm of each sum."""
    videos = []
    for b in range(x.shape[0]):
        total = list(x[b])
        first = 0 if update is None else len(total) - update.shape[1]
        for q in range(0 if update is None else update.shape[1]):
            total[first + q] = x[b, first + q] + update[b, q] * (1 if scale is None else scale[b, q])
        videos.append(torch.stack([torch.stack(total), torch.stack([normed(r, weight, bias, 1e-5) for r in total])]))
    both = stacked(videos, (0, 2, *x.shape[1:]), x)
    return both[:, 0], both[:, 1]


def bias_gelu(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """y·Φ(y) of y = x + bias, or with one of its two approximations."""
    y = x if bias is None else x + bias
    if act == "gelu":
        return y * torch.erfc(-y / 2**0.5) / 2
    inner = 1.702 * y if act == "quick_gelu" else 2 * (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3)
    return y / (1 + (-inner).exp())


def linear_add(
    x: Tensor, weight: Tensor, bias: Tensor | None, stream: Tensor, scale: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Each row of a stream plus that of a linear layer, of which the first rows may have none."""
    rows = torch.einsum("bqk,dk->bqd", x, weight)
    rows = rows if bias is None else rows + bias
    rows = rows if scale is None else rows * scale[:, :, None]
    rows = rows if offset is None else rows + offset
    first = stream.shape[1] - x.shape[1]
    return torch.cat([stream[:, :first], stream[:, first:] + rows], 1)


def mlp(
    x: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor, fc2_bias: Tensor | None, act: str,
    stream: Tensor | None = None, scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The activation of one linear layer through another, added to a stream."""
    hidden = bias_gelu(torch.einsum("bqd,fd->bqf", x, fc1_weight), fc1_bias, act)
    if stream is None:
        stream = x.new_zeros(*x.shape[:2], len(fc2_weight))
    return linear_add(hidden, fc2_weight, fc2_bias, stream, scale)


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of one vector, written out."""
    centred = x - x.mean()
    return centred / (centred.square().mean() + eps).sqrt() * weight + bias


def stacked(videos: list[Tensor], empty_shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Stack the videos of a batch; an empty batch has nothing to stack."""
    return torch.stack(videos) if videos else like.new_zeros((0, *empty_shape[1:]))
