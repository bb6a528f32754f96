"""Collate chat messages with stills and videos into batches, for transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bt_adapter.chat.native.template import text_ids

_IGNORED = -100  # label that the loss ignores


class VideoChatCollator:
    """A collator of conversations; only the assistant's messages contribute to the loss.

    Each example has ``messages`` (roles "user" and "assistant", parts of type "text", "image" and "video"), or
    ``prompt`` and ``completion`` that together form such messages. Videos are decoded here, in the loader's workers.

    Args:
        processor: of a video chat model.
        num_frames: number of frames per video; None: the processor's default.
    """

    def __init__(self, processor: Any, num_frames: int | None = None) -> None:
        self.processor, self.num_frames = processor, num_frames

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a right-padded batch of inputs for the model's ``forward``, with ``labels``.

        Raises:
            ValueError: an example has no messages, or the answers cannot be located in the text that the chat template
                writes.
        """
        conversations = [self._messages(example) for example in examples]
        options = {} if self.num_frames is None else {"num_frames": self.num_frames}
        batch = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "right", **options},
        )  # fmt: skip
        labels = torch.full_like(batch["input_ids"], _IGNORED)
        for row, conversation in enumerate(conversations):
            ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())]
            for begin, end in self._answers(conversation, ids.tolist()):
                labels[row, begin:end] = ids[begin:end]
        return {**batch, "labels": labels}

    @staticmethod
    def _messages(example: dict[str, Any]) -> list[dict[str, Any]]:
        messages = example.get("messages") or [*(example.get("prompt") or []), *(example.get("completion") or [])]
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise ValueError(f"an example must have messages, or prompt and completion, but has {sorted(example)}")
        return messages

    def _answers(self, messages: list[dict[str, Any]], ids: list[int]) -> list[tuple[int, int]]:
        """Locate the assistant's messages in the ids of a conversation, as (begin, end) indices."""
        whole = self._ids_of(messages)
        places = self._places(whole, ids)
        found = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._ids_of(messages[:number], add_generation_prompt=True)
            after = self._ids_of(messages[: number + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after:
                raise ValueError(
                    "the chat template or the tokenizer writes the start of a conversation differently when more turns "
                    f"follow, so the tokens of the answer {message['content']!r} cannot be located"
                )
            found.append((places[len(before)], places[len(after)]))
        return found

    def _ids_of(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Tokenize messages with one token per visual."""
        text = self.processor.apply_chat_template(messages, **options)
        return text_ids(self.processor.tokenizer, text)

    def _places(self, short: list[int], ids: list[int]) -> list[int]:
        """Map each index of ``short``, and its end, to the index in ``ids``, where visuals have many tokens."""
        tokenizer = self.processor.tokenizer
        visual = {tokenizer.convert_tokens_to_ids(str(self.processor.image_token)), self.processor.video_token_id}
        places, place = [], 0
        for number, token in enumerate(short):
            places.append(place)
            if token not in visual:
                place += 1
            elif number + 1 == len(short) or short[number + 1] != token:  # the last of adjacent visuals
                while place < len(ids) and ids[place] == token:
                    place += 1
        return [*places, place]
