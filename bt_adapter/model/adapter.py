"""The BT-Adapter model: a frozen tower together with the trainable branch.

Legend: B videos, T frames, P patches, N visible tokens, D width, F width of the shared video-text space, L tower
layers, d branch layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from bt_adapter.model.config import AlignLayer
from bt_adapter.model.losses import ChatLayer, called_alignment, compare_chat_layer, contrastive_loss
from bt_adapter.model.readout import cls_and_mean
from bt_adapter.model.replay import can_replay, replay
from bt_adapter.model.time_steps import Long, average_frames, check_trained, plan_steps
from bt_adapter.model.walk import run_lockstep, run_tower, without_registers
from bt_adapter.model.weights import TowerWithBranch
from bt_adapter.progress import Progress, counter, nothing
from bt_kernels import VisibleTokens, alignment_loss, pool_video_tokens
from bt_kernels.plain import is_plain, why_not_all_plain


@dataclass
class BTAdapterOutput:
    """The result of a forward pass.

    Attributes:
        backbone_tokens: the tower's last state, ``[B, T, 1+P, D]``, CLS first.
        branch_tokens: the branch's last state, ``[B, 1+N, D]``, CLS first.
        frame_embeds: ``[B, T, F]``, not normalised.
        video_embeds: ``[B, F]``, their mean over the frames without padding.
        visible: the branch's tokens; its frames are the branch's time steps, fewer than T if neighbouring frames were
            averaged.
        branch_mean: the mean of ``branch_tokens`` over the visible patch tokens, ``[B, D]``.
        chat: inputs of MBCA and MBTA at the layer that chat reads; None unless ``align_layer`` was "chat".
    """

    backbone_tokens: Tensor
    branch_tokens: Tensor
    frame_embeds: Tensor
    video_embeds: Tensor
    visible: VisibleTokens
    branch_mean: Tensor
    chat: ChatLayer | None = None


class BTAdapterVisionModel(TowerWithBranch):
    """A frozen CLIP, EVA-CLIP, SigLIP or DINOv2 tower with the BT-Adapter branch (arXiv 2309.15785), random weights.

    Use :meth:`from_clip` for a new branch on a trained tower, :meth:`from_pretrained` for saved branches, and
    ``load_reference_checkpoint`` for published ones.

    Args:
        vision_config: a Hugging Face ``CLIPVisionConfig``, a dict with its keys, or a :class:`TowerConfig` (for other
            towers, ``bt_adapter.towers.read_tower`` makes one from a loaded model).
        adapter_config: configuration of the branch.
        chat_only: build the d-1 branch layers that video tokens need.
        stored_features: build only what video tokens from stored tower features need: tower layers L-d to L-2 and
            d-1 branch layers.

    Raises:
        ValueError: a configuration value is missing or outside its range.
    """

    def forward(
        self,
        pixel_values: Tensor,
        visible: VisibleTokens | None = None,
        draws: Iterable[Tensor] | None = None,
        long: Long = "average",
        align_layer: AlignLayer = "last",
    ) -> BTAdapterOutput:
        """Run the tower on every token and the branch on the visible ones.

        For videos of more frames than the branch was trained with, the branch reads means of neighbouring frames, one
        per time step (see ``long``). The tower's CLS is not averaged: ``frame_embeds`` has one row for each of the T
        frames, and ``video_embeds`` is their mean.

        Args:
            pixel_values: normalised frames ``[B, T, 3, h, w]``. If they require a gradient they get one, and the tower
                keeps its activations.
            visible: the branch's tokens; None: all. If given, T must not exceed the trained time steps.
            draws: recorded draws of stochastic depth (0 = dropped, 1 = kept) in the order of their use: for each branch
                layer with a non-zero rate, the temporal ``[B·K]`` and the spatial ``[B·T]`` one (and ``[B]`` with
                ``drop_block``). None: random draws in training mode, none in evaluation mode.
            long: conversion of frames to time steps if ``visible`` is None: see ``model.time_steps.plan_steps``.
            align_layer: layer at which `pretraining_losses` compares the branch with the text (MBCA) and with the tower
                (MBTA). "last": after the last layers, as published. "chat": after tower layer L-2 and branch layer d-2,
                whose tokens a chat model reads (`video_tokens`); it needs a branch of depth 2 or more.

        Raises:
            ValueError, TypeError: an argument has the wrong shape, dtype or device; the message names it.
        """
        if self.chat_only:
            raise ValueError(
                "this model lacks the last branch layer, as chat does not need it: only video_tokens works"
            )
        if align_layer not in ("last", "chat"):
            raise ValueError(f"align_layer must be 'last' or 'chat', but is {align_layer!r}")
        if align_layer == "chat" and self.config.depth < 2:
            raise ValueError("align_layer='chat' needs a branch of depth 2 or more, but depth is 1")
        self.check_pixels(pixel_values)
        batch, frames = pixel_values.shape[:2]
        if visible is None:
            plan = plan_steps(self.config, frames, long)
            read = VisibleTokens.all(batch, self.vision_config.patches, plan.steps, pixel_values.device)
        else:
            self._check_visible(visible, batch, frames)
            plan, read = None, visible
        chat: list[ChatLayer] = []

        def compare(layer: int, x: Tensor, z: Tensor) -> None:
            if align_layer == "chat" and layer == self.config.depth - 2:
                averaged = average_frames(without_registers(x, self.vision_config), read.frames)
                chat.append(compare_chat_layer(averaged, z, read))

        tokens, z = run_lockstep(self, self._embed(pixel_values), read, self.config.depth, draws, plan, after=compare)
        z_cls, branch_mean = cls_and_mean(z, read)
        frame_embeds = self._frame_embeds(z_cls, tokens)
        if read.frame_counts is None:
            video_embeds = frame_embeds.mean(1)
        else:
            weights = read.step_weights(frame_embeds)[:, :, None]
            # masked as well as weighted, because 0 · NaN of a padding frame is NaN
            video_embeds = (frame_embeds.masked_fill(weights == 0, 0) * weights).sum(1).to(frame_embeds.dtype)
        return BTAdapterOutput(tokens, z, frame_embeds, video_embeds, read, branch_mean, chat[0] if chat else None)

    def _frame_embeds(self, z_cls: Tensor, tokens: Tensor) -> Tensor:
        """Mix the branch's CLS ``[B, D]`` with the tower's last state ``[B, T, 1+P, D]``: ``[B, T, F]``.

        With a CLIP, both CLS are mixed and then projected. A SigLIP has no CLS, so its embedding of each frame and that
        of the branch's CLS are mixed after its pooling head, where F = D.
        """
        if not self.vision_config.is_siglip:
            # a copy: autograd keeps it for the gate's gradient, and a view would keep all tokens
            cls = tokens[:, :, 0].to(z_cls.dtype, copy=True)
            return self._project(self._final_norm(self.branch.mix_output(z_cls, cls)))
        frames = self.tower.pool(tokens.to(self.tower.dtype)).to(z_cls.dtype)
        return self.branch.mix_output(self._project(self._final_norm(z_cls)).to(z_cls.dtype), frames)

    def image_embeds(self, pixel_values: Tensor) -> Tensor:
        """Embed still images with the frozen tower only, ``[n, 3, h, w]`` to ``[n, F]``."""
        self.check_pixels(pixel_values, "[n, 3, h, w]")
        return self.tower.image_embeds(pixel_values)

    def video_tokens(
        self,
        pixel_values: Tensor | None = None,
        windows: str = "full",
        features: Tensor | None = None,
        start_layer: int | None = None,
        draws: Iterable[Tensor] | None = None,
        progress: Progress | None = None,
        long: Long = "average",
    ) -> Tensor:
        """Compute the tokens of each video for a language model's projector: P+1 tokens for any T, CLS last.

        With X the output of tower layer L-2 and z the branch after its layer d-2, the tokens are the average of the
        mean of X over time and the mean of z. The last layers of both do not run. For videos of more frames than the
        branch was trained with see ``long``; the mean of X always includes all T frames. Source: arXiv 2309.15785
        section 3.3.

        Args:
            pixel_values: normalised frames ``[B, T, 3, h, w]``, or None if ``features`` are given.
            windows: "full" attends over all frames; "reference" arranges the rows like the published code, in T // 2
                slots (for published scores; it needs T ≥ 2, at most 2·``max_frames``, and T // 2 to divide P·T), and
                reads the time table as with ``long="published"``.
            features: stored input of tower layer ``start_layer``, ``[B, T, 1+P, D]`` (for a DINOv2 with R registers
                ``[B, T, 1+P+R, D]``, the registers last).
            start_layer: 0-based; None: L-d, the first layer that a branch layer reads (20 for ViT-L/14).
            draws: as in :meth:`forward`.
            progress: called with the steps done and in total: a step is a chunk of frames in a tower layer, or a branch
                layer.
            long: conversion of frames to time steps; by default neighbouring frames of X are averaged down to the
                trained steps; see ``model.time_steps.plan_steps``.

        Returns:
            ``[B, P+1, D]``.

        Raises:
            ValueError, TypeError: an argument has the wrong shape or value; the message names it.
        """
        if windows not in ("full", "reference"):
            raise ValueError(f"windows must be 'full' or 'reference', but is {windows!r}")
        if windows == "reference" and long == "interpolate":
            raise ValueError("long must be 'published' or left out where windows is 'reference', but is 'interpolate'")
        if (pixel_values is None) == (features is None):
            raise ValueError("exactly one of pixel_values and features must be given")
        if self.config.depth < 2:
            raise ValueError(f"video_tokens needs a branch of depth 2 or more, but depth is {self.config.depth}")
        if pixel_values is not None:
            if start_layer is not None:
                raise ValueError("start_layer goes with features, but pixel_values was given")
            self.check_pixels(pixel_values)
            done = self._counter(pixel_values, 0, self.config.depth - 1, progress)
            if draws is None and can_replay(self, pixel_values):
                result = replay(
                    self, pixel_values, lambda pixels: self.video_tokens(pixels, windows, long=long), windows, long
                )
                for _ in range(self._steps(pixel_values, 0, self.config.depth - 1)):
                    done()
                return result
            tokens = self._embed(pixel_values, done)
        else:
            start = self.first_branch_layer if start_layer is None else start_layer
            features = self._check_features(features, start)
            done = self._counter(features, start, self.config.depth - 1, progress)
            tokens = features.detach().to(self.tower.dtype, copy=True, memory_format=torch.contiguous_format)
            tokens = run_tower(self.tower, tokens, start, self.first_branch_layer, done)
        batch, frames, places = *tokens.shape[:2], 1 + self.vision_config.patches
        plan = plan_steps(self.config, frames, "published" if windows == "reference" else long)
        slots = plan.steps if windows == "full" else frames // 2
        too_long = windows == "reference" and frames > 2 * self.config.max_frames
        if slots < 1 or (places - 1) * plan.steps % slots or too_long:
            raise ValueError(
                f"windows='reference' cannot take {places - 1} patches of {frames} frames in {frames // 2} slots (the "
                f"published code fails there too, or takes at most {2 * self.config.max_frames}); use windows='full'"
            )
        visible = VisibleTokens.all(batch, places - 1, plan.steps, tokens.device, slots)
        tokens, z = run_lockstep(self, tokens, visible, self.config.depth - 1, draws, plan, done)
        return pool_video_tokens(tokens, z, visible)

    def frame_mean_tokens(self, pixel_values: Tensor, progress: Progress | None = None) -> Tensor:
        """Compute video tokens without the branch: the mean over time of tower layer L-2's tokens.

        ``[B, T, 3, h, w]`` to ``[B, P+1, D]``, CLS last. It is the baseline of every comparison with the branch.
        ``progress`` as in :meth:`video_tokens`.
        """
        self.check_pixels(pixel_values)
        done = self._counter(pixel_values, 0, 0, progress)
        stop = self.vision_config.num_hidden_layers - 1
        tokens = run_tower(self.tower, self._embed(pixel_values, done), self.first_branch_layer, stop, done)
        mean = without_registers(tokens, self.vision_config).mean(1)
        return torch.cat([mean[:, 1:], mean[:, :1]], 1)

    def pretraining_losses(
        self,
        output: BTAdapterOutput,
        text_embeds: Tensor,
        visible: VisibleTokens | None = None,
        temperature: float | Tensor = 0.01,
        mbca_weight: float = 0.1,
        mbta_weight: float = 0.1,
        group: ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """Compute the three weighted losses of pretraining for a batch (arXiv 2309.15785 section 3.2).

        Args:
            output: result of :meth:`forward`.
            text_embeds: embeddings of the frozen text encoder, ``[B, F]``, of any norm.
            visible: None: ``output.visible``.
            temperature: τ of the contrastive losses.
            mbca_weight: weight of the branch-text contrastive loss on the mean of the branch's patch tokens or, with
                ``align_layer="chat"``, on the mean of the video tokens that chat reads.
            mbta_weight: weight of the alignment of branch tokens with the tower's or, with ``align_layer="chat"``, of
                the tokens that chat reads, without a head.
            group: processes whose equally large batches form one: see ``model.losses.contrastive_loss``. Losses
                and gradients of the global batch are then the means over the processes.

        Returns:
            {"vtc", "mbca"} and, if the branch has an alignment head or the output is aligned at chat's layer, "mbta".
        """
        # separate, unlike in pretraining, so that no layer gets a gradient of zeros from a loss that is not used
        losses = {
            "vtc": contrastive_loss(output.video_embeds, text_embeds, temperature, group),
            "mbca": mbca_weight
            * contrastive_loss(self.branch_embeds(output, visible), text_embeds, temperature, group),
        }
        if output.chat is not None or self.branch.alignment_head is not None:
            losses["mbta"] = mbta_weight * self.token_alignment(output, visible)
        return losses

    def branch_embeds(self, output: BTAdapterOutput, visible: VisibleTokens | None = None) -> Tensor:
        """Compute the embedding that MBCA compares with the text: the projected mean of the patch tokens, ``[B, F]``.

        With a SigLIP, the final LayerNorm is applied first, because the pooling head was trained on its output. For an
        output with ``align_layer="chat"``, it is the mean of the video tokens after the final LayerNorm.
        """
        if output.chat is not None:
            return self._project(self._final_norm(output.chat.mean))
        mean = output.branch_mean if visible is None else cls_and_mean(output.branch_tokens, visible)[1]
        return self._project(self._final_norm(mean) if self.vision_config.is_siglip else mean)

    def token_alignment(self, output: BTAdapterOutput, visible: VisibleTokens | None = None) -> Tensor:
        """Compute the unweighted loss MBTA, a scalar. No gradient flows to the tower.

        The branch must have an alignment head, unless the output was made with ``align_layer="chat"``.
        """
        if output.chat is not None:
            return output.chat.distance.to(output.branch_tokens.dtype)
        tower, head = self.tower, self.branch.alignment_head
        if head is None:
            raise ValueError("the branch must have an alignment head (alignment_head=True), but has none")
        linear: Any = head[0]
        norm: Any = head[1]
        dtype = output.branch_tokens.dtype
        visible = output.visible if visible is None else visible
        if not (_is_plain_head(head) and is_plain(tower.final_norm) and is_plain(tower.projection)):
            tokens = output.backbone_tokens
            return called_alignment(
                output.branch_tokens, tokens, visible, head, lambda x: self._project(self._final_norm(x))
            )
        return alignment_loss(
            output.branch_tokens,
            output.backbone_tokens,
            visible,
            linear.weight.to(dtype),
            linear.bias.to(dtype),
            norm.weight.to(dtype),
            norm.bias.to(dtype),
            tower.final_norm.weight.to(dtype),
            tower.final_norm.bias.to(dtype),
            tower.projection.weight.to(dtype),
            None if tower.projection.bias is None else tower.projection.bias.to(dtype),
            head_norm_eps=norm.eps,
            target_norm_eps=tower.final_norm.eps,
        )

    def _embed(self, pixel_values: Tensor, done: Callable[[], None] = nothing) -> Tensor:
        """Compute the input of tower layer L-d from frames, ``[B, T, 1+P, D]``."""
        tokens = self.tower.run(pixel_values.flatten(0, 1), self.first_branch_layer, done)
        return tokens.unflatten(0, pixel_values.shape[:2])

    def _counter(self, videos: Tensor, start: int, branch_layers: int, progress: Progress | None) -> Callable[[], None]:
        """Make the progress callback of a run from tower layer ``start`` to L-2."""
        return counter(self._steps(videos, start, branch_layers), progress)

    def _steps(self, videos: Tensor, start: int, branch_layers: int) -> int:
        """Count the chunks of the tower's layers from ``start`` to L-2, and the branch's layers."""
        chunks = self.tower.chunks(videos.shape[0] * videos.shape[1])
        return chunks * (self.vision_config.num_hidden_layers - 1 - start) + branch_layers

    def _check_features(self, features: Any, start: int) -> Tensor:
        config = self.vision_config
        if not isinstance(features, Tensor) or not features.is_floating_point():
            raise TypeError(f"features must be a float tensor [B, T, 1+P, D], but is {_describe(features)}")
        if features.ndim != 4 or features.shape[2:] != (config.rows, config.hidden_size):
            rows = "1+P+R" if config.num_register_tokens else "1+P"
            raise ValueError(
                f"features must be [B, T, {rows}, D] = [any, any, {config.rows}, {config.hidden_size}], but the "
                f"shape is {list(features.shape)}"
            )
        if features.shape[1] < 1:
            raise ValueError("features must hold at least one frame, but T is 0")
        if self.tower.device not in (None, features.device):
            raise ValueError(f"features must be on the model's {self.tower.device}, but is on {features.device}")
        if not self.tower.first_layer <= start <= self.first_branch_layer:
            raise ValueError(
                f"start_layer must lie in [{self.tower.first_layer}, {self.first_branch_layer}], but is {start}"
            )
        return features

    def _final_norm(self, tokens: Tensor) -> Tensor:
        norm = self.tower.final_norm
        if not is_plain(norm):
            return norm(tokens.to(self.tower.dtype))
        with torch.autocast(tokens.device.type, enabled=False):  # CUDA's casts all operands to float32
            return norm(tokens.to(self.tower.dtype))

    def _project(self, tokens: Tensor) -> Tensor:
        return self.tower.project(tokens.to(self.tower.dtype))

    def check_pixels(self, pixel_values: Any, legend: str = "[B, T, 3, h, w]") -> None:
        """Raise a TypeError or ValueError unless ``pixel_values`` are frames for this tower; legend: their shape."""
        if self.stored_features:
            raise ValueError("this model holds no tower embeddings: give video_tokens stored features, not pixels")
        if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
            raise TypeError(f"pixel_values must be a float tensor {legend}, but is {_describe(pixel_values)}")
        size = self.vision_config.image_size
        wanted = (3, size, size)
        if pixel_values.ndim != legend.count(",") + 1 or tuple(pixel_values.shape[-3:]) != wanted:
            raise ValueError(
                f"pixel_values must be {legend} ending in {list(wanted)}, but the shape is {list(pixel_values.shape)}"
            )
        if pixel_values.ndim == 5 and pixel_values.shape[1] < 1:
            raise ValueError("pixel_values must hold at least one frame, but T is 0")
        if self.tower.device not in (None, pixel_values.device):
            raise ValueError(
                f"pixel_values must be on the model's {self.tower.device}, but is on {pixel_values.device}"
            )

    def _check_visible(self, visible: VisibleTokens, batch: int, frames: int) -> None:
        patches = self.vision_config.patches
        if not isinstance(visible, VisibleTokens):
            raise TypeError(f"visible must be a VisibleTokens, but is {_describe(visible)}")
        if (visible.batch, visible.patches, visible.frames) != (batch, patches, frames):
            raise ValueError(
                f"visible is for {visible.batch} videos of {visible.frames} frames and {visible.patches} patches, but "
                f"pixel_values holds {batch} of {frames} and {patches}"
            )
        check_trained(self.config, visible)


def _is_plain_head(head: nn.Module) -> bool:
    """Whether the alignment head is an unmodified linear layer and LayerNorm with all their parameters."""
    if why_not_all_plain(head, (nn.Sequential,)) is not None:
        return False
    return all(getattr(part, name, None) is not None for part in head.children() for name in ("weight", "bias"))


def _describe(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
