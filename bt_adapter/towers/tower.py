"""The frozen tower: a CLIP, EVA-CLIP, SigLIP or DINOv2 vision transformer, layer by layer.

Legend: n images, P patches of an image, R registers (of DINOv2; 0 elsewhere), in rows CLS, patches, registers; D width,
H heads, E head width, F width of the shared video-text space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from bt_adapter.progress import nothing
from bt_adapter.towers import rows
from bt_adapter.towers.attention import find_attention
from bt_adapter.towers.config import TowerConfig
from bt_adapter.towers.cuda_graph import GraphCache
from bt_adapter.towers.fp8 import Fp8Weight
from bt_adapter.towers.layers import (
    PLAIN_PARTS,
    ClipAttention,
    PoolingHead,
    SiglipLayer,
    TowerLayer,
    is_eager,
    run_layers,
    with_mean,
)
from bt_kernels import residual_norm
from bt_kernels.plain import is_plain, why_not_all_plain


@contextmanager
def _frozen(x: Tensor) -> Iterator[None]:
    """Compute without gradients, and in the tower's own dtype instead of autocast's.

    CUDA's autocast returns float32 from every LayerNorm, so that the residual stream would be in float32.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


class Tower(nn.Module):
    """A frozen CLIP, EVA-CLIP, SigLIP or DINOv2 vision tower on single images.

    With ``only_layers`` = (first, stop) it holds only these layers, without embeddings, final norm and projection, as
    needed for stored features. It never trains: ``requires_grad_(True)`` leaves its own parameters frozen and
    ``train()`` leaves it in evaluation mode. Modules added later, such as adapters, may train: if a parameter or the
    images require a gradient, they get one, at the cost of storing every layer's activations. Without gradients it
    computes in its own dtype and ignores autocast; with gradients autocast applies to it.
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
        self.graphs: GraphCache | None = None
        self.shared_from: list[Any] = []  # identities of a chat model's tensors, if shared (chat/pairing.py)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> Tower:
        """Stay in evaluation mode."""
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Tower:
        """Stay frozen."""
        return super().requires_grad_(False)

    def fingerprint(self) -> dict[str, float]:
        """Return the norms of some weights, which distinguish CLIPs of the same shape in any precision."""
        last = len(self.layers) - 1
        chosen = ("position", "class_embedding", "layers.0.fc1.weight", f"layers.{last}.fc1.weight")
        weights = dict(self.named_parameters())
        return {name: weights[name].detach().float().norm().item() for name in chosen if name in weights}

    @property
    def is_fp8(self) -> bool:
        """Whether :meth:`optimize` converted the layers' weights to 8 bits."""
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
        attention: str | None = None,
        products: str | None = None,
    ) -> Tower:
        """Set options of the tower's execution; options that are not given do not change.

        Args:
            dtype: new dtype of the weights, for example ``torch.bfloat16``. Not for a tower shared with a chat model,
                whose tower weights would change too, but not its other weights.
            chunk: number of images per batch, initially 32. It limits a layer's memory in addition to the state of all
                images: about 7 rows of D per token of the chunk on a CPU and 12 elsewhere, and the memory of attention.
            compile: ``torch.compile`` each layer, once per shape.
            graphs: record CUDA graphs, one per shape of a chunk, and for ``video_tokens`` of a model one of tower and
                branch together; set it again after moving the weights of either.
            fp8: products with 8-bit weights and inputs, for GPUs of compute capability 8.9 or more. It cannot be
                undone.
            attention: library of the attention: "sdpa" (torch's, initially), "flash-attn" or "xformers", the last two
                on CUDA devices and for the dtype that the tower has then.
            products: library of the products of the MLP and behind attention, without gradients: "torch" (initially),
                or "bt_kernels", whose products activate, or add onto the residual stream, before they write. They move
                less memory; whether they are faster has not been measured. For GPUs, and neither with ``compile`` nor
                with ``fp8``. A layer that is wrapped later calls its parts, as always.

        Raises:
            ValueError: ``chunk`` is not positive, ``graphs`` is True without a CUDA device, ``fp8`` is True and a layer
                was replaced or wrapped, the package of ``attention`` is absent or does not support the tower, or
                ``products`` is unknown or cannot be "bt_kernels" together with the other options.
        """
        self._check_products(self.products if products is None else products, compile, fp8)
        if chunk is not None:
            if chunk < 1:
                raise ValueError(f"chunk must be a positive int, but is {chunk}")
            self.chunk = chunk
        if dtype is not None:
            self.to(dtype)
        if attention is not None:
            attend = find_attention(attention, self.device, self.dtype)
            for tower_layer in cast(list[TowerLayer], list(self.layers)):
                tower_layer.attend = attend
        if products is not None and products != self.products:
            for tower_layer in cast(list[TowerLayer], list(self.layers)):
                tower_layer.products = products
            self.graphs = None if self.graphs is None else GraphCache()  # which recorded the other products
        if fp8:
            if (reason := why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList))) is not None:
                raise ValueError(f"fp8 needs unmodified tower layers, but {reason}")
            self._convert_to_eight_bits()
        if self.device.type != "cpu" and why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList)) is None:
            for layer in self.layers:
                if isinstance(layer.attention, ClipAttention) and layer.attention.eight_bits is None:
                    layer.attention.join_projections()
        if compile:
            for layer in self.layers:
                layer.compile()
        if graphs:
            if self.position.device.type != "cuda":
                raise ValueError(f"graphs needs the tower on a CUDA device, but it is on {self.position.device}")
            self.graphs = GraphCache()
        return self

    @property
    def products(self) -> str:
        """Whose products the layers call, "torch" or "bt_kernels": see :meth:`optimize`."""
        return next((layer.products for layer in cast(list[TowerLayer], list(self.layers))), "torch")

    def _check_products(self, products: str, compile: bool, fp8: bool) -> None:
        """Raise a ValueError unless ``products`` is known and can be had together with the other options."""
        if products not in ("torch", "bt_kernels"):
            raise ValueError(f"products must be 'torch' or 'bt_kernels', but is {products!r}")
        if products == "torch":
            return
        if self.device.type == "cpu":
            raise ValueError("products='bt_kernels' needs the tower on a GPU, but it is on the CPU")
        if fp8 or self.is_fp8:
            raise ValueError("products='bt_kernels' has no 8-bit weights, but fp8 is set")
        if compile or not all(map(is_eager, self.layers)):
            raise ValueError("products='bt_kernels' is for layers that are not compiled, but compile is set")
        if (reason := why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList))) is not None:
            raise ValueError(f"products='bt_kernels' needs unmodified tower layers, but {reason}")

    def _convert_to_eight_bits(self) -> None:
        attentions = [m for m in self.layers.modules() if isinstance(m, ClipAttention) and m.eight_bits is None]
        joined = {part for attention in attentions for part in attention.projections}
        weights = [
            (module, name, weight)
            for module in self.layers.modules()
            for name in ("weight", "qkv_weight")
            if isinstance(weight := getattr(module, name, None), nn.Parameter)
            and weight.ndim == 2
            and module not in joined
        ]
        # all are made before the first takes its place: sizes that the hardware does not support are an error
        small = [Fp8Weight(weight) for _, _, weight in weights]
        small_joined = [Fp8Weight(attention.join_projections()[0]) for attention in attentions]
        for (module, name, _), weight in zip(weights, small, strict=True):
            delattr(module, name)
            setattr(module, name, weight)
        for attention, weight in zip(attentions, small_joined, strict=True):
            attention.eight_bits = weight
            for part in attention.projections:
                del part.weight

    def embed(self, images: Tensor) -> Tensor:
        """Compute the input of layer 0, ``[n, 1+P+R, D]``, from normalised images ``[n, 3, h, w]``."""
        patches = self.patch_embedding(images.to(self.dtype)).flatten(2).transpose(1, 2)
        if self.config.is_siglip:
            return with_mean(patches + self.position[1:])
        tokens = torch.cat([self.class_embedding.expand(len(images), 1, -1), patches], 1)
        norm: Any = self.pre_norm
        if rows.has_kernels(tokens) and type(norm) is nn.LayerNorm and is_plain(norm) and not torch.is_grad_enabled():
            _, tokens = residual_norm(tokens, self.position.expand_as(tokens), norm.weight, norm.bias, norm.eps)
        else:
            tokens = norm(tokens + self.position)
        if self.config.num_register_tokens:
            tokens = torch.cat([tokens, self.registers.expand(len(images), -1, -1)], 1)
        return tokens

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.position.device

    def learns(self, images: Tensor) -> bool:
        """Whether ``images`` (or their tokens) or a parameter inside the tower requires a gradient."""
        needed = torch.is_grad_enabled() and (images.requires_grad or any(p.requires_grad for p in self.parameters()))
        if needed and self.is_fp8:
            raise ValueError("a tower in 8 bits (optimize(fp8=True)) has no gradients, but one is required")
        return needed

    def run(self, images: Tensor, stop: int, done: Callable[[], None] = nothing) -> Tensor:
        """Compute the input of layer ``stop``, ``[n, 1+P+R, D]``, of images ``[n, 3, h, w]``, a chunk at a time.

        ``done`` is called after each layer of each chunk.
        """
        learns = self.learns(images)
        layers = cast(list[TowerLayer], list(self.layers)[:stop])

        def first_layers(piece: Tensor, out: Tensor | None = None) -> Tensor:
            # a replayed graph makes no Python calls
            return run_layers(layers, self.embed(piece), out, done if learns or self.graphs is None else nothing)

        if learns:
            return torch.cat([first_layers(piece) for piece in images.split(self.chunk)])
        with _frozen(images):
            recorded = self._replays()
            if len(images) <= self.chunk and not recorded:
                return first_layers(images)
            state = self.position.new_empty(len(images), self.config.rows, self.config.hidden_size)
            for piece, out in zip(images.split(self.chunk), state.split(self.chunk), strict=True):
                if recorded:
                    out.copy_(self._run(("first", stop), first_layers, piece, recorded))
                else:
                    first_layers(piece, out)
                for _ in range(0 if self.graphs is None else stop):
                    done()
            return state

    def run_layer(self, layer: int, x: Tensor, done: Callable[[], None] = nothing) -> Tensor:
        """Compute the output of layer ``layer`` (0-based in the full tower) on ``[n, 1+P+R, D]``.

        It overwrites ``x``, unless gradients are needed (:meth:`learns`).
        """
        module = self.layers[layer - self.first_layer]
        if self.learns(x):
            results = []
            for piece in x.split(self.chunk):
                results.append(module(piece))
                done()
            return torch.cat(results)
        with _frozen(x):
            recorded = self._replays()
            for piece in x.split(self.chunk):
                result = self._run(layer, module, piece, recorded)
                if result is not piece:
                    piece.copy_(result)
                done()
        return x

    def chunks(self, images: int) -> int:
        """Return the number of chunks for a number of images."""
        return -(-images // self.chunk)

    def _replays(self) -> bool:
        """Whether CUDA graphs can be replayed; they would ignore layers wrapped or replaced after recording."""
        return self.graphs is not None and why_not_all_plain(self.layers, (*PLAIN_PARTS, nn.ModuleList)) is None

    def _run(self, name: Any, function: Callable[[Tensor], Tensor], piece: Tensor, recorded: bool) -> Tensor:
        if recorded and self.graphs is not None:
            return self.graphs(name, function, piece)
        return function(piece)

    def project(self, tokens: Tensor) -> Tensor:
        """Project ``[..., D]`` to the shared space ``[..., F]``, without the final LayerNorm.

        A SigLIP's pooling head is applied to each token separately.

        Raises:
            ValueError: the tower has no projection (``projection_dim`` None).
        """
        if self.config.projection_dim is None:
            raise ValueError("this tower has no projection (projection_dim is None): only video_tokens can be computed")
        return self.projection(tokens)

    def pool(self, tokens: Tensor) -> Tensor:
        """Compute the image model's embedding of each image, ``[..., F]``, from its last state, ``[..., 1+P, D]``.

        After the final LayerNorm, CLIP and EVA-CLIP project the CLS; SigLIP's pooling head attends to all patches.

        Raises:
            ValueError: see :meth:`project`.
        """
        if self.config.is_siglip and self.config.projection_dim is not None:
            return self.projection.pool(self.final_norm(tokens[..., 1:, :]))
        return self.project(self.final_norm(tokens[..., 0, :]))

    def image_embeds(self, images: Tensor) -> Tensor:
        """Embed single images without a branch, ``[n, 3, h, w]`` to ``[n, F]``."""
        return self.pool(self.run(images, len(self.layers)))
