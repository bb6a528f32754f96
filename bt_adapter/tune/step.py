"""Conversations to the loss on their answers."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from bt_adapter.chat.attach import attached_branch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.data import normalise
from bt_adapter.errors import CommandError
from bt_adapter.tune.batches import Part
from bt_adapter.tune.loss import answer_loss
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.tokens import IGNORED


class Tuning:
    """A chat model as it is trained.

    Args:
        chat: with a branch. recipe: packing, precision and chunk sizes.

    Raises:
        CommandError: the chat model's visual tokens depend on the question, or its language model is no decoder alone.
    """

    def __init__(self, chat: VideoChat, recipe: TuneRecipe) -> None:
        if chat.family.needs_question:
            raise CommandError(f"--model of kind {chat.family.name}: its visual tokens depend on the question")
        if chat.model.config.get_text_config().is_encoder_decoder:
            raise CommandError("--model has a language model with an encoder; tuning is for decoders alone")
        self.chat, self.recipe, self.family = chat, recipe, chat.family
        self.model = attached_branch(chat.model)
        self.pad = chat.tokenizer.pad_token_id or 0  # never attended to

    def loss(self, part: Part) -> Tensor:
        """Sum over the answer tokens of a part of their cross-entropy: a scalar, in float32 at least."""
        device = self.chat.device
        with torch.autocast(device.type, getattr(torch, self.recipe.precision), enabled=self._is_half):
            embeds, targets, options = self._inputs(part)
            hidden = self.family.language_model(inputs_embeds=embeds, use_cache=False, **options).last_hidden_state
            places = (targets != IGNORED).nonzero(as_tuple=True)  # on the CPU: the device is not waited for
            rows, columns = (index.to(device) for index in places)
            head: Any = self.family.lm_head
            return answer_loss(hidden[rows, columns], targets[places].to(device), head, self.recipe.head_chunk)

    @property
    def _is_half(self) -> bool:
        return self.recipe.precision != "float32"

    def _inputs(self, part: Part) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Embeddings ``[B, S, W]``, targets ``[B, S]`` on the CPU, and what else the language model is given."""
        device = self.chat.device
        if self.recipe.packing:
            # from positions that begin anew the model's mask lets no token see another conversation
            ids, targets, positions = part.packed()
            options = {"position_ids": positions.to(device)}
        else:
            ids, targets, mask = part.padded(self.pad)
            options = {"attention_mask": mask.long().to(device)}
        ids = ids.to(device)
        embeds = self.family.input_embeddings(ids)
        if part.visuals:
            places = (ids == self.family.image_token_id)[:, :, None]
            tokens = torch.cat(self.visual_tokens(part.visuals)).to(embeds.dtype)
            embeds = embeds.masked_scatter(places.expand_as(embeds), tokens)
        return embeds, targets, options

    def visual_tokens(self, visuals: tuple[Tensor, ...]) -> list[Tensor]:
        """What stands in the place of each video or still, ``[V, W]`` each; those of one shape run together."""
        groups: dict[Any, list[int]] = {}
        for number, visual in enumerate(visuals):
            groups.setdefault((visual.shape, visual.dtype), []).append(number)
        found: list[Any] = [None] * len(visuals)
        for numbers in groups.values():
            own = self._encode(torch.stack([visuals[number] for number in numbers]).to(self.chat.device))
            for number, tokens in zip(numbers, own, strict=True):
                found[number] = tokens
        return found

    def _encode(self, batch: Tensor) -> list[Tensor]:
        if batch.is_floating_point():  # stored features [B, T, 1+P, D]
            return list(self.family.project(self.family.video_tokens(self.model, features=batch)))
        frames = batch.flatten(0, -4)  # [n, 3, S, S]
        pixels = normalise(frames, self.chat.mean, self.chat.std, self.model.tower.dtype)
        if batch.ndim == 5:
            videos = pixels.unflatten(0, batch.shape[:2])
            return list(self.family.project(self.family.video_tokens(self.model, videos)))
        owner, method = self.family.hook
        if method != "get_image_features":  # a Q-Former reads the tower's tokens: those of a video of one frame
            return list(self.family.project(self.model.frame_mean_tokens(pixels[:, None])))
        own = MethodType(getattr(type(owner), method), owner)
        return self.family.stills(own, list(pixels), [None] * len(pixels), {"return_dict": True})
