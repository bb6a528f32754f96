"""Kernels for masked temporal attention and token gathering, usable as drop-in ops without ``bt_adapter``.

Every op takes tensors, and those on a video's tokens also a :class:`VisibleTokens`. Every op has a reference
implementation in plain PyTorch, and is registered with ``torch.library`` (``torch.ops.bt_kernels.*``).
``python -m bt_kernels`` lists the backends of each op.
"""

from bt_kernels._dispatch import BackendUnavailable, backend
from bt_kernels.ops.alignment_loss import alignment_loss
from bt_kernels.ops.bias_gelu import bias_gelu
from bt_kernels.ops.gather_embed import gather_embed
from bt_kernels.ops.gather_merge import gather_merge
from bt_kernels.ops.linear_add import linear_add
from bt_kernels.ops.mlp import mlp
from bt_kernels.ops.pool_video_tokens import pool_video_tokens
from bt_kernels.ops.quantize_rows import quantize_rows
from bt_kernels.ops.residual_norm import residual_norm
from bt_kernels.ops.spatial_attention import spatial_attention
from bt_kernels.ops.temporal_attention import temporal_attention
from bt_kernels.visible import VisibleTokens

__all__ = [
    "BackendUnavailable",
    "VisibleTokens",
    "alignment_loss",
    "backend",
    "bias_gelu",
    "gather_embed",
    "gather_merge",
    "linear_add",
    "mlp",
    "pool_video_tokens",
    "quantize_rows",
    "residual_norm",
    "spatial_attention",
    "temporal_attention",
]
