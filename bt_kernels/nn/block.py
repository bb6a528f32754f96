"""A transformer block of divided space-time attention.

Legend: B videos, N visible patch rows of each, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_kernels.nn.attention import SpatialAttention, TemporalAttention, check_or_make_visible, check_tokens
from bt_kernels.nn.stochastic_depth import draw_scale
from bt_kernels.visible import VisibleTokens


def quick_gelu(x: Tensor) -> Tensor:
    """Compute ``x·sigmoid(1.702·x)``, the activation of CLIP."""
    return x * torch.sigmoid(1.702 * x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU with the tanh approximation."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}


class Mlp(nn.Module):
    """A multilayer perceptron, ``fc2(activation(fc1(x)))``."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(activation, str):
            if activation not in _ACTIVATIONS:
                raise ValueError(
                    f"activation must be one of {', '.join(_ACTIVATIONS)} or a function, but is {activation!r}"
                )
            activation = _ACTIVATIONS[activation]
        elif not callable(activation):
            raise TypeError(f"activation must be a name or a function, but is {type(activation).__name__}")
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights of deviation 0.02 and set biases to 0, as the attentions do."""
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to the same shape."""
        return self.fc2(self.activation(self.fc1(x)))

    def extra_repr(self) -> str:
        if isinstance(self.activation, nn.Module):
            return ""
        return f"activation={getattr(self.activation, '__name__', self.activation)}"


class DividedSpaceTimeBlock(nn.Module):
    """Pre-norm block of attention over time, attention in space and an MLP, with residuals. Input has **CLS first**.

    The order of layers and the use of CLS are those of TimeSformer and BT-Adapter. Equivalent to::

        cls, rows = tokens[:, :1], tokens[:, 1:]
        rows = rows + temporal_fc(temporal_attention(temporal_norm(rows)))      # CLS is not changed
        tokens = torch.cat([cls, rows], 1)
        tokens = tokens + spatial_attention(spatial_norm(tokens))
        tokens = tokens + mlp(mlp_norm(tokens))

    Stochastic depth in training draws once for each (video, patch) in time, before ``temporal_fc``, whose bias is never
    dropped; once for each (video, frame) in space, before the mean for CLS; and once for each video's MLP. TimeSformer
    does the same (BT-Adapter does not drop the MLP).

    A new block does not change tokens in time, because ``temporal_fc`` is initialised to zero: inserted into a
    pretrained image model, it keeps the results of the frames. Example::

        block = DividedSpaceTimeBlock(dim=768, heads=12)
        tokens = torch.randn(2, 1 + 196 * 8, 768)                        # CLS, then row k·8 + t: patch k of frame t
        tokens = block(tokens, frames=8)                                 # [2, 1569, 768]
        tokens = block(tokens[:, :473], VisibleTokens.tube(2, 196, 8, ratio=0.7))   # CLS and 59 tubes of 8 frames

    Children, with their names in the state dict: ``temporal_norm``, ``temporal_attention.{qkv,out}``, ``temporal_fc``,
    ``spatial_norm``, ``spatial_attention.{qkv,out}``, ``mlp_norm``, ``mlp.{fc1,fc2}``.

    Args:
        dim: D.
        heads: H of both attentions; must divide D.
        mlp_ratio: the hidden width of the MLP is ``int(mlp_ratio · D)``.
        qkv_bias, out_bias: whether the attentions' projections have biases.
        activation: of the MLP: "gelu", "gelu_tanh", "quick_gelu" (CLIP's), "relu", "silu", or a function or module.
        norm_eps: epsilon of the LayerNorms.
        drop_path: rate of stochastic depth, in [0, 1).
        temporal_fc: whether a linear layer follows the temporal attention's output projection.
        device, dtype: device and dtype of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        out_bias: bool = True,
        activation: str | Callable[[Tensor], Tensor] = "gelu",
        norm_eps: float = 1e-6,
        drop_path: float = 0.0,
        temporal_fc: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), but is {drop_path}")
        self.temporal_attention = TemporalAttention(dim, heads, qkv_bias, out_bias, device, dtype)
        self.temporal_norm = nn.LayerNorm(dim, norm_eps, device=device, dtype=dtype)
        self.temporal_fc = nn.Linear(dim, dim, device=device, dtype=dtype) if temporal_fc else nn.Identity()
        self.spatial_norm = nn.LayerNorm(dim, norm_eps, device=device, dtype=dtype)
        self.spatial_attention = SpatialAttention(dim, heads, qkv_bias, out_bias, device, dtype)
        self.mlp_norm = nn.LayerNorm(dim, norm_eps, device=device, dtype=dtype)
        if int(mlp_ratio * dim) < 1:
            raise ValueError(f"mlp_ratio must give the MLP at least one unit for dim = {dim}, but is {mlp_ratio}")
        self.mlp = Mlp(dim, int(mlp_ratio * dim), activation, device, dtype)
        self.dim = dim
        self.drop_path = drop_path
        self._zero_temporal_fc()

    def reset_parameters(self) -> None:
        """Initialise every parameter as in a new block, for example after ``to_empty`` of a block made on ``meta``."""
        for child in self.children():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
        self._zero_temporal_fc()

    def _zero_temporal_fc(self) -> None:
        for parameter in self.temporal_fc.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, visible: VisibleTokens | None = None, *, frames: int | None = None) -> Tensor:
        """Run the block.

        Args:
            tokens: ``[B, 1+N, D]``, CLS first, then patch-major rows; any float dtype; without autocast that of the
                parameters. Padding rows of a ragged ``visible`` do not affect other rows, but must be finite in
                training (the gradient of a weight sums over all rows).
            visible: the tokens of the rows; None: all tokens of ``frames`` frames.
            frames: number of frames, required if ``visible`` is None; must divide N.

        Returns:
            ``[B, 1+N, D]``.

        Raises:
            ValueError, TypeError: a shape, dtype or device does not match; the message names the argument.
        """
        check_tokens("tokens", tokens, self.dim, 1, "temporal_norm.weight", self.temporal_norm)
        visible = check_or_make_visible("tokens", tokens, 1, visible, frames)
        cls, rows = tokens[:, :1], tokens[:, 1:]
        update = self.temporal_attention(
            self.temporal_norm(rows), visible, scale=self._scale(visible.sequences, visible, tokens)
        )
        tokens = torch.cat([cls, rows + self.temporal_fc(update)], 1)
        tokens = tokens + self.spatial_attention(
            self.spatial_norm(tokens), visible, scale=self._scale(visible.steps, visible, tokens)
        )
        update = self.mlp(self.mlp_norm(tokens))
        scale = self._scale(1, visible, tokens)
        if scale is not None:
            update = update * scale[:, :, None].to(update.dtype)
        return tokens + update

    def _scale(self, count: int, visible: VisibleTokens, like: Tensor) -> Tensor | None:
        """Draw factors of stochastic depth, ``[B, count]``; None if nothing is dropped."""
        if not self.training or self.drop_path == 0:
            return None
        return draw_scale(self.drop_path, visible.batch, count, like)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, drop_path={self.drop_path}"
