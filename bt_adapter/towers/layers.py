"""The layers of a frozen tower, and the parts of them that the branch's layers share.

Legend: n images, P patches of an image, D width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_adapter.progress import nothing
from bt_adapter.towers import mlp, rows
from bt_adapter.towers.attention import Attention, sdpa
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.fp8 import Fp8Weight
from bt_adapter.towers.products import join, linear
from bt_kernels import linear_add, residual_norm
from bt_kernels.plain import why_not_all_plain

Attend = Callable[[Tensor], Tensor]  # stacked q, k and v, [..., 3, H, E], to [..., H, E]


class ClipAttention(nn.Module):
    """The projections of CLIP's attention: q, k, v and out, each with a bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.eight_bits: Fp8Weight | None = None  # the weights of q, k and v, so that their input is quantised once

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Compute attention among the tokens x, ``[n, s, D]``, calling every projection as a module."""
        parts = [p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)]
        return self.out_proj(attend(torch.stack(parts, -3)).flatten(-2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``[n, s, D]``, each ``[n, s, H, E]``; in one matrix product on devices other than the CPU."""
        if self.eight_bits is not None:
            q, k, v = self.eight_bits.linear(x, self._joined_bias()).chunk(3, -1)
        elif not rows.has_kernels(x):
            q, k, v = (linear(x, p.weight, p.bias) for p in self.projections)
        else:
            q, k, v = linear(x, *self.join_projections()).chunk(3, -1)
        return tuple(y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))

    @property
    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """The projections of q, k and v."""
        return self.q_proj, self.k_proj, self.v_proj

    def join_projections(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias of q, k and v, ``[3D, D]`` and ``[3D]``: see ``products.join``."""
        return join([part.weight for part in self.projections]), self._joined_bias()

    def _joined_bias(self) -> Tensor:
        return join([part.bias for part in self.projections])


class PackedAttention(nn.Module):
    """The same projections with q, k and v in one parameter; used in the branch."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        parts = [nn.Linear(width, width) for _ in range(3)]
        self.qkv_weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv_bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Compute attention among the tokens x, ``[B, rows, D]``, calling the projections."""
        return self.out_proj(attend(self.qkv(x)).flatten(-2))

    def packed_bias(self) -> Tensor:
        """Bias of q, k and v, ``[3D]``."""
        return self.qkv_bias

    def qkv(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., 3, H, E]``, in one matrix product."""
        return F.linear(x, self.qkv_weight, self.qkv_bias).unflatten(-1, (3, self.heads, -1))


class EvaAttention(nn.Module):
    """The projections of EVA's attention: packed qkv, with biases only for q and v."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out_proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv_weight, std=0.02)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Compute attention among the tokens x, ``[..., rows, D]``, calling the projections."""
        return self.out_proj(attend(self.qkv(x)).flatten(-2))

    def packed_bias(self) -> Tensor:
        """Return the bias of q, k and v, ``[3D]``; that of k is zero."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def qkv(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., 3, H, E]``, in one matrix product."""
        return F.linear(x, self.qkv_weight, self.packed_bias()).unflatten(-1, (3, self.heads, -1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``[n, s, D]``, each ``[n, s, H, E]``."""
        packed = linear(x, self.qkv_weight, self.packed_bias()).unflatten(-1, (3, self.heads, -1))
        return packed.unbind(2)


def branch_attention(config: TowerConfig) -> PackedAttention | EvaAttention:
    """Make the projections of an attention of the branch."""
    kind = EvaAttention if config.is_eva else PackedAttention
    return kind(config.hidden_size, config.num_attention_heads)


def _tower_attention(config: TowerConfig) -> ClipAttention | EvaAttention:
    kind = EvaAttention if config.is_eva else ClipAttention
    return kind(config.hidden_size, config.num_attention_heads)


class LayerWeights(nn.Module):
    """The parameters and MLP of a pre-norm transformer layer: of the tower, or a spatial layer of the branch."""

    def __init__(self, config: TowerConfig, eps: float, attention: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps)
        self.attention: Any = attention
        self.norm2 = nn.LayerNorm(config.hidden_size, eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def mlp_weights(self) -> mlp.Weights:
        """Return the parameters of :meth:`mlp`."""
        return mlp.Weights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def mlp(self, x: Tensor) -> Tensor:
        """Compute ``fc2(act(fc1(x)))``, calling both layers as modules."""
        return self.fc2(mlp.activate(self.fc1(x), self.act))


class TowerLayer(LayerWeights):
    """A layer of the tower: attention over all tokens of an image, then the MLP."""

    def __init__(self, config: TowerConfig, eps: float):
        super().__init__(config, eps, _tower_attention(config))
        self.attend: Attention = sdpa
        self.products = "torch"  # or "bt_kernels": see Tower.optimize

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on ``[n, 1+P, D]``; in place on ``x`` without gradients, if every part is plain.

        If gradients are enabled, or a part was replaced or wrapped (``bt_kernels.plain``), each part is called as a
        module, and ``x`` is not changed.

        Raises:
            ValueError: ``products`` is "bt_kernels", but only torch's operators can run on ``x``.
        """
        if not self.is_computed():
            x = x + self.attention(self.norm1(x), self._attend_packed)
            return x + self.mlp(self.norm2(x))
        if rows.find_kernels(x, self.products) is not None:
            return _add_up(*self.advance(x), x)
        attended = self.attend(*self.attention.split(self.norm1(x))).flatten(2)
        out = self.attention.out_proj
        x += linear(attended, out.weight, out.bias)
        del attended
        mlp.add_output_(x, self.norm2(x), self.mlp_weights(), self.act)
        return x

    def is_computed(self) -> bool:
        """Whether the layer is computed from its weights, without gradients, and not by calling its parts."""
        return not torch.is_grad_enabled() and why_not_all_plain(self, PLAIN_PARTS) is None

    def advance(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Run the layer on ``x + update`` (None: on ``x``), with each sum and the LayerNorm after it in one pass.

        Args:
            x: residual stream, ``[n, s, D]``; not changed. update: of the layer before, ``[n, s, D]``.

        Returns:
            The residual stream before the MLP and the MLP's update, ``[n, s, D]`` each: their sum is the result. With
            the products of ``bt_kernels`` the result and None.
        """
        norm1, norm2, out = self.norm1, self.norm2, self.attention.out_proj
        x, n = residual_norm(x, update, norm1.weight, norm1.bias, norm1.eps)
        attended = self.attend(*self.attention.split(n)).flatten(2)
        if self.products == "bt_kernels":
            x = linear_add(attended, out.weight, out.bias, x)
            _, n = residual_norm(x, None, norm2.weight, norm2.bias, norm2.eps)
            return mlp.add_output_in_product(x, n, self.mlp_weights(), self.act), None
        update = linear(attended, out.weight, out.bias)
        x, n = residual_norm(x, update, norm2.weight, norm2.bias, norm2.eps)
        return x, mlp.compute_output(n, self.mlp_weights(), self.act)

    @staticmethod
    def sequence(x: Tensor) -> Tensor:
        """Return the tokens of ``[n, 1+P, D]`` that attend to each other, as a view: all."""
        return x

    @staticmethod
    def finish(x: Tensor) -> Tensor:
        """Return ``x`` after its :meth:`sequence` was changed in place."""
        return x

    def _attend_packed(self, qkv: Tensor) -> Tensor:
        """Compute attention of each token to all s tokens of its image, ``[n, s, 3, H, E]`` to ``[n, s, H, E]``."""
        return self.attend(*qkv.unbind(2))


class SiglipLayer(TowerLayer):
    """A layer of a tower without CLS: the patches attend to each other, and row 0 becomes their mean.

    The branch thus finds a row for the whole frame at the position of CLIP's CLS. No patch reads that row.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer on ``[n, 1+P, D]``, in place under the same conditions as :class:`TowerLayer`."""
        patches = self.sequence(x)
        result = super().forward(patches)
        return self.finish(x) if result is patches else with_mean(result)

    @staticmethod
    def sequence(x: Tensor) -> Tensor:
        """Return the patches."""
        return x[:, 1:]

    @staticmethod
    def finish(x: Tensor) -> Tensor:
        """Set row 0 to the mean of the patches."""
        x[:, 0] = x[:, 1:].mean(1)
        return x


def run_layers(
    layers: Sequence[TowerLayer], x: Tensor, out: Tensor | None = None, done: Callable[[], None] = nothing
) -> Tensor:
    """Run layers one after the other on ``[n, 1+P, D]``, possibly in place.

    On devices other than the CPU each layer's first LayerNorm also adds the update of the layer before it.

    Args:
        out: where to write the result; None: anywhere. done: called after each layer.
    """
    if not layers or not all(layer.is_computed() and rows.has_kernels(x) and is_eager(layer) for layer in layers):
        for layer in layers:
            x = layer(x)
            done()
        return x if out is None else out.copy_(x)
    stream: Tensor = layers[0].sequence(x)
    update: Any = None
    for layer in layers:
        stream, update = layer.advance(stream, update)
        done()
    out = x if out is None else out
    _add_up(stream, update, layers[0].sequence(out))
    return layers[0].finish(out)


def _add_up(x: Tensor, update: Tensor | None, out: Tensor) -> Tensor:
    """Write ``x + update`` (None: x) to ``out`` and return it."""
    return out.copy_(x) if update is None else torch.add(x, update, out=out)


def is_eager(layer: nn.Module) -> bool:
    """Whether ``nn.Module.compile`` was not called on a layer."""
    return getattr(layer, "_compiled_call_impl", None) is None


def with_mean(patches: Tensor) -> Tensor:
    """Prepend the mean to patches ``[n, P, D]``: ``[n, 1+P, D]``."""
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


class PoolingHead(nn.Module):
    """SigLIP's attention-pooling head: a learned query attends to the patches, followed by an MLP."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.attention = ClipAttention(config.hidden_size, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool each of the tokens ``[..., D]`` separately: attention over a sequence of one returns its value."""
        return self._finish(self.attention.out_proj(self.attention.v_proj(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """Pool all tokens of each image, ``[..., P, D]`` to ``[..., D]``."""
        heads = (self.attention.heads, -1)
        query = self.attention.q_proj(self.probe).unflatten(-1, heads)[:, None]
        query = query.expand(*tokens.shape[:-2], *query.shape)
        key, value = (
            part(tokens).unflatten(-1, heads).transpose(-2, -3)
            for part in (self.attention.k_proj, self.attention.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return self._finish(self.attention.out_proj(attended.flatten(-3)))

    def _finish(self, x: Tensor) -> Tensor:
        return x + self.fc2(mlp.activate(self.fc1(self.norm(x)), self.act))


PLAIN_PARTS = (TowerLayer, SiglipLayer, ClipAttention, EvaAttention, Fp8Weight)
