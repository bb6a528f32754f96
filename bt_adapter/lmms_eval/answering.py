"""Answer the conversations of lmms-eval's tasks in batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bt_adapter.chat.conversation import Visual, answer_batch, check_context, context
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.prompts import conversation_ids
from bt_adapter.chat.session import load, sampling_of
from bt_adapter.chat.settings import ChatModel
from bt_adapter.chat.watch import Sampling, encode_image, watch
from bt_adapter.data import VideoError
from bt_adapter.lmms_eval.conversations import Asked, Medium
from bt_adapter.lmms_eval.generation import Generation


class Answerer:
    """A chat model that answers conversations, with the tokens of the latest files kept.

    Args:
        chat: the model.
        sampling: how videos are sampled.
        batch_size: conversations that are answered at once, and files whose tokens are kept.
    """

    def __init__(self, chat: VideoChat, sampling: Sampling, batch_size: int = 1) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be a positive int, but is {batch_size}")
        self.chat, self.sampling, self.batch_size = chat, sampling, batch_size
        self._kept: OrderedDict[Any, Visual] = OrderedDict()

    @staticmethod
    def load(command: ChatModel, batch_size: int = 1) -> Answerer:
        """Load the model that options describe, as the command line does it. Raises CommandError."""
        command.check()
        return Answerer(load(command), sampling_of(command), batch_size)

    def answer(self, asked: Sequence[Asked], generations: Sequence[Generation]) -> list[tuple[str, int]]:
        """Answer conversations greedily; those of the same options run in batches.

        Returns:
            For each conversation its answer, and the number of tokens of its prompt.

        Raises:
            VideoError: a file cannot be read. ValueError: a conversation is too long for the model, or has no prompt.
        """
        groups: dict[Generation, list[int]] = {}
        for number, generation in enumerate(generations):
            groups.setdefault(generation, []).append(number)
        found: dict[int, tuple[str, int]] = {}
        for generation, numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [self._prompt(asked[number], generation.max_new_tokens) for number in batch]
                texts = answer_batch(self.chat.model, self.chat.tokenizer, prompts, generation.max_new_tokens)
                for number, text, (ids, _) in zip(batch, texts, prompts, strict=True):
                    found[number] = generation.cut(text), len(ids)
        return [found[number] for number in range(len(asked))]

    def _prompt(self, asked: Asked, max_new_tokens: int) -> tuple[list[int], list[Visual]]:
        question = asked.turns[-1].question
        visuals = [self._encode(medium).for_question(question) for medium in asked.media]
        lengths = [len(visual.tokens) for visual in visuals]
        ids = conversation_ids(self.chat.processor, asked.turns, lengths)
        check_context(context(self.chat.model), len(ids), sum(lengths), max_new_tokens)
        return ids, visuals

    def _encode(self, medium: Medium) -> Visual:
        key = medium.key
        if key is None:
            return self._encode_new(medium)
        if key not in self._kept:
            self._kept[key] = self._encode_new(medium)
            if len(self._kept) > self.batch_size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    @torch.no_grad()
    def _encode_new(self, medium: Medium) -> Visual:
        source = medium.source
        if medium.kind == "image":
            if isinstance(source, str):
                return encode_image(self.chat, source)
            pixels = torch.from_numpy(np.array(source.convert("RGB")))
            return self.chat.encode_image(pixels.permute(2, 0, 1))
        if not isinstance(source, str):
            raise VideoError(f"a video must be a file's name, but is {type(source).__name__}")
        return watch(self.chat, self.sampling.open(source, medium.start, medium.end), self.sampling)
