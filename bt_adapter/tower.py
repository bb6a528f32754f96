"""The frozen tower: a CLIP, EVA-CLIP, SigLIP or DINOv2 vision transformer, layer by layer.

Legend: n images, P patches of an image, R registers (of DINOv2; 0 elsewhere), in rows CLS, patches, registers; D width,
H heads, E head width, F width of the shared video-text space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_adapter.config import TowerConfig
from bt_adapter.cuda_graph import Recorded
from bt_adapter.fp8 import Fp8Weight
from bt_adapter.fused import mlp
from bt_adapter.products import linear
from bt_adapter.progress import nothing
from bt_kernels.plain import why_not_all_plain

Attend = Callable[[Tensor], Tensor]  # q, k and v side by side, [..., 3, H, E], to [..., H, E]


class ClipAttention(nn.Module):
    """Projections of CLIP's attention: q, k, v and out, each with a bias."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attention among the tokens x, ``[n, s, D]`` to the same shape, by calling every projection as a module."""
        parts = [p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)]
        return self.out_proj(attend(torch.stack(parts, -3)).flatten(-2))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``[n, s, D]``, each ``[n, H, s, E]``."""
        q, k, v = (linear(x, p.weight, p.bias) for p in (self.q_proj, self.k_proj, self.v_proj))
        return tuple(y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))


class PackedAttention(nn.Module):
    """The same projections with q, k and v in one parameter, as the branch holds them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        parts = [nn.Linear(width, width) for _ in range(3)]
        self.qkv_weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv_bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attention among the tokens x, ``[B, rows, D]`` to the same shape, by calling the projections."""
        return self.out_proj(attend(self.qkv(x)).flatten(-2))

    def packed_bias(self) -> Tensor:
        """Bias of q, k and v, ``[3D]``."""
        return self.qkv_bias

    def qkv(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., 3, H, E]``, in one matrix product."""
        return F.linear(x, self.qkv_weight, self.qkv_bias).unflatten(-1, (3, self.heads, -1))


class EvaAttention(nn.Module):
    """Projections of EVA's attention: packed qkv, biases on q and v alone."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv_weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.out_proj = nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv_weight, std=0.02)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """Attention among the tokens x, ``[..., rows, D]`` to the same shape, by calling the projections."""
        return self.out_proj(attend(self.qkv(x)).flatten(-2))

    def packed_bias(self) -> Tensor:
        """Bias of q, k and v, ``[3D]``; k's is zero."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def qkv(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., 3, H, E]``, in one matrix product."""
        return F.linear(x, self.qkv_weight, self.packed_bias()).unflatten(-1, (3, self.heads, -1))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of ``[n, s, D]``, each ``[n, H, s, E]``."""
        packed = linear(x, self.qkv_weight, self.packed_bias()).unflatten(-1, (3, self.heads, -1))
        return packed.permute(2, 0, 3, 1, 4).unbind(0)


def branch_attention(config: TowerConfig) -> PackedAttention | EvaAttention:
    """The projections of the branch's attentions."""
    kind = EvaAttention if config.is_eva else PackedAttention
    return kind(config.hidden_size, config.num_attention_heads)


def _tower_attention(config: TowerConfig) -> ClipAttention | EvaAttention:
    kind = EvaAttention if config.is_eva else ClipAttention
    return kind(config.hidden_size, config.num_attention_heads)


class LayerWeights(nn.Module):
    """Parameters of a pre-norm transformer layer, and its MLP: of the tower's layers and the branch's spatial ones."""

    def __init__(self, config: TowerConfig, eps: float, attention: nn.Module):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps)
        self.attention: Any = attention
        self.norm2 = nn.LayerNorm(config.hidden_size, eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def mlp_weights(self) -> mlp.Weights:
        """The parameters of :meth:`mlp`."""
        return mlp.Weights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def mlp(self, x: Tensor) -> Tensor:
        """``fc2(act(fc1(x)))``, by calling both layers as modules."""
        return self.fc2(mlp.activate(self.fc1(x), self.act))


class TowerLayer(LayerWeights):
    """One layer of the tower: every token attends to all of its image, then the MLP."""

    def __init__(self, config: TowerConfig, eps: float):
        super().__init__(config, eps, _tower_attention(config))

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1+P, D]`` to the same shape. Without gradients, and where every part is plain, written over ``x``.

        Where gradients are enabled, or a part was replaced or wrapped (``bt_kernels.plain``), each part is called as a
        module, and ``x`` stays as it is.
        """
        if torch.is_grad_enabled() or why_not_all_plain(self, PLAIN_PARTS) is not None:
            x = x + self.attention(self.norm1(x), _attend_within_images)
            return x + self.mlp(self.norm2(x))
        attended = F.scaled_dot_product_attention(*self.attention.split(self.norm1(x))).transpose(1, 2).flatten(2)
        out = self.attention.out_proj
        x += linear(attended, out.weight, out.bias)
        del attended
        mlp.add_(x, self.norm2(x), self.mlp_weights(), self.act)
        return x


class SiglipLayer(TowerLayer):
    """A layer of a tower without CLS: the patches attend to each other, and row 0 becomes their mean.

    So the branch finds a row for the whole frame in the place where CLIP has its CLS. No patch ever reads that row.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1+P, D]`` to the same shape, written over ``x`` where :class:`TowerLayer` would do so."""
        patches = x[:, 1:]
        result = super().forward(patches)
        if result is not patches:
            return _with_mean(result)
        x[:, 0] = patches.mean(1)
        return x


def _with_mean(patches: Tensor) -> Tensor:
    """Patches ``[n, P, D]`` with their mean before them, ``[n, 1+P, D]``."""
    return torch.cat([patches.mean(1, keepdim=True), patches], 1)


class PoolingHead(nn.Module):
    """SigLIP's attention-pooling head: a learned query attends to the patches, and an MLP stands behind it."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(config.hidden_size) * 0.02)
        self.attention = ClipAttention(config.hidden_size, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.act = config.hidden_act

    def forward(self, tokens: Tensor) -> Tensor:
        """Each of the tokens ``[..., D]`` pooled by itself: attention over a sequence of one returns its value."""
        return self._finish(self.attention.out_proj(self.attention.v_proj(tokens)))

    def pool(self, tokens: Tensor) -> Tensor:
        """All tokens of each image, ``[..., P, D]``, pooled to ``[..., D]``."""
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


def _attend_within_images(qkv: Tensor) -> Tensor:
    """``[n, s, 3, H, E]`` to ``[n, s, H, E]``: each token attends to all s tokens of its image."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class Tower(nn.Module):
    """A frozen CLIP, EVA-CLIP, SigLIP or DINOv2 vision tower on single images.

    With ``only_layers`` = (first, stop) it holds these layers alone and no embeddings, final norm or projection: what
    a model of stored features needs. It never trains: ``requires_grad_(True)`` leaves its own parameters frozen and
    ``train()`` leaves it in evaluation mode. What is put into it later may learn: where a parameter in it (an
    adapter's, say) or the images ask for a gradient, they get one, at the price of keeping every layer's activations.
    """

    def __init__(self, config: TowerConfig, only_layers: tuple[int, int] | None = None):
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.layer_norm_eps
        self.first_layer, stop = only_layers or (0, config.num_hidden_layers)
        layer = SiglipLayer if config.is_siglip else TowerLayer
        self.layers = nn.ModuleList(layer(config, eps) for _ in range(self.first_layer, stop))
        self.position = nn.Parameter(torch.randn(1 + config.patches, width) * 0.02)
        if only_layers is None:
            is_clip = config.model_type == "clip_vision_model"
            if not config.is_siglip:
                self.class_embedding = nn.Parameter(torch.randn(width) * 0.02)
            if config.num_register_tokens:
                self.registers = nn.Parameter(torch.randn(config.num_register_tokens, width) * 0.02)
            self.patch_embedding = nn.Conv2d(3, width, config.patch_size, config.patch_size, bias=not is_clip)
            self.pre_norm = nn.LayerNorm(width, eps) if is_clip else nn.Identity()
            self.final_norm = nn.LayerNorm(width, eps)
            if config.projection_dim is not None:
                self.projection: Any = (
                    PoolingHead(config)
                    if config.is_siglip
                    else nn.Linear(width, config.projection_dim, bias=config.is_eva)
                )
        self.chunk = 32
        self._recorded: Recorded | None = None
        self.shared_from: list[Any] = []  # whose tensors these are, where they are another model's (chat/pairing.py)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Tower:
        """Stay in evaluation mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Tower:
        """Stay frozen."""
        return super().requires_grad_(False)

    def fingerprint(self) -> dict[str, float]:
        """Lengths of some weights: what tells one CLIP from another of the same shape, in any precision."""
        last = len(self.layers) - 1
        chosen = ("position", "class_embedding", "layers.0.fc1.weight", f"layers.{last}.fc1.weight")
        weights = dict(self.named_parameters())
        return {name: weights[name].detach().float().norm().item() for name in chosen if name in weights}

    @property
    def is_fp8(self) -> bool:
        """Whether :meth:`optimize` turned the layers' weights into 8 bits."""
        return any(isinstance(module, Fp8Weight) for module in self.layers.modules())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.position.dtype

    def optimize(
        self,
        dtype: torch.dtype | None = None,
        chunk: int | None = None,
        compile: bool = False,
        graphs: bool = False,
        fp8: bool = False,
    ) -> Tower:
        """Choose how the tower runs; what is not given stays as it is.

        Args:
            dtype: of the weights from now on, for example ``torch.bfloat16``. Not for a tower shared with a chat model:
                its weights would change too, and the rest of it would not.
            chunk: images that run at once, 32 unless chosen. It bounds what a layer needs beside the state of all
                images: about 7 rows of D a token of the chunk, and what attention takes.
            compile: ``torch.compile`` each layer, once for each shape.
            graphs: record CUDA graphs, one for each shape of a chunk; call again after the weights were moved.
            fp8: products with 8-bit weights and rows; for GPUs of compute capability 8.9 or more. There is no way back.

        Raises:
            ValueError: ``chunk`` is not positive, ``graphs`` is asked for and there is no CUDA device, or ``fp8`` and
                a layer was replaced or wrapped.
        """
        if chunk is not None:
            if chunk < 1:
                raise ValueError(f"chunk must be a positive int, but is {chunk}")
            self.chunk = chunk
        if dtype is not None:
            self.to(dtype)
        if fp8:
            if (reason := why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList))) is not None:
                raise ValueError(f"fp8 needs the tower's layers as they were built, but {reason}")
            weights = [
                (module, name, weight)
                for module in self.layers.modules()
                for name in ("weight", "qkv_weight")
                if isinstance(weight := getattr(module, name, None), nn.Parameter) and weight.ndim == 2
            ]
            for (module, name, _), small in zip(weights, [Fp8Weight(w) for _, _, w in weights], strict=True):
                delattr(module, name)
                setattr(module, name, small)
        if compile:
            for layer in self.layers:
                layer.compile()
        if graphs:
            if self.position.device.type != "cuda":
                raise ValueError(f"graphs needs the tower on a CUDA device, but it is on {self.position.device}")
            self._recorded = Recorded()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images ``[n, 3, h, w]`` to the input of layer 0, ``[n, 1+P+R, D]``."""
        patches = self.patch_embedding(images.to(self.dtype)).flatten(2).transpose(1, 2)
        if self.config.is_siglip:
            return _with_mean(patches + self.position[1:])
        cls = self.class_embedding.expand(len(images), 1, -1)
        rows = self.pre_norm(torch.cat([cls, patches], 1) + self.position)
        if self.config.num_register_tokens:
            rows = torch.cat([rows, self.registers.expand(len(images), -1, -1)], 1)
        return rows

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.position.device

    def learns(self, images: Tensor) -> bool:
        """Whether a gradient is asked for: of ``images`` (or tokens of them), or of a parameter inside the tower."""
        asked = torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in self.parameters()))
        if asked and self.is_fp8:
            raise ValueError("a tower in 8 bits (optimize(fp8=True)) gives no gradients, but one is asked for")
        return asked

    def run(self, images: Tensor, stop: int, done: Callable[[], None] = nothing) -> Tensor:
        """Normalised images ``[n, 3, h, w]`` to the input of layer ``stop``, a chunk at a time: ``[n, 1+P+R, D]``.

        ``done`` is called as each chunk leaves a layer.
        """
        learns = self.learns(images)

        def first_layers(piece: Tensor) -> Tensor:
            x = self.embed(piece)
            for layer in range(stop):
                x = self.layers[layer](x)
                if learns or self._recorded is None:  # a recording calls nothing when it is replayed
                    done()
            return x

        if learns:
            return torch.cat([first_layers(piece) for piece in images.split(self.chunk)])
        with torch.no_grad():
            recorded = self._replays()
            if len(images) <= self.chunk and not recorded:
                return first_layers(images)
            state = self.position.new_empty(len(images), self.config.rows, self.config.hidden_size)
            for start in range(0, len(images), self.chunk):
                piece = images[start : start + self.chunk]
                state[start : start + self.chunk] = self._run(("first", stop), first_layers, piece, recorded)
                for _ in range(0 if self._recorded is None else stop):
                    done()
            return state

    def run_layer(self, layer: int, x: Tensor, done: Callable[[], None] = nothing) -> Tensor:
        """Output of layer ``layer`` (0-based in the whole tower) on ``[n, 1+P+R, D]``.

        Written over ``x``, unless gradients are asked for (:meth:`learns`).
        """
        module = self.layers[layer - self.first_layer]
        if self.learns(x):
            results = []
            for piece in x.split(self.chunk):
                results.append(module(piece))
                done()
            return torch.cat(results)
        with torch.no_grad():
            recorded = self._replays()
            for piece in x.split(self.chunk):
                result = self._run(layer, module, piece, recorded)
                if result is not piece:
                    piece.copy_(result)
                done()
        return x

    def chunks(self, images: int) -> int:
        """How many chunks that many images make."""
        return -(-images // self.chunk)

    def _replays(self) -> bool:
        """Whether recordings serve. One made before a layer was wrapped or replaced would leave that out."""
        return self._recorded is not None and why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList)) is None

    def _run(self, name: Any, function: Callable[[Tensor], Tensor], piece: Tensor, recorded: bool) -> Tensor:
        if recorded and self._recorded is not None:
            return self._recorded(name, function, piece)
        return function(piece)

    def project(self, tokens: Tensor) -> Tensor:
        """``[..., D]`` to the shared space ``[..., F]``, without the final LayerNorm.

        Of a SigLIP: each token through the pooling head by itself.

        Raises:
            ValueError: the tower has no projection (``projection_dim`` None).
        """
        if self.config.projection_dim is None:
            raise ValueError("this tower has no projection (projection_dim is None): only video_tokens can be computed")
        return self.projection(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Last state of each image, ``[..., 1+P, D]``, to the image model's own embedding of it, ``[..., F]``.

        After the final LayerNorm CLIP and EVA-CLIP project the CLS; SigLIP's pooling head attends to all patches.

        Raises:
            ValueError: as :meth:`project`.
        """
        if self.config.is_siglip and self.config.projection_dim is not None:
            return self.projection.pool(self.final_norm(tokens[..., 1:, :]))
        return self.project(self.final_norm(tokens[..., 0, :]))

    def image_embeds(self, images: Tensor) -> Tensor:
        """Embeddings of single images, ``[n, 3, h, w]`` to ``[n, F]``: those of the model without a branch."""
        return self.pool(self.run(images, len(self.layers)))
