"""The comparison of ``bench/step.py``: the same model written the way the public reference code is built.

Separate q, k and v; tokens rearranged for each attention; CLS repeated into every frame, cut off and joined again;
tokens chosen by a boolean index; norms, gates and activations one by one. ``sdpa`` and ``checkpoint`` are its
simplest improvements. Numbers: ``tests/test_step.py`` holds it against golden results of the reference itself.

Legend: B videos, T frames, P patches, N visible tokens, D width, S frames of the visible grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bt_adapter import BTAdapterVisionModel
from bt_adapter.model.losses import contrastive_loss


@dataclass
class Options:
    """Improvements of the published structure: fused attention, and layers recomputed in backward."""

    sdpa: bool = False
    checkpoint: bool = False


class Attention(nn.Module):
    """Self-attention of ``[n, s, D]``."""

    def __init__(self, weights: tuple[Tensor, ...], heads: int, options: Options):
        super().__init__()
        parts = [linear(w, b) for w, b in zip(weights[0].chunk(3), weights[1].chunk(3), strict=True)]
        self.q, self.k, self.v = parts
        self.out = linear(*weights[2:])
        self.heads, self.options = heads, options

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        each = width // self.heads

        def split(y: Tensor) -> Tensor:
            return y.view(count, length, self.heads, each).transpose(1, 2).contiguous()

        if self.options.sdpa:
            mixed = F.scaled_dot_product_attention(split(self.q(x)), split(self.k(x)), split(self.v(x)))
        else:
            q, k, v = (
                split(y).view(count * self.heads, length, each) for y in (self.q(x) * each**-0.5, self.k(x), self.v(x))
            )
            weights = F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1)
            mixed = torch.bmm(weights, v).view(count, self.heads, length, each)
        return self.out(mixed.transpose(1, 2).reshape(count, length, width))


class TemporalLayer(nn.Module):
    def __init__(self, layer: nn.Module, options: Options):
        super().__init__()
        self.norm = norm(layer.norm)
        self.attention = Attention(attention_weights(layer.attention), layer.attention.heads, options)
        self.fc = linear(layer.fc.weight, layer.fc.bias)

    def forward(self, z: Tensor, frames: int) -> Tensor:
        cls, rows = z[:, :1], z[:, 1:]
        batch, tokens, width = rows.shape
        rows = rows.reshape(-1, frames, width)
        update = self.attention(self.norm(rows)).reshape(batch, tokens, width)
        rows = rows.reshape(batch, tokens, width) + self.fc(update)
        return torch.cat([cls, rows], 1)


class Block(nn.Module):
    """A tower's layer on ``[n, s, D]``; the branch's spatial layers hold the same parameters."""

    def __init__(self, layer: nn.Module, options: Options):
        super().__init__()
        self.norm1, self.norm2 = norm(layer.norm1), norm(layer.norm2)
        self.attention = Attention(attention_weights(layer.attention), layer.attention.heads, options)
        self.fc1, self.fc2 = linear(layer.fc1.weight, layer.fc1.bias), linear(layer.fc2.weight, layer.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(x)

    def mlp(self, x: Tensor) -> Tensor:
        x = self.fc1(self.norm2(x))
        x = x * torch.sigmoid(1.702 * x)
        return self.fc2(x)


class SpatialLayer(Block):
    def forward(self, z: Tensor, frames: int) -> Tensor:
        cls, rows = z[:, :1], z[:, 1:]
        batch, tokens, width = rows.shape
        groups = tokens // frames
        repeated = cls.repeat(1, frames, 1).view(batch * frames, 1, width)
        rows = rows.view(batch, groups, frames, width).transpose(1, 2).reshape(batch * frames, groups, width)
        update = self.attention(self.norm1(torch.cat([repeated, rows], 1)))
        cls_update = update[:, 0].view(batch, frames, width).mean(1, keepdim=True)
        update = update[:, 1:].view(batch, frames, groups, width).transpose(1, 2).reshape(batch, tokens, width)
        z = z + torch.cat([cls_update, update], 1)
        return z + self.mlp(z)


class Baseline(nn.Module):
    """A copy of a CLIP model's weights in the reference's structure."""

    def __init__(self, model: BTAdapterVisionModel, options: Options | None = None):
        super().__init__()
        self.options = options = options or Options()
        tower, branch = model.tower, model.branch
        self.tower = nn.ModuleList(Block(layer, options) for layer in tower.layers)
        self.patch_embedding = nn.Conv2d(3, *tower.patch_embedding.weight.shape[:1], tower.config.patch_size,
                                         tower.config.patch_size, bias=False)  # fmt: skip
        self.patch_embedding.weight = copy(tower.patch_embedding.weight)
        self.class_embedding, self.position = copy(tower.class_embedding), copy(tower.position)
        self.pre_norm, self.final_norm = norm(tower.pre_norm), norm(tower.final_norm)
        if tower.config.projection_dim is not None:  # the towers of chat models bring none
            self.projection = nn.Linear(1, 1, bias=False)
            self.projection.weight = copy(tower.projection.weight)
        self.requires_grad_(False)
        self.temporal = nn.ModuleList(TemporalLayer(layer, options) for layer in branch.temporal)
        self.spatial = nn.ModuleList(SpatialLayer(layer, options) for layer in branch.spatial)
        self.cls_token, self.time = copy(branch.cls_token), copy(branch.time)
        self.merge_gate, self.output_gate = copy(branch.merge_gate), copy(branch.output_gate)
        self.slopes = branch.config.merge_gate_slope, branch.config.output_gate_slope
        self.head = None
        if branch.alignment_head is not None:
            first, second = branch.alignment_head
            self.head = nn.Sequential(linear(first.weight, first.bias), norm(second))
        self.first = tower.config.num_hidden_layers - branch.config.depth

    def forward(self, pixels: Tensor, text: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """The three losses. ``mask``: bool ``[B, P·T]``, True where the branch sees none of the tokens, patch by patch.

        Alignment takes the tower's tokens frame by frame and applies the same mask, as the reference does.
        """
        batch, frames = pixels.shape[:2]
        states = self.states(pixels)
        x = states[-1]
        z = self.branch(states, frames, mask)
        tower_cls = x[:, 0].view(batch, frames, -1)
        gate = torch.sigmoid(self.slopes[1] * self.output_gate)
        cls = (1 - gate) * z[:, :1].repeat(1, frames, 1) + gate * tower_cls
        video = self.projection(self.final_norm(cls)).mean(1)
        losses = {
            "vtc": contrastive_loss(video, text, 0.01),
            "mbca": 0.1 * contrastive_loss(self.projection(z[:, 1:].mean(1)), text, 0.01),
        }
        if self.head is not None:
            rows = x[:, 1:].reshape(batch, -1, x.shape[-1])
            rows = rows if mask is None else rows[~mask].view(batch, -1, x.shape[-1])
            target = self.projection(self.final_norm(rows))
            cosine = F.cosine_similarity(self.head(z[:, 1:]), target, dim=-1)
            losses["mbta"] = 0.1 * (2 - 2 * cosine).mean()
        return losses

    @torch.no_grad()
    def states(self, pixels: Tensor) -> list[Tensor]:
        """Outputs of the tower's layers beside the branch."""
        x = self.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(x), 1, -1)
        x = self.pre_norm(torch.cat([cls, x], 1) + self.position)
        states = []
        for number, layer in enumerate(self.tower):
            x = layer(x)
            if number >= self.first:
                states.append(x)
        return states

    @torch.no_grad()
    def video_tokens(self, pixels: Tensor) -> Tensor:
        """Compute the video tokens for a chat model, ``[B, 1+P, D]``, CLS last;.

        Neighbouring frames beyond the time table are averaged.
        """
        batch, frames = pixels.shape[:2]
        states = [x.view(batch, frames, *x.shape[1:]) for x in self.states(pixels)[:-1]]
        steps = frames
        while steps > len(self.time):
            steps //= 2
            states = [x.view(batch, steps, 2, *x.shape[2:]).mean(2) for x in states]
        z = self.branch([x.flatten(0, 1) for x in states], steps, None)
        x = states[-1].mean(1)
        rows = z[:, 1:].view(batch, -1, steps, z.shape[-1]).mean(2)
        return torch.cat([(x[:, 1:] + rows) / 2, (x[:, :1] + z[:, :1]) / 2], 1)

    def branch(self, states: list[Tensor], frames: int, mask: Tensor | None) -> Tensor:
        """The branch's last state from the tower's, ``[B·T, 1+P, D]`` each."""
        z = self.embed(states[0], frames, mask)
        for number, x in enumerate(states):
            if number:
                cls = x[:, 0].view(-1, frames, x.shape[-1]).mean(1, keepdim=True)
                tokens = torch.cat([cls, self.tokens(x, frames, mask)], 1)
                gate = torch.sigmoid(self.slopes[0] * self.merge_gate)
                z = (1 - gate) * z + gate * tokens
            for layer in (self.temporal[number], self.spatial[number]):
                z = checkpoint(layer, z, frames, use_reentrant=False) if self.options.checkpoint else layer(z, frames)
        return z

    def embed(self, x: Tensor, frames: int, mask: Tensor | None) -> Tensor:
        batch, width = len(x) // frames, x.shape[-1]
        own = self.cls_token.expand(batch, 1, -1) + self.position[:1]
        cls = (x[:, 0].view(batch, frames, width).mean(1, keepdim=True) + own) / 2
        rows = (x[:, 1:] + self.position[1:]).view(batch, frames, -1, width).transpose(1, 2).reshape(-1, frames, width)
        rows = (rows + self.time[:frames]).reshape(batch, -1, width)
        return torch.cat([cls, rows if mask is None else rows[~mask].view(batch, -1, width)], 1)

    def tokens(self, x: Tensor, frames: int, mask: Tensor | None) -> Tensor:
        """Visible patch tokens, patch by patch."""
        batch, width = len(x) // frames, x.shape[-1]
        rows = x[:, 1:].view(batch, frames, -1, width).transpose(1, 2).reshape(batch, -1, width)
        return rows if mask is None else rows[~mask].view(batch, -1, width)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(1, 1)
    layer.weight, layer.bias = copy(weight), copy(bias)
    return layer


def norm(layer: nn.LayerNorm) -> nn.LayerNorm:
    own = nn.LayerNorm(layer.normalized_shape, layer.eps)
    own.weight, own.bias = copy(layer.weight), copy(layer.bias)
    return own


def copy(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def attention_weights(attention: nn.Module) -> tuple[Tensor, ...]:
    """Packed qkv weight and bias, and the output projection's."""
    out = attention.out_proj.weight, attention.out_proj.bias
    if hasattr(attention, "qkv_weight"):
        return attention.qkv_weight, attention.qkv_bias, *out
    parts = attention.q_proj, attention.k_proj, attention.v_proj
    return torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts]), *out
