"""Answers of the mini stack to questions about held-out clips, and what the branch is worth in them.

Primary score: the greedily generated answer, parsed for what it says (`questions.parse`). Second score: the answer of
the highest likelihood among all of its kind. Four systems answer the same questions about the same clips, which are
composed of the shipped items (in no training split):

- ``image``: the image chat model on the mean of the frames;
- ``untuned``: the same with the pretrained branch; no question about a video in its training;
- ``tuned``: projector, adapters and branch tuned on questions about moving clips;
- ``control``: the same tuning, seeds and clips with the branch off, on the mean of the frames.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, LlavaForConditionalGeneration

from bt_adapter.chat.attach import attach, branch_enabled
from bt_adapter.chat.conversation import cache_option
from bt_adapter.model import BTAdapterVisionModel

from . import questions
from .clip import load_clip, normalise
from .items import load_items
from .llava import branch_folder, load_chat
from .retrieval import mcnemar
from .scenes import MOTIONS, clips, random_labels
from .trees import Prompts, TreeBatch, collate, hidden_states

SYSTEMS = {
    "image": ("projector", False),
    "untuned": ("projector", True),
    "tuned": ("tuned", True),
    "control": ("control", False),
}
KINDS = ("motion", "item", "colour")


class Scores(NamedTuple):
    """Of one question to B visuals: likelihood float [B, answers], and each greedily generated answer."""

    likelihood: Tensor
    generated: list[str]


def visual_tokens(chat: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Stills [B, 3, h, w] or clips [B, T, 3, h, w] -> what the language model sees of them, [B, V, D]."""
    layer, select = chat.config.vision_feature_layer, chat.config.vision_feature_select_strategy
    features = chat.model.get_image_features(pixels, vision_feature_layer=layer, vision_feature_select_strategy=select)
    return torch.stack(list(features.pooler_output))


@torch.no_grad()
def score(
    chat: LlavaForConditionalGeneration,
    prompts: Prompts,
    visual: Tensor,
    asked: Sequence[tuple[str, str]],
    max_new_tokens: int = 12,
    answers_of: Callable[[str], Sequence[str]] | None = None,
) -> list[Scores]:
    """Ask every visual [B, V, D] each (kind, question) of asked, in one pass; answers_of(kind): its possible answers
    (default: those of ``questions``).

    All answers of a kind hang on its question as a tree that shares beginnings. Their likelihoods are read off it, and
    so is the greedy generation, token by token, as long as it follows the tree; where it leaves it, it goes on alone.
    An answer that follows the tree to its full stop is taken to end there.
    """
    tree, trunk = prompts.trunk(visual.shape[1])
    hung = []  # of each question: the node its answers hang on; of each answer its tokens and the nodes they follow
    for kind, question in asked:
        last = prompts.question(tree, trunk, question)
        hung.append(
            (last, [prompts.answer(tree, last, text, end=False) for text in (answers_of or questions.answers)(kind)])
        )
    batch = collate([tree], prompts.image_token)
    hidden, cache = hidden_states(chat, batch.expand(len(visual)), visual, keep=True)

    results = []
    for last, answers in hung:
        inner = sorted({node for _, nodes in answers for node in nodes})
        place = {node: i for i, node in enumerate(inner)}
        log_p = chat.lm_head(hidden[:, inner]).log_softmax(-1)  # [B, inner, vocabulary]
        columns = [(torch.tensor([place[node] for node in nodes]), torch.tensor(ids)) for ids, nodes in answers]
        likelihood = torch.stack([log_p[:, rows, ids].sum(1) for rows, ids in columns], dim=1)
        follow = {
            (node, token): after
            for ids, nodes in answers
            for node, token, after in zip(nodes[:-1], ids[:-1], nodes[1:], strict=True)
        }
        ends = {(nodes[-1], ids[-1]) for ids, nodes in answers}
        walks = [_walk(follow, ends, last, dict(zip(inner, row, strict=True))) for row in log_p.argmax(-1).tolist()]
        astray = [i for i, walk in enumerate(walks) if walk[1] is not None]
        said = [ids for ids, _ in walks]
        if astray:
            nodes = [node for _, node in walks if node is not None]
            rest = _go_on(
                chat, prompts, batch, copy.deepcopy(cache), astray, nodes, [said[i][-1] for i in astray], max_new_tokens
            )
            for i, ids in zip(astray, rest, strict=True):
                said[i] = (said[i] + ids)[:max_new_tokens]
        texts = [str(prompts.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said]
        results.append(Scores(likelihood, texts))
    return results


def _walk(
    follow: dict[tuple[int, int], int], ends: set[tuple[int, int]], node: int, best: dict[int, int]
) -> tuple[list[int], int | None]:
    """Greedy decoding down the tree: the tokens, and where the last of them left it (None: an answer's end was met)."""
    found = []
    while True:
        token = best[node]
        found.append(token)
        if (node, token) in ends:
            return found, None
        if (node, token) not in follow:
            return found, node
        node = follow[node, token]


def _go_on(
    chat: LlavaForConditionalGeneration,
    prompts: Prompts,
    batch: TreeBatch,
    cache: Cache,
    rows: list[int],
    nodes: list[int],
    tokens: list[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy decoding of `rows` on from tokens that follow `nodes` of the tree; what comes after these tokens."""
    cache.batch_select_indices(torch.tensor(rows))
    seen = batch.mask[0, 0, nodes]  # [n, S]: a row sees its own path through the tree, and what it says now
    depth = batch.positions[0, nodes]
    token, end = torch.tensor(tokens), prompts.tokenizer.eos_token_id
    said: list[list[int]] = [[] for _ in rows]
    open_rows = [t != end for t in tokens]
    for step in range(1, max_new_tokens):
        if not any(open_rows):
            break
        seen = torch.cat([seen, torch.ones(len(rows), 1, dtype=torch.bool)], 1)
        hidden = chat.model.language_model(
            inputs_embeds=chat.get_input_embeddings()(token)[:, None],
            attention_mask=seen[:, None, None],
            position_ids=(depth + step)[:, None],
            use_cache=True,
            **cache_option(chat.model.language_model, cache),
        ).last_hidden_state
        token = chat.lm_head(hidden[:, -1]).argmax(-1)
        for i, value in enumerate(token.tolist()):
            if open_rows[i]:
                said[i].append(value)
                open_rows[i] = value != end
    return said


@torch.no_grad()
def generate(
    chat: LlavaForConditionalGeneration, prompts: Prompts, visual: Tensor, question: str, max_new_tokens: int = 12
) -> list[str]:
    """Greedy answers to one question about each visual [B, V, D]."""
    tree, trunk = prompts.trunk(visual.shape[1])
    prompts.question(tree, trunk, question)
    ids = torch.tensor([tree.ids]).expand(len(visual), -1)
    embeds = chat.get_input_embeddings()(ids)
    places = (ids == prompts.image_token)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
    attention = torch.ones_like(ids)
    out = chat.generate(inputs_embeds=embeds, attention_mask=attention, max_new_tokens=max_new_tokens, do_sample=False)
    return prompts.tokenizer.batch_decode(out, skip_special_tokens=True)


def held_out(
    each: int = 30, seed: int = 2309, split: str = "shipped", data: str | None = None
) -> tuple[Tensor, Tensor]:
    """Clips in random order, `each` of every motion: uint8 [9·each, 8, 3, 48, 48], labels int64 [9·each, 3]."""
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(each * len(MOTIONS), True, generator)
    labels[:, 2] = torch.arange(len(MOTIONS)).repeat_interleave(each)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return clips(load_items(split, data), len(labels), generator=generator, labels=labels)


def ask_all(
    chat: LlavaForConditionalGeneration,
    prompts: Prompts,
    frames: Tensor,
    labels: Tensor,
    kinds: Sequence[str] = KINDS,
    others: int = 3,
    batch: int = 30,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Questions of the first kind about every clip (or still), of the other kinds about every `others`-th (0: none).

    Phrasings take turns, a batch each. Returns {"motion": {"generated": bool [n], "likelihood": bool [n], "label":
    int64 [n], "said": int64 [n], -1 where nothing was}, "item": …, "colour": …}.
    """
    told: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {kind: [] for kind in kinds}
    order = torch.arange(len(frames))
    also = order % others == 0 if others else torch.zeros(len(frames), dtype=torch.bool)
    groups = [(part, kinds) for part in order[also].split(batch)] + [
        (part, kinds[:1]) for part in order[~also].split(batch)
    ]
    for turn, (part, own) in enumerate(groups):
        if not len(part):
            continue
        asked = [(kind, questions.QUESTIONS[kind][turn % len(questions.QUESTIONS[kind])]) for kind in own]
        with torch.no_grad():
            visual = visual_tokens(chat, normalise(frames[part]))
        for kind, scores in zip(own, score(chat, prompts, visual, asked), strict=True):
            truth = labels[part, {"item": 0, "colour": 1, "motion": 2}[kind]]
            said = torch.tensor([-1 if (v := questions.parse(kind, text)) is None else v for text in scores.generated])
            told[kind].append((truth, said, scores.likelihood.argmax(1)))
        if progress:
            progress(len(part))
    result = {}
    for kind, parts in told.items():
        if parts:
            truth, said, likely = (torch.cat(column) for column in zip(*parts, strict=True))
            result[kind] = {"generated": said == truth, "likelihood": likely == truth, "label": truth, "said": said}
    return result


def load_system(name: str) -> tuple[LlavaForConditionalGeneration, Prompts, bool]:
    """One of SYSTEMS with its branch attached (the pretrained one where it is off): chat model, prompts, branch on."""
    stage, branch_on = SYSTEMS[name]
    chat, tokenizer = load_chat(stage)
    clip, _ = load_clip()
    attach(chat, BTAdapterVisionModel.from_pretrained(branch_folder(stage), clip=clip))
    return chat, Prompts(tokenizer, chat.config.image_token_id), branch_on


def evaluate(each: int = 30, seed: int = 2309, progress: Callable[[str, int], None] | None = None) -> dict:
    """All systems on the same held-out clips: accuracies overall and per motion, and paired tests. Plain data."""
    frames, labels = held_out(each, seed)
    answers = {}
    for name in SYSTEMS:
        chat, prompts, branch_on = load_system(name)
        with branch_enabled(chat, branch_on):
            answers[name] = ask_all(
                chat, prompts, frames, labels, progress=progress and (lambda n, s=name: progress(s, n))
            )
    systems = {
        name: {kind: _accuracy(kind, value) for kind, value in result.items()} for name, result in answers.items()
    }
    pairs = (("tuned", "control"), ("tuned", "image"), ("untuned", "image"))
    tests = {
        f"{a} against {b}": {
            way: _paired(answers[a]["motion"][way], answers[b]["motion"][way]) for way in ("generated", "likelihood")
        }
        for a, b in pairs
    }
    return {"clips": len(frames), "seed": seed, "primary": "generated", "systems": systems, "mcnemar": tests}


def _accuracy(kind: str, result: dict[str, Tensor]) -> dict:
    values: dict[str, Any] = {"n": len(result["label"])}
    for way in ("generated", "likelihood"):
        values[way] = round(result[way].float().mean().item(), 4)
    if kind == "motion":
        values["per_motion"] = {
            name: {
                "n": int((result["label"] == i).sum()),
                "generated": round(result["generated"][result["label"] == i].float().mean().item(), 4),
            }
            for i, name in enumerate(MOTIONS)
        }
    return values


def _paired(a: Tensor, b: Tensor) -> dict[str, float | int]:
    """Successes of one alone, of the other alone, and p of the exact two-sided McNemar test."""
    return {"only_first": int((a & ~b).sum()), "only_second": int((b & ~a).sum()), "p": mcnemar(a, b)}
