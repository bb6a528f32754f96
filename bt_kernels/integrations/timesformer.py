"""TimeSformer of Hugging Face transformers on the ops of ``bt_kernels``::

    from bt_kernels.integrations import timesformer

    model = TimesformerForVideoClassification.from_pretrained("facebook/timesformer-base-finetuned-k400")
    timesformer.use(model)      # in place; timesformer.restore(model) reverts it

Results and gradients equal those of the original model up to rounding. The kernels avoid copying hidden states into
frames and back, repeating CLS, and storing attention probabilities.

A layer whose attention modules were replaced or wrapped (another class, a hook, a forward of another library) runs the
forward of transformers instead. Videos of another length than ``config.num_frames`` raise an error: the original model
accepts them and silently confuses patches and frames.

Legend: B videos, P patches of a frame, T frames, N = P·T, D width, H heads.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.models.timesformer import modeling_timesformer as modeling
from transformers.models.timesformer.modeling_timesformer import TimesformerEmbeddings, TimesformerLayer

from bt_kernels.nn.stochastic_depth import frame_weight_and_row_scale, sequence_row_scale
from bt_kernels.ops.spatial_attention import spatial_attention
from bt_kernels.ops.temporal_attention import temporal_attention
from bt_kernels.plain import why_not_plain
from bt_kernels.visible import VisibleTokens

Model = TypeVar("Model", bound=nn.Module)
# Classes that KernelTimesformerLayer computes itself instead of calling.
_COMPUTED = (
    modeling.TimeSformerAttention,
    modeling.TimesformerSelfAttention,
    *(kind for name in ("TimesformerDropPath", "TimeSformerDropPath") if (kind := getattr(modeling, name, None))),
    nn.Dropout,
)


def use(model: Model) -> Model:
    """Run every divided space-time layer of ``model`` on the ops of ``bt_kernels``, in place; return the model.

    The layers change their class, not their weights: state dict, hooks, adapters inside, gradient checkpointing,
    ``copy.deepcopy`` and pickling keep working. Policies that find layers by the name of their class (FSDP's
    ``transformer_cls_names_to_wrap``) must name ``KernelTimesformerLayer``. A second call has no effect.

    Args:
        model: a TimesformerModel, TimesformerForVideoClassification or any module with their layers.

    Raises:
        TypeError: ``model`` is not a module, or a layer is of a class derived from TimesformerLayer.
        ValueError: ``model`` has no TimesformerLayer, or one whose ``attention_type`` is not "divided_space_time".
            Nothing is changed then.
    """
    layers = _layers(model)
    if not layers:
        raise ValueError(f"model must hold TimeSformer layers, but {type(model).__name__} holds no TimesformerLayer")
    for layer in layers:
        if type(layer) not in (TimesformerLayer, KernelTimesformerLayer):
            raise TypeError(f"model's layers must be TimesformerLayer, but one is {type(layer).__name__}")
        if layer.attention_type != "divided_space_time":
            raise ValueError(
                f'model must have attention_type "divided_space_time", but has "{layer.attention_type}": '
                "its layers do not compute attention in time and space separately"
            )
    for layer in layers:
        layer.__class__ = KernelTimesformerLayer
    for module in model.modules():
        if type(module) is TimesformerEmbeddings:
            module.__class__ = KernelTimesformerEmbeddings
            module.kernel_config = layers[0].config  # the layers read num_frames from it
    return model


def restore(model: Model) -> Model:
    """Revert :func:`use`, in place; return the model."""
    for layer in _layers(model):
        if type(layer) is KernelTimesformerLayer:
            layer.__class__ = TimesformerLayer
    for module in model.modules():
        if type(module) is KernelTimesformerEmbeddings:
            module.__class__ = TimesformerEmbeddings
            del module.kernel_config
    return model


def _layers(model: nn.Module) -> list[TimesformerLayer]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, TimesformerLayer)]


class KernelTimesformerEmbeddings(TimesformerEmbeddings):
    """TimesformerEmbeddings that reject a number of frames which the layers would misread. Made by :func:`use`."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed ``[B, T, C, h, w]`` to ``[B, 1+P·T, D]``.

        Raises:
            ValueError: T is not the configuration's ``num_frames``. The layers use only that number to separate patches
                from frames, so all their results would be wrong.
        """
        expected = self.kernel_config.num_frames
        if pixel_values.ndim == 5 and pixel_values.shape[1] != expected:
            raise ValueError(
                f"pixel_values must have num_frames = {expected} frames, but has {pixel_values.shape[1]}: sample "
                f"{expected} frames, or set model.config.num_frames = {pixel_values.shape[1]} to interpolate the time "
                "embeddings"
            )
        return super().forward(pixel_values)


class KernelTimesformerLayer(TimesformerLayer):
    """A divided space-time TimesformerLayer whose two attentions are ``temporal_attention`` and ``spatial_attention``.

    Made by :func:`use`. Stochastic depth draws the same random numbers as the original in the same order, so one seed
    drops the same residuals.
    """

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        """Map ``[B, 1+N, D]`` (CLS first, patch p of frame t in row 1 + p·T + t) to ``(the same shape,)``.

        Raises:
            ValueError: attention probabilities are requested; the rows are not a whole number of patches; or, in
                training, an unsupported dropout is above 0: of attention probabilities, or after the spatial
                attention (CLS would need a draw in each frame).
        """
        if self._is_wrapped():
            return super().forward(hidden_states, output_attentions)
        if output_attentions:
            raise ValueError(
                "output_attentions=True is not supported, because the kernels do not store attention probabilities; "
                "call bt_kernels.integrations.timesformer.restore(model) first"
            )
        self._refuse_dropout()
        batch, tokens, _ = hidden_states.shape
        frames = self.config.num_frames
        if tokens < 1 + frames or (tokens - 1) % frames:
            raise ValueError(
                f"hidden_states must be [B, 1 + P·{frames}, D] for num_frames = {frames}, "
                f"but its shape is {list(hidden_states.shape)}"
            )
        visible = VisibleTokens.all(batch, (tokens - 1) // frames, frames, hidden_states.device)

        cls, rows = hidden_states[:, :1], hidden_states[:, 1:]
        attended = temporal_attention(_qkv(self.temporal_attention, self.temporal_layernorm(rows)), visible)
        update = self.temporal_attention.output(attended.flatten(2))
        scale = self._draw_scale(visible.sequences, hidden_states)
        if scale is not None:
            update = update * sequence_row_scale(scale, visible).to(update.dtype)
        hidden_states = torch.cat([cls, rows + self.temporal_dense(update)], 1)

        qkv = _qkv(self.attention, self.layernorm_before(hidden_states))
        scale = self._draw_scale(visible.steps, hidden_states)
        if scale is None:
            update = self.attention.output(spatial_attention(qkv, visible).flatten(2))
        else:
            frame_weight, row_scale = frame_weight_and_row_scale(scale, visible)
            update = self.attention.output(spatial_attention(qkv, visible, frame_weight).flatten(2))
            update = update * row_scale.to(update.dtype)
        hidden_states = hidden_states + update

        update = self.output(self.intermediate(self.layernorm_after(hidden_states)))
        return (hidden_states + self.drop_path(update),)

    def _is_wrapped(self) -> bool:
        """Return whether a module that :meth:`forward` does not call has been replaced or wrapped."""
        parts: list[nn.Module] = [self.drop_path]
        for attention in (self.temporal_attention, self.attention):
            parts.append(attention)
            if type(attention) is modeling.TimeSformerAttention:
                parts.append(attention.attention)
                parts.append(getattr(attention.attention, "attn_drop", attention.attention))
        return any(why_not_plain(part, _COMPUTED) is not None for part in parts)

    def _refuse_dropout(self) -> None:
        for setting, dropout in (
            ("attention_probs_dropout_prob", self.temporal_attention.attention.attn_drop),
            ("attention_probs_dropout_prob", self.attention.attention.attn_drop),
            ("hidden_dropout_prob", self.attention.output.dropout),
        ):
            if dropout.training and dropout.p > 0:
                raise ValueError(
                    f"{setting} must be 0 in training on these kernels, but is {dropout.p}: train with 0 (stochastic "
                    "depth is available), call model.eval(), or bt_kernels.integrations.timesformer.restore(model)"
                )

    def _draw_scale(self, count: int, like: Tensor) -> Tensor | None:
        """Draw ``self.drop_path`` scales for ``count`` residuals of each video: ``[B, count]``; None: keep all."""
        rate = getattr(self.drop_path, "drop_prob", 0.0)  # the layer has an Identity where the rate is 0
        if rate == 0 or not self.drop_path.training:
            return None
        drawn = torch.rand(like.shape[0], count, dtype=like.dtype, device=like.device)
        kept = torch.floor(drawn + (1 - rate))
        return kept.to(torch.promote_types(like.dtype, torch.float32)) / (1 - rate)


def _qkv(attention: Any, tokens: Tensor) -> Tensor:
    """Compute the packed projections of a TimeSformerAttention: ``[B, rows, 3, H, E]``."""
    heads = attention.attention.num_heads
    return attention.attention.qkv(tokens).unflatten(-1, (3, heads, tokens.shape[-1] // heads))
