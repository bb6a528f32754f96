"""Temporal and spatial attention as modules with a packed qkv projection, the op and an output projection.

Legend: B videos, N visible patch rows of each, D width, H heads, E = D/H; K patches, S frames of a regular grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bt_kernels._checks import check_is_visible, check_tensor, check_visible
from bt_kernels.nn.stochastic_depth import frame_weight_and_row_scale, sequence_row_scale
from bt_kernels.ops.spatial_attention import spatial_attention
from bt_kernels.ops.temporal_attention import temporal_attention
from bt_kernels.plain import is_plain
from bt_kernels.visible import VisibleTokens


def check_tokens(name: str, tokens: Tensor, width: int, cls: int, weight_name: str, layer: nn.Module) -> None:
    """Raise unless ``tokens`` is ``[B, cls+N, D]`` in the dtype and on the device of ``layer``'s weight."""
    # A layer that replaces or wraps it (an adapter, a quantised or offloaded weight) may store weights in another dtype
    # or on another device than it computes in.
    weight = layer.weight if isinstance(layer, (nn.Linear, nn.LayerNorm)) and is_plain(layer) else None
    like = None if weight is None else (weight_name, weight)
    check_tensor(name, tokens, "[B, 1+N, D]" if cls else "[B, N, D]", (None, None, width), like)


def check_or_make_visible(
    name: str, tokens: Tensor, cls: int, visible: VisibleTokens | None, frames: int | None
) -> VisibleTokens:
    """Return ``visible`` if it fits ``tokens``; if it is None, make all tokens of ``frames`` frames visible."""
    rows = tokens.shape[1] - cls
    if visible is not None:
        check_is_visible(visible)
        if frames is not None:
            raise ValueError(f"frames requires visible=None, but both were given (frames={frames!r})")
        legend = "[B, 1+N, D]" if cls else "[B, N, D]"
        check_tensor(name, tokens, legend, (None, cls + visible.tokens, None))
        check_visible(visible, name, tokens)
        return visible
    if frames is None:
        raise ValueError("visible or frames must be given: a VisibleTokens, or the number of frames of a full grid")
    if isinstance(frames, bool) or not isinstance(frames, (int, torch.SymInt)):
        raise TypeError(f"frames must be an int, but is {type(frames).__name__}")
    if frames < 1 or rows < 1 or rows % frames:
        raise ValueError(
            f"{name} must hold a whole number of patches of frames={frames} rows each"
            f"{' after CLS' if cls else ''}, but holds {rows} rows"
        )
    return VisibleTokens.all(tokens.shape[0], rows // frames, frames, tokens.device)


def check_scale(scale: Tensor, legend: str, batch: int, count: int, device: torch.device) -> None:
    """Raise unless ``scale`` is a floating-point ``[B, count]`` on ``device``."""
    check_tensor("scale", scale, legend, (batch, count))
    if scale.device != device:
        raise ValueError(f"scale must be on the device of the tokens, {device}, but is on {scale.device}")


def check_width_and_heads(dim: int, heads: int) -> None:
    """Raise unless both are positive ints and ``heads`` divides ``dim``."""
    for name, value in (("dim", dim), ("heads", heads)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an int, but is {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but is {value}")
    if dim % heads:
        raise ValueError(f"heads must divide dim = {dim}, but is {heads}")


class _PackedAttention(nn.Module):
    """The projections of an attention: ``qkv``, packed in the order q, k, v with heads inside each, and ``out``."""

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = True,
        out_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_width_and_heads(dim, heads)
        self.dim = dim
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, bias=out_bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from a normal distribution of deviation 0.02, truncated at ±2, as in ViT; set biases to 0."""
        for layer in (self.qkv, self.out):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, heads={self.heads}"

    def _packed(self, tokens: Tensor) -> Tensor:
        """Project ``[B, rows, D]`` to ``[B, rows, 3, H, E]``."""
        return self.qkv(tokens).unflatten(-1, (3, self.heads, self.dim // self.heads))


class TemporalAttention(_PackedAttention):
    """Multi-head attention of every patch over its frames. The input is patch rows only: **no CLS**.

    Equivalent to (all tokens of K patches and S frames)::

        q, k, v = self.qkv(rows).view(B * K, S, 3, H, E).permute(2, 0, 3, 1, 4)     # [B·K, H, S, E] each
        out = F.scaled_dot_product_attention(q, k, v)
        out = self.out(out.transpose(1, 2).reshape(B, K * S, D))

    without the transposes, and with any number of sequences B·K. Example::

        attention = TemporalAttention(dim=768, heads=12)
        rows = torch.randn(2, 196 * 8, 768)                     # row k·8 + t: patch k of frame t
        out = attention(rows, frames=8)                         # [2, 1568, 768]
        visible = VisibleTokens.tube(2, 196, 8, ratio=0.7)      # or only some tokens
        out = attention(rows[:, : visible.tokens], visible)     # [2, 472, 768]

    Parameters are ``qkv.weight [3·D, D]``, ``qkv.bias``, ``out.weight [D, D]`` and ``out.bias``: timm's packing.

    Args:
        dim: D.
        heads: H; must divide D.
        qkv_bias, out_bias: whether the two projections have biases.
        device, dtype: device and dtype of the parameters.
    """

    def forward(
        self,
        rows: Tensor,
        visible: VisibleTokens | None = None,
        *,
        frames: int | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Compute attention over time.

        Args:
            rows: ``[B, N, D]``, patch-major, without CLS; any float dtype; without autocast that of the
                parameters.
            visible: the tokens of the rows; None: all tokens of ``frames`` frames.
            frames: number of frames, required if ``visible`` is None; must divide N.
            scale: ``[B, sequences]``, factors on the result of each sequence (stochastic depth); None: ones.

        Returns:
            ``[B, N, D]``. Padding rows (index -1) of a ragged ``visible`` equal the output bias.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        """
        check_tokens("rows", rows, self.dim, 0, "qkv.weight", self.qkv)
        visible = check_or_make_visible("rows", rows, 0, visible, frames)
        update = self.out(temporal_attention(self._packed(rows), visible).flatten(2))
        if scale is None:
            return update
        check_scale(scale, "[B, sequences]", visible.batch, visible.sequences, rows.device)
        return update * sequence_row_scale(scale, visible).to(update.dtype)


class SpatialAttention(_PackedAttention):
    """Multi-head attention inside each frame, with the video's only CLS in every frame. The input has **CLS first**.

    A patch row attends to CLS and the visible patches of its frame. CLS attends, in each frame, to itself and the
    frame's patches; its result is the mean over the frames. Equivalent to (all tokens of K patches and
    S frames)::

        cls, rows = tokens[:, :1], tokens[:, 1:].view(B, K, S, D)
        x = torch.cat([cls[:, None].expand(-1, S, -1, -1), rows.transpose(1, 2)], 2)       # [B, S, 1+K, D]
        q, k, v = self.qkv(x).unflatten(-1, (3, H, E)).permute(3, 0, 1, 4, 2, 5)
        out = self.out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3))
        out = torch.cat([out[:, :, 0].mean(1, keepdim=True), out[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)

    without repeating CLS or moving rows. Example::

        attention = SpatialAttention(dim=768, heads=12)
        out = attention(torch.randn(2, 1 + 196 * 8, 768), frames=8)      # [2, 1569, 768]

    Parameters are ``qkv.weight [3·D, D]``, ``qkv.bias``, ``out.weight [D, D]`` and ``out.bias``: timm's packing.

    Args:
        dim: D.
        heads: H; must divide D.
        qkv_bias, out_bias: whether the two projections have biases.
        device, dtype: device and dtype of the parameters.
    """

    def forward(
        self,
        tokens: Tensor,
        visible: VisibleTokens | None = None,
        *,
        frames: int | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Compute attention inside each frame.

        Args:
            tokens: ``[B, 1+N, D]``, CLS first, then patch-major rows; any float dtype; without autocast that of the
                parameters.
            visible: the tokens of the rows; None: all tokens of ``frames`` frames.
            frames: number of frames, required if ``visible`` is None; must divide N.
            scale: ``[B, steps]``, factors on the result of each frame before CLS takes the mean (stochastic depth),
                none negative; no gradient flows to it. None: ones.

        Returns:
            ``[B, 1+N, D]``. Padding rows (index -1) of a ragged ``visible`` equal the output bias.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        """
        check_tokens("tokens", tokens, self.dim, 1, "qkv.weight", self.qkv)
        visible = check_or_make_visible("tokens", tokens, 1, visible, frames)
        qkv = self._packed(tokens)
        if scale is None:
            return self.out(spatial_attention(qkv, visible).flatten(2))
        check_scale(scale, "[B, steps]", visible.batch, visible.steps, tokens.device)
        # The op takes frame_weight in float32, or in float64 if qkv is float64.
        scale = scale.detach().to(torch.promote_types(qkv.dtype, torch.float32))
        frame_weight, row_scale = frame_weight_and_row_scale(scale, visible)
        update = self.out(spatial_attention(qkv, visible, frame_weight).flatten(2))
        return update * row_scale.to(update.dtype)
