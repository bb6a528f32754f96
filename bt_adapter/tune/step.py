"""The loss of conversations on their answers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.data import normalise
from bt_adapter.data.devices import to_device
from bt_adapter.errors import CommandError
from bt_adapter.model.adapter import BTAdapterVisionModel
from bt_adapter.model.drop_path import draw_kept
from bt_adapter.model.dtypes import autocast
from bt_adapter.model.time_steps import plan_steps
from bt_adapter.tune.batches import Part
from bt_adapter.tune.loss import answer_loss
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.tokens import IGNORED


class Tuning:
    """Computes the loss of a chat model.

    Args:
        chat: chat model with a branch. recipe: packing, dtype and chunk sizes.

    Raises:
        CommandError: the chat model's visual tokens depend on the question, its language model has an encoder, or
            packed conversations attend to one another in it.
    """

    def __init__(self, chat: VideoChat, recipe: TuneRecipe) -> None:
        if chat.family.needs_question:
            raise CommandError(f"--model of kind {chat.family.name}: its visual tokens depend on the question")
        if chat.model.config.get_text_config().is_encoder_decoder:
            raise CommandError("--model has a language model with an encoder; tuning is for decoders alone")
        self.chat, self.recipe, self.family = chat, recipe, chat.family
        self.pad = chat.tokenizer.pad_token_id or 0  # the mask hides it
        self._masked = False  # whether packed conversations need a mask beside their positions
        if recipe.packing and self._leaks():
            self._masked = True
            if self._leaks():
                raise CommandError(
                    f"--packing: in {type(self.family.language_model).__name__} conversations of one row attend to one "
                    "another; leave it out"
                )

    @property
    def model(self) -> BTAdapterVisionModel:
        """Tower and branch."""
        return attached_branch(self.chat.model)

    def loss(self, part: Part) -> Tensor:
        """Sum of the cross-entropy of a part's answer tokens: a scalar, float32 or float64."""
        device = self.chat.device
        with self._autocast():
            embeds, targets, options = self._inputs(part)
            hidden = self.family.language_model(inputs_embeds=embeds, use_cache=False, **options).last_hidden_state
            places = (targets != IGNORED).nonzero(as_tuple=True)  # on the CPU, so that nothing waits for the device
            rows, columns = (to_device(index, device) for index in places)
            head: Any = self.family.lm_head
            return answer_loss(hidden[rows, columns], to_device(targets[places], device), head, self.recipe.head_chunk)

    def _autocast(self) -> torch.autocast:
        return autocast(self.recipe.dtype, self.chat.device)

    def _inputs(self, part: Part) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Embeddings ``[B, S, W]``, targets ``[B, S]`` on the CPU, and further arguments of the language model."""
        device = self.chat.device
        if self.recipe.packing:
            ids, targets, positions = part.packed()
            options = self._packed(positions)
        else:
            ids, targets, mask = part.padded(self.pad)
            options = {"attention_mask": to_device(mask.long(), device)}
        ids = to_device(ids, device)
        embeds = self.family.input_embeddings(ids)
        if part.visuals:
            places = (ids == self.family.image_token_id)[:, :, None]
            tokens = torch.cat(self.visual_tokens(part.visuals, part.seeds)).to(embeds.dtype)
            embeds = embeds.masked_scatter(places.expand_as(embeds), tokens)
        return embeds, targets, options

    def _packed(self, positions: Tensor) -> dict[str, Tensor]:
        """Arguments that separate the conversations of one row ``[1, S]``.

        For most models position ids that restart at 0 suffice: they derive a mask or sequence lengths from them. The
        others, OPT among them, get a mask: bool ``[1, 1, S, S]``, True where a token attends to another.
        """
        positions = to_device(positions, self.chat.device)
        if not self._masked:
            return {"position_ids": positions}
        number = (positions == 0).cumsum(1)
        return {"position_ids": positions, "attention_mask": (number[:, :, None] == number[:, None]).tril()[:, None]}

    def _leaks(self) -> bool:
        """Whether packed conversations attend to one another, tested by the gradient of one to the other's tokens."""
        table = cast(Any, self.family.input_embeddings).weight
        rows = torch.randn(1, 4, table.shape[1], generator=torch.Generator().manual_seed(0))
        rows = rows.to(table).requires_grad_()
        with torch.enable_grad(), self._autocast():
            options = self._packed(torch.tensor([[0, 1, 0, 1]]))
            hidden = self.family.language_model(inputs_embeds=rows, use_cache=False, **options).last_hidden_state
        return bool(torch.autograd.grad(hidden[0, 2:, 0].sum(), rows)[0][0, :2].any())

    def visual_tokens(self, visuals: tuple[Tensor, ...], seeds: tuple[int, ...]) -> list[Tensor]:
        """Encode videos and stills to tokens, ``[V, W]`` each; those of one shape run together.

        seeds: seed of stochastic depth for each.
        """
        groups: dict[Any, list[int]] = {}
        for number, visual in enumerate(visuals):
            groups.setdefault((visual.shape, visual.dtype), []).append(number)
        found: list[Any] = [None] * len(visuals)
        for numbers in groups.values():
            batch = to_device(torch.stack([visuals[number] for number in numbers]), self.chat.device)
            encoded = self._encode(batch, [seeds[number] for number in numbers])
            for number, tokens in zip(numbers, encoded, strict=True):
                found[number] = tokens
        return found

    def _draws(self, model: BTAdapterVisionModel, frames: int, seeds: list[int]) -> list[Tensor] | None:
        """Draws of stochastic depth for videos of ``frames`` frames; None outside of training."""
        if not model.branch.training:
            return None
        steps = plan_steps(model.config, frames, self.recipe.long).steps
        return draw_kept(model.config, model.vision_config.patches, steps, seeds, self.chat.device)

    def _encode(self, batch: Tensor, seeds: list[int]) -> list[Tensor]:
        model, long = self.model, self.recipe.long
        if batch.is_floating_point():  # stored features [B, T, 1+P, D]
            draws = self._draws(model, batch.shape[1], seeds)
            return list(self.family.project(self.family.video_tokens(model, features=batch, long=long, draws=draws)))
        frames = batch.flatten(0, -4)  # [n, 3, S, S]
        pixels = normalise(frames, self.chat.mean, self.chat.std, model.tower.dtype)
        if batch.ndim == 5:
            videos = pixels.unflatten(0, batch.shape[:2])
            draws = self._draws(model, batch.shape[1], seeds)
            branch = self.recipe.use_branch
            tokens = self.family.video_tokens(model, videos, branch=branch, long=long, draws=draws)
            return list(self.family.project(tokens))
        if self.family.has_qformer:  # reads the tower's tokens, as of a video of one frame
            return list(self.family.project(model.frame_mean_tokens(pixels[:, None])))
        return self.family.stills(list(pixels), [None] * len(pixels), {})
