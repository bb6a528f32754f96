"""The mini CLIP's text tower, tuned to tell the events' captions apart; the vision tower stays as it is.

The shipped text tower knows neither "then" nor "slowly", nor that the order of events matters. What is tuned: the
text tower of a copy, contrastively against frozen embeddings of training clips by the *mean of their frames*, which
hold the same of an event and of its counterpart and so teach nothing of what the branch is to learn, and with a hinge
on the cosines between different captions, on text alone. All systems of this benchmark, the frame mean first, read
the same captions' embeddings.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from miniature.scenes import NEW_WORDS, caption, every_label
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerFast

from bt_adapter.mini import training
from bt_adapter.mini.clip import load_clip, text_embeds
from bt_adapter.mini.items import ITEMS
from bt_adapter.mini.scenes import COLOURS, TEMPLATES

HINGE = 0.8  # cosine above which two different captions are pushed apart
APART = 4.0  # weight of that
CHUNK = 144  # captions of a step beside those without an event


def extended_clip() -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The shipped mini CLIP with rows for the new words."""
    clip, tokenizer = load_clip()
    tokenizer.add_tokens(list(NEW_WORDS))
    old = clip.text_model.embeddings.token_embedding
    new = nn.Embedding(len(tokenizer), old.embedding_dim)
    with torch.no_grad():
        new.weight.normal_(std=old.weight.std().item(), generator=torch.Generator().manual_seed(0))
        new.weight[: old.num_embeddings] = old.weight
    clip.text_model.embeddings.token_embedding = new
    return clip, tokenizer


def all_captions() -> Tensor:
    """The 48 labels without an event (-1), then the 768 of :func:`every_label`: int64 [816, 3]."""
    plain = torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor([-1]))
    return torch.cat([plain, every_label()])


def tune(
    clip: CLIPModel, tokenizer: PreTrainedTokenizerFast, images: Tensor, which: Tensor, steps: int, seed: int = 0
) -> None:
    """Tune the text tower; images [n, F] are frozen, ``which`` int64 [n] their captions' rows in all_captions()."""
    labels = all_captions()
    generator = torch.Generator().manual_seed(seed)
    named = [(name, p) for name, p in clip.named_parameters() if name.startswith("text_")]
    optimizer = training.adamw([{"named": named, "lr": 5e-4}], weight_decay=0.1)
    scale = clip.logit_scale.exp().detach()
    for step in range(steps):
        training.set_rate(optimizer, training.cosine(step / steps))
        rows = _some_rows(len(labels), generator)
        place = torch.full((len(labels),), -1)
        place[rows] = torch.arange(len(rows))
        shown = place[which] >= 0
        template = torch.randint(len(TEMPLATES), (len(rows),), generator=generator).tolist()
        words = [caption(*label, t) for label, t in zip(labels[rows].tolist(), template, strict=True)]
        texts = text_embeds(clip, tokenizer, words)
        cosine = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).T
        apart = (cosine - torch.eye(len(texts)) - HINGE).relu().sum() / len(texts)
        present, own = place[which[shown]].unique(return_inverse=True)
        loss = training.contrastive(images[shown], texts[present], own, scale) + APART * apart
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def _some_rows(count: int, generator: torch.Generator) -> Tensor:
    """All captions without an event, and whole blocks of 16 that differ in the event alone."""
    plain = len(ITEMS) * len(COLOURS)
    events = (count - plain) // plain
    blocks = torch.randperm(plain, generator=generator)[: CHUNK // events]
    rows = plain + blocks[:, None] * events + torch.arange(events)
    return torch.cat([torch.arange(plain), rows.flatten()])


@torch.no_grad()
def bank(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Embeddings of all captions in every template, float [templates, 816, F], rows as all_captions()."""
    labels = all_captions().tolist()
    return torch.stack(
        [text_embeds(clip, tokenizer, [caption(*row, t) for row in labels]) for t in range(len(TEMPLATES))]
    )
