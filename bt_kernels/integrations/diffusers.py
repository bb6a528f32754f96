"""Temporal self-attention of diffusers' video models on ``temporal_attention``::

    from bt_kernels.integrations import diffusers as bt_diffusers

    pipe = AnimateDiffPipeline.from_pretrained(..., motion_adapter=adapter)
    bt_diffusers.use(pipe.unet)     # in place; bt_diffusers.restore(pipe.unet) reverts it

In these models the frames of a latent pixel are one short sequence, and a batch has B·height·width of them. On CUDA
the grids of SDPA and xformers are limited to 65,535 sequences or heads·sequences. This op has no such limit, and packs
several short sequences into one tile.

Legend: M = B·height·width latent pixels, F frames, C channels, H heads, E = C/H.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_kernels.ops.temporal_attention import temporal_attention
from bt_kernels.plain import is_plain
from bt_kernels.visible import VisibleTokens

Model = TypeVar("Model", bound=nn.Module)


class TemporalAttnProcessor:
    """Attention processor of diffusers for self-attention over frames: ``[M, F, C]`` to the same shape.

    Equivalent to ``AttnProcessor2_0`` without mask and encoder states, for any M. :func:`use` sets it on every temporal
    layer of a model. To set it directly::

        for block in motion_module.transformer_blocks:
            for attn in (block.attn1, block.attn2):
                attn.set_processor(TemporalAttnProcessor(previous=attn.processor))

    The three projections run as one matrix product of the concatenated weights; gradients flow to ``to_q``, ``to_k``
    and ``to_v``. If one of them is not a plain ``nn.Linear`` (an adapter such as LoRA, a quantised or offloaded layer,
    one with hooks), the three modules are called and their results concatenated.

    Args:
        fused: use ``attn.to_qkv``, the copy that diffusers' ``fuse_projections`` makes; ``to_q``, ``to_k`` and ``to_v``
            are then not used, as with ``FusedAttnProcessor2_0``.
        previous: the replaced processor, which :func:`restore` sets again; None: ``AttnProcessor2_0``.
    """

    def __init__(self, fused: bool = False, previous: Any = None):
        self.fused = fused
        self.previous = previous

    def __repr__(self) -> str:
        return f"{type(self).__name__}(fused={self.fused}, previous={type(self.previous).__name__})"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Map ``[M, F, C]`` to the same shape; ``Attention.forward`` of diffusers calls this. ``temb`` is not used.

        Raises:
            ValueError: encoder states or a mask are given, the states are not ``[M, F, C]``, or ``attn`` does not
                compute plain self-attention.
        """
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: temporal_attention is self-attention over frames")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: each latent pixel attends to all its frames")
        if hidden_states.ndim != 3:
            raise ValueError(
                "hidden_states must be [batch·height·width, frames, channels], "
                f"but its shape is {list(hidden_states.shape)}"
            )
        if reason := _why_not(attn, self.fused):
            raise ValueError(f"attn must be plain self-attention, but {reason}")
        pixels, frames, _ = hidden_states.shape
        # One video of M patches: all rows are adjacent, so the kernel packs them into full tiles, and qkv is a view of
        # the product. Without pixels there is no video.
        visible = VisibleTokens.all(min(pixels, 1), max(pixels, 1), frames, hidden_states.device)
        qkv = _project(attn, hidden_states, self.fused)
        qkv = qkv.reshape(visible.batch, visible.tokens, 3, attn.heads, attn.inner_dim // attn.heads)
        out = temporal_attention(qkv, visible).reshape(pixels, frames, attn.inner_dim)
        for layer in attn.to_out:  # a linear layer, then dropout
            out = layer(out)
        if attn.residual_connection:
            out = out + hidden_states
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def use(model: Model) -> Model:
    """Set a :class:`TemporalAttnProcessor` on every temporal self-attention of ``model``, in place; return the model.

    These are the attentions of AnimateDiff's motion modules (``UNetMotionModel``, ``MotionAdapter``), those of
    ``TransformerTemporalModel`` (``UNet3DConditionModel``, ``I2VGenXLUNet``), and ``attn1`` of Stable Video
    Diffusion's ``TemporalBasicTransformerBlock``. Spatial and cross-attention keep their processors. Call it again
    after methods that set processors themselves (``fuse_qkv_projections``, ``enable_free_noise``). Fused projections
    stay fused.

    Args:
        model: a UNet, motion adapter or any module with such layers (``pipe.unet`` of a pipeline).

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no temporal self-attention, or one that does not compute plain self-attention, or
            whose processor is not known to compute it. Nothing is changed then.
        ImportError: diffusers is not installed.
    """
    from diffusers.models import attention_processor as known

    plain = (
        known.AttnProcessor,
        known.AttnProcessor2_0,
        known.FusedAttnProcessor2_0,
        known.SlicedAttnProcessor,
        known.XFormersAttnProcessor,
    )
    found = [
        (name, attn)
        for name, attn in _temporal_attentions(model)
        if not isinstance(attn.processor, TemporalAttnProcessor)
    ]
    for name, attn in found:
        reason = _why_not(attn, isinstance(attn.processor, known.FusedAttnProcessor2_0))
        if type(attn.processor) not in plain:
            reason = (
                f"has the processor {type(attn.processor).__name__}, which may compute something else "
                "(if it does not, set TemporalAttnProcessor on the layer directly)"
            )
        if reason:
            raise ValueError(f"model's temporal attentions must be plain self-attention, but {name} {reason}")
    for _, attn in found:
        fused = isinstance(attn.processor, known.FusedAttnProcessor2_0)
        attn.set_processor(TemporalAttnProcessor(fused, attn.processor))
    return model


def restore(model: Model) -> Model:
    """Set the processors that :func:`use` replaced again, in place; return the model."""
    _check_module(model)
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    for module in model.modules():
        if isinstance(module, Attention) and isinstance(module.processor, TemporalAttnProcessor):
            previous: Any = module.processor.previous or AttnProcessor2_0()
            module.set_processor(previous)
    return model


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module (of a pipeline: pipe.unet), but is {type(model).__name__}")


def _temporal_attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return the name and module of every self-attention over frames in ``model``.

    Raises:
        TypeError, ValueError: ``model`` is not a module, or has no such attention.
    """
    from diffusers.models.attention import TemporalBasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
    from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

    _check_module(model)
    found: dict[Any, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, (AnimateDiffTransformer3D, TransformerTemporalModel)):
            for inner, attn in module.named_modules(prefix=name):
                if isinstance(attn, Attention) and not attn.is_cross_attention:
                    found[attn] = inner
        elif isinstance(module, TemporalBasicTransformerBlock):
            found[module.attn1] = f"{name}.attn1" if name else "attn1"
    if not found:
        raise ValueError(f"model must hold temporal self-attention, but {type(model).__name__} holds none")
    return ((name, attn) for attn, name in found.items())


def _why_not(attn: Any, fused: bool) -> str | None:
    """Return why ``attn`` is not the plain self-attention that the processor computes, or None."""
    if attn.is_cross_attention:
        return "is cross-attention"
    if attn.norm_q is not None or attn.norm_k is not None:
        return "normalises queries or keys"
    if attn.group_norm is not None or attn.spatial_norm is not None:
        return "has a group or spatial norm"
    if attn.added_kv_proj_dim is not None:
        return "has added key and value projections"
    if attn.inner_kv_dim != attn.inner_dim:
        return "has fewer key heads than query heads"
    if not attn.scale_qk:
        return "does not scale its scores"
    if getattr(attn, "is_causal", False):
        return "is causal"
    if attn.to_out is None:
        return "has no output projection"
    if fused and not hasattr(attn, "to_qkv"):
        return "has no to_qkv: call its fuse_projections first"
    return None


def _project(attn: Any, x: Tensor, fused: bool) -> Tensor:
    """Project ``[M, F, C]`` to ``[M, F, 3·H·E]``, with q, k and v concatenated.

    Concatenating the weights copies 3·C² numbers, stacking three results 3·M·F·C. In models M·F is far above C.
    """
    if fused:
        return attn.to_qkv(x)
    parts = (attn.to_q, attn.to_k, attn.to_v)
    if not all(type(part) is nn.Linear and is_plain(part) for part in parts):
        return torch.cat([part(x) for part in parts], -1)
    bias = None if attn.to_q.bias is None else torch.cat([part.bias for part in parts])
    return F.linear(x, torch.cat([part.weight for part in parts]), bias)
