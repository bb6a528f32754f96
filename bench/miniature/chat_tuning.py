"""The miniature's chat model: one that is set back before every tuning, its warm start, its tuning, its answers."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from miniature.chat_questions import APPEARANCE, PHRASINGS, TEMPORAL, answers, parse, truth, turn, type_of
from miniature.probes import Probe
from miniature.scenes import EVENTS
from torch import Tensor, nn

from bt_adapter import BTAdapterVisionModel
from bt_adapter.chat.attach import attach, attached_branch, branch_enabled
from bt_adapter.mini import lora, training
from bt_adapter.mini.answers import score, visual_tokens
from bt_adapter.mini.clip import normalise
from bt_adapter.mini.questions import Turn
from bt_adapter.mini.trees import Prompts
from bt_adapter.mini.tune import answer_loss, parameter_groups, word_embeddings

RATES = {"lr": 1e-3, "lr_lora": 5e-4, "lr_branch": 3e-4}
STRENGTH = 0.25  # of the warm start: at 1, object answers fall before any tuning
RANK = 8
Told = dict[str, dict[str, list[bool]]]  # {type: {"generated" or "likelihood": right or wrong of each question}}
ALSO = 3  # every so many clips of a type are asked for object and colour too


@dataclass(frozen=True)
class Setting:
    """One configuration: the branch on or off when asked, what learns from questions before, and from which.

    learns: "projector", "branch", "adapters". stills: from questions about long exposures, no video among them; the
    branch is off while they are asked. warm: the projector starts from `warm_start` on the same clips or stills.
    stage: nothing is tuned here, and the shipped weights of this name are asked (`bt_adapter.mini.llava.STAGES`).
    """

    branch: bool
    learns: tuple[str, ...] = ()
    stills: bool = False
    warm: bool = True
    stage: str = "projector"


@dataclass(frozen=True)
class Pool:
    """What a seed trains on: clips uint8 [n, 8, 3, 48, 48] or stills [n, 1, 3, 48, 48], and labels int64 [n, 3].

    Counterparts are neighbours. tokens: what the projector gets of them, branch off and, of clips, on:
    {False: [n, P+1, D], True: [n, P+1, D]}.
    """

    frames: Tensor
    labels: Tensor
    tokens: dict[bool, Tensor]


class Stand:
    """The image chat model, set back to how it was (and to a fresh copy of the branch) before each setting."""

    def __init__(self, chat: Any, prompts: Prompts, branch: str | Path) -> None:
        """branch: the folder of a pretrained one for the chat model's tower."""
        self.chat, self.prompts, self.branch = chat.eval(), prompts, branch
        self.projector = copy.deepcopy(chat.model.multi_modal_projector.state_dict())
        self.reset()

    @property
    def vision(self) -> BTAdapterVisionModel:
        return attached_branch(self.chat)

    def reset(self, projector: dict[str, Tensor] | None = None, adapters_seed: int | None = None) -> None:
        """Set back; projector: its weights, None: the image chat model's. adapters_seed: with fresh adapters."""
        model = self.chat.model
        lora.remove_adapters(model.language_model)
        model.multi_modal_projector.load_state_dict(self.projector if projector is None else projector)
        self.chat.requires_grad_(False)
        attach(self.chat, self.branch)
        model.bt_adapter.requires_grad_(False)
        if adapters_seed is not None:
            torch.manual_seed(adapters_seed)
            lora.add_adapters(model.language_model, RANK)


def event_directions(stand: Stand) -> Tensor:
    """What stands for each event among word embeddings: [events, D] of unit length, at right angles (as far as can be).

    The nearest such set to the events' own words: "left" of "moving left", "Left" of "moving left then right".
    """
    names = []
    for event in EVENTS:
        first, _, last = event.phrase.removeprefix("moving ").partition(" then ")
        names.append(first.capitalize() if last else first)
    words = word_embeddings(stand.chat, stand.prompts, names)
    left, _, right = torch.linalg.svd(F.normalize(words - words.mean(0), dim=-1), full_matrices=False)
    return left @ right


@torch.no_grad()
def warm_start(stand: Stand, pool: Pool, branch: bool) -> dict[str, Tensor]:
    """A projector that also writes a direction for the event into every token; no question, no language model run.

    In closed form, from the clips' labels: a probe of the projector's pooled hidden values finds the event, and its map
    times `event_directions` is added to the second layer, STRENGTH times as strong as all else in which clips differ.
    """
    stand.reset()
    projector = copy.deepcopy(stand.chat.model.multi_modal_projector)
    hidden = projector.act(projector.linear_1(pool.tokens[branch])).mean(1)
    probe = Probe(hidden, pool.labels[:, 2], len(EVENTS))
    pooled = projector.linear_2(hidden)
    strength = STRENGTH * (pooled - pooled.mean(0)).norm(dim=1).mean()
    added = ((probe.weight / probe.std[:, None]) @ (strength * event_directions(stand)).double()).T
    projector.linear_2.weight += added.to(pooled.dtype)
    projector.linear_2.bias -= (added @ probe.mean).to(pooled.dtype)
    return dict(projector.state_dict())


def draw_batch(pool: Pool, step: int, batch: int, seed: int) -> tuple[Tensor, list[list[Turn]]]:
    """Rows of the pool, in whole pairs, and turns about each; the same for every setting of a seed.

    A question of object, for every third pair of colour, follows the temporal one.
    """
    pairs = len(pool.labels) // 2
    epoch, place = divmod(step * batch // 2, pairs // (batch // 2) * (batch // 2))
    order = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
    first = order[place : place + batch // 2] * 2
    rows = torch.stack([first, first + 1], 1).flatten()
    generator = torch.Generator().manual_seed(seed * 1_000_003 + 500_000 + step)
    of_type = type_of(pool.labels[rows])
    turns = []
    for i, label in enumerate(pool.labels[rows].tolist()):
        kind = next(name for name, chosen in of_type.items() if chosen[i])
        also = tuple(APPEARANCE)[(step + i // 2) % 3 == 2]
        turns.append([turn(kind, label, generator), turn(also, label, generator)])
    return rows, turns


def tune(stand: Stand, setting: Setting, pool: Pool, steps: int, batch: int, seed: int) -> tuple[float, list[float]]:
    """Tune what the setting says on the pool's questions, with the loss on the answers alone.

    The stand is as `Stand.reset` left it. Returns CPU seconds, and the mean loss of the temporal answers in each tenth
    of the steps.
    """
    chat = stand.chat
    options = argparse.Namespace(stage="tuned" if "branch" in setting.learns else "control", **RATES)
    optimizer = training.adamw(parameter_groups(chat, options), 0.01)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    projector = chat.model.multi_modal_projector
    began, losses = time.process_time(), []
    on = setting.branch and not setting.stills
    with branch_enabled(chat, on):
        for step in range(steps):
            training.set_rate(optimizer, training.cosine(step / steps))
            rows, turns = draw_batch(pool, step, batch, seed)
            if "branch" in setting.learns:
                visual = visual_tokens(chat, normalise(pool.frames[rows]))
            else:
                visual = projector(pool.tokens[on][rows])
            loss, first = answer_loss(chat, stand.prompts, chat.lm_head.weight, visual, turns)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            losses.append(first.item())
    tenth = max(1, steps // 10)
    means = [sum(part) / len(part) for part in (losses[i : i + tenth] for i in range(0, steps, tenth))]
    return time.process_time() - began, [round(value, 4) for value in means]


@torch.no_grad()
def ask(stand: Stand, branch: bool, frames: Tensor, labels: Tensor, seed: int) -> Told:
    """Right or wrong of every answer, {type: {"generated": [...], "likelihood": [...]}}, in one order for all settings.

    Each clip is asked the question of its event's type, every third clip also for object and colour; the phrasing goes
    by the seed.
    """
    told: Told = {}
    of_type = type_of(labels)
    with branch_enabled(stand.chat, branch):
        for kind in TEMPORAL:
            rows = of_type[kind].nonzero()[:, 0]
            also = torch.arange(len(rows)) % ALSO == 0
            for part, kinds in ((rows[also], (kind, *APPEARANCE)), (rows[~also], (kind,))):
                _ask_part(stand, frames[part], labels[part], kinds, seed, told)
    return told


def _ask_part(
    stand: Stand,
    frames: Tensor,
    labels: Tensor,
    kinds: Sequence[str],
    seed: int,
    told: dict[str, dict[str, list[bool]]],
) -> None:
    if not len(labels):
        return
    visual = visual_tokens(stand.chat, normalise(frames))
    asked = [(kind, PHRASINGS[kind][seed % len(PHRASINGS[kind])]) for kind in kinds]
    for kind, scores in zip(kinds, score(stand.chat, stand.prompts, visual, asked, answers_of=answers), strict=True):
        right = truth(kind, labels)
        own = told.setdefault(kind, {"generated": [], "likelihood": []})
        said = [parse(kind, text) for text in scores.generated]
        own["generated"] += [a == b for a, b in zip(said, right.tolist(), strict=True)]
        own["likelihood"] += (scores.likelihood.argmax(1) == right).tolist()
