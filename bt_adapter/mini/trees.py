"""Several questions and answers after one image or video, in one pass of the language model.

A sequence is a tree of tokens: each attends to itself and its ancestors, and stands at its depth. The visual prefix is
the trunk and is computed once; questions branch off it without seeing each other, and answers that begin alike share
their beginning. The result for every path is what a pass over that path alone would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, LlavaForConditionalGeneration
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from bt_adapter.chat.conversation import cache_option

from .questions import Turn


class TokenTree:
    """Tokens with their parents (-1: none). targets: (node, token to follow, turn), where a loss is wanted."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.parents: list[int] = []
        self.targets: list[tuple[int, int, int]] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, parent: int, ids: Sequence[int], share: bool = False) -> list[int]:
        """Append a chain of tokens below parent and return their nodes; share: along nodes that are there already."""
        nodes = []
        for token in ids:
            node = self._children.get((parent, token)) if share else None
            if node is None:
                node = len(self.ids)
                self.ids.append(token)
                self.parents.append(parent)
                self._children[parent, token] = node
            nodes.append(node)
            parent = node
        return nodes


class TreeBatch(NamedTuple):
    """ids, positions int64 [B, S]; mask bool [B, 1, S, S], True: row may see column. Padding sees itself alone."""

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor

    def expand(self, size: int) -> TreeBatch:
        """The one tree of this batch, `size` times over."""
        return TreeBatch(*(value.expand(size, *value.shape[1:]) for value in self))


class Prompts:
    """Turns the mini chat's parts into token ids; the pieces join into exactly what its chat template gives."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token: int) -> None:
        self.tokenizer, self.image_token = tokenizer, image_token
        self.start = self._ids("<|im_start|>user\n")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def trunk(self, visual_tokens: int) -> tuple[TokenTree, int]:
        """A tree with the user's opening and the visual tokens; the node questions hang on."""
        tree = TokenTree()
        return tree, tree.add(-1, self.start + [self.image_token] * visual_tokens)[-1]

    def question(self, tree: TokenTree, parent: int, question: str) -> int:
        """Add a question; the node answers hang on."""
        return tree.add(parent, self._ids(f"{question}<|im_end|>\n<|im_start|>assistant\n"))[-1]

    def answer(self, tree: TokenTree, parent: int, text: str, end: bool = True) -> tuple[list[int], list[int]]:
        """Add an answer below a question, along nodes that are there already.

        Its tokens (with the end of the turn, unless end is False), and for each the node it follows. The last token is
        only ever predicted and gets no node.
        """
        ids = self._ids(f"{text}<|im_end|>" if end else text)
        return ids, [parent, *tree.add(parent, ids[:-1], share=True)]

    def turns(self, turns: Sequence[Turn], visual_tokens: int) -> TokenTree:
        """A training example: every answer's tokens are targets, and nothing else is."""
        tree, trunk = self.trunk(visual_tokens)
        for number, turn in enumerate(turns):
            last = self.question(tree, trunk, turn.question)
            ids, nodes = self.answer(tree, last, turn.answer)
            tree.targets += [(node, token, number) for node, token in zip(nodes, ids, strict=True)]
        return tree


def collate(trees: Sequence[TokenTree], pad: int) -> TreeBatch:
    """Trees of any size -> one batch, padded at the end."""
    size = max(len(tree.ids) for tree in trees)
    ids = torch.full((len(trees), size), pad)
    positions = torch.zeros(len(trees), size, dtype=torch.int64)
    mask = torch.eye(size, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        ids[row, : len(tree.ids)] = torch.tensor(tree.ids)
        depth = [0] * len(tree.ids)
        for node, parent in enumerate(tree.parents):
            if parent >= 0:
                depth[node] = depth[parent] + 1
                mask[row, node] |= mask[row, parent]
        positions[row, : len(tree.ids)] = torch.tensor(depth)
    return TreeBatch(ids, positions, mask[:, None])


def hidden_states(
    chat: LlavaForConditionalGeneration, batch: TreeBatch, visual: torch.Tensor, keep: bool = False
) -> tuple[torch.Tensor, Cache | None]:
    """Last hidden states [B, S, D] of the language model, and its cache if it is to be kept.

    visual [B, V, D] takes the image tokens' places.
    """
    embeds = chat.get_input_embeddings()(batch.ids)
    places = (batch.ids == chat.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
    model = chat.model.language_model
    cache = DynamicCache() if keep else None
    options = {} if cache is None else cache_option(model, cache)
    out = model(
        inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=keep, **options
    )
    return out.last_hidden_state, cache
