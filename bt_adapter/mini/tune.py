"""Training of the mini chat model, in three stages; the language model's own weights stay frozen in all of them.

``python -m bt_adapter.mini.tune projector``  projector and adapters, from questions about still images
``python -m bt_adapter.mini.tune tuned``      projector, adapters and branch, from questions about moving clips
``python -m bt_adapter.mini.tune control``    the same from the same clips with the branch off

Each stage begins with a warm start (`align`) that needs no pass through the language model: the mean of the visual
tokens is drawn towards the word embeddings of what is to be seen (item, colour and, on clips, motion). It is supervised
by the scenes' labels, not by questions, and the same for ``tuned`` and ``control``. Then questions are asked, with the
loss on the answers alone.

Each step draws fresh scenes from a generator seeded by the run's seed and the step, so ``tuned`` and ``control`` see
the same clips and questions in the same order, and a resumed run sees what it would have seen.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bt_adapter.chat.attach import attach, attached_branch, branch_enabled
from bt_adapter.dtypes import choose_dtype
from bt_adapter.limits import COUNT, NATURAL, POSITIVE, numeric
from bt_adapter.model import BTAdapterVisionModel

from . import folder_argument, lora, training
from .answers import ask_all, held_out, visual_tokens
from .clip import load_clip, normalise
from .items import ITEMS, Items, load_items
from .language import load_language_model
from .llava import STAGES, load_stage, make_llava, part, save_stage
from .questions import draw_turn
from .scenes import COLOURS, MOTIONS, clips, stills, to_labels
from .trees import Prompts, collate, hidden_states

LOG = "bench/results/mini"


class _Adapters:
    """The adapters of a language model as something a run can save and resume."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return lora.adapter_state(self.model)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        lora.load_adapters(self.model, state)


def draw(stage: str, items: Items, n: int, generator: torch.Generator) -> tuple[Tensor, list[list]]:
    """n visuals (pixels of stills or clips) and the turns about each."""
    if stage == "projector":
        frames, labels = stills(items, n, generator)
        kinds: list[tuple[str, ...]] = [("item", "colour", "caption")] * n
    else:
        frames, labels = clips(items, n, generator=generator)
        second = torch.randint(3, (n,), generator=generator).tolist()
        kinds = [("motion", ("item", "colour", "caption")[k]) for k in second]
    turns = [
        [draw_turn(kind, label, generator) for kind in own] for own, label in zip(kinds, to_labels(labels), strict=True)
    ]
    return normalise(frames), turns


def answer_loss(chat, prompts: Prompts, head: Tensor, visual: Tensor, turns: list[list]) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all answer tokens, and over the first turn's alone. head: output embedding [V, D]."""
    trees = [prompts.turns(own, visual.shape[1]) for own in turns]
    hidden, _ = hidden_states(chat, collate(trees, 2), visual)
    targets = [(row, *target) for row, tree in enumerate(trees) for target in tree.targets]
    rows, nodes, tokens, number = (torch.tensor(column) for column in zip(*targets, strict=True))
    chosen = hidden[rows, nodes]
    logits = lora._HalfProduct.apply(chosen, head) if head.dtype == torch.bfloat16 else F.linear(chosen, head)
    losses = F.cross_entropy(logits, tokens, reduction="none")
    return losses.mean(), losses.detach()[number == 0].mean()


def build(options: argparse.Namespace):
    """Chat model with adapters (and the branch attached), prompts, head."""
    clip, _ = load_clip(options.clip)
    language_model, tokenizer = load_language_model()
    half = choose_dtype("auto", "cpu").dtype == torch.bfloat16 if options.half == "auto" else options.half == "yes"
    chat, tokenizer = make_llava(clip.requires_grad_(False), language_model, tokenizer)
    chat.requires_grad_(False)
    head = chat.lm_head.weight.bfloat16() if half else chat.lm_head.weight
    lora.add_adapters(chat.model.language_model, options.rank, half)
    if options.stage == "projector":
        scale_projector(chat, load_items("train", options.data))
    else:
        state = load_stage(options.start)
        chat.model.multi_modal_projector.load_state_dict(part(state, "projector."))
        if options.rank:
            lora.load_adapters(chat.model.language_model, part(state, "lora."))
        attach(chat, BTAdapterVisionModel.from_pretrained(options.branch, clip=clip))
    chat.eval()
    return chat, Prompts(tokenizer, chat.config.image_token_id), head, half


@torch.no_grad()
def scale_projector(chat, items: Items) -> None:
    """Scale a fresh projector: on stills its hidden values get unit size, its output the size of word embeddings."""
    projector = chat.model.multi_modal_projector
    images, _ = stills(items, 64, torch.Generator().manual_seed(0))
    found: dict[str, Tensor] = {}
    hook = projector.linear_1.register_forward_hook(lambda *args: found.update(size=args[2].std()))
    visual_tokens(chat, normalise(images))
    hook.remove()
    projector.linear_1.weight /= found["size"]
    projector.linear_2.weight *= chat.get_input_embeddings().weight.std() / visual_tokens(chat, normalise(images)).std()


def parameter_groups(chat, options: argparse.Namespace) -> list[dict]:
    """Named groups with their rates: projector, adapters and, where it is tuned, the branch."""
    projector = chat.model.multi_modal_projector.requires_grad_(True)
    adapters = [(n, p) for n, p in chat.model.language_model.named_parameters() if "lora_" in n]
    for _, parameter in adapters:
        parameter.requires_grad_(True)
    groups = [
        {"name": "projector", "named": list(projector.named_parameters()), "lr": options.lr},
        {"name": "adapters", "named": adapters, "lr": options.lr_lora},
    ]
    if options.stage == "tuned":
        branch = attached_branch(chat).branch
        wanted = [(n, p) for n, p in branch.named_parameters() if not n.startswith(("alignment_head", "output_gate"))]
        for _, parameter in wanted:
            parameter.requires_grad_(True)
        fast = [(n, p) for n, p in wanted if n.startswith("temporal.")]
        slow = [(n, p) for n, p in wanted if not n.startswith("temporal.")]
        groups += [
            {"name": "branch", "named": slow, "lr": options.lr_branch},
            {"name": "temporal", "named": fast, "lr": 2 * options.lr_branch},
        ]
    return [group for group in groups if group["named"]]


def train(options: argparse.Namespace) -> None:
    torch.manual_seed(options.seed)
    items = load_items("train", options.data)
    chat, prompts, head, half = build(options)
    tuned_branch = options.stage == "tuned"
    optimizer = training.adamw(parameter_groups(chat, options), weight_decay=options.weight_decay)
    language_model = chat.model.language_model
    modules = {"projector": chat.model.multi_modal_projector, "lora": _Adapters(language_model), "optimizer": optimizer}
    if tuned_branch:
        modules["branch"] = attached_branch(chat).branch
    options.half = "yes" if half else "no"
    run = training.Run(options, modules)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    sums, count = torch.zeros(2), 0
    with nullcontext() if options.stage == "projector" else branch_enabled(chat, tuned_branch):
        if run.step == 0 and options.align_steps:
            align(chat, prompts, items, options, run)
            run.pause()
        while run.progress < 1:
            training.set_rate(optimizer, training.cosine(run.progress))
            generator = torch.Generator().manual_seed(options.seed * 1_000_003 + run.step)
            pixels, turns = draw(options.stage, items, options.batch, generator)
            loss, first = answer_loss(chat, prompts, head, visual_tokens(chat, pixels), turns)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            sums += torch.stack([loss.detach(), first])
            count += 1
            run.advance()
            if run.step % options.every == 0 and run.progress < 1:
                mean = [round(v, 4) for v in (sums / count).tolist()]
                rate = round(run.step * options.batch / run.spent, 2)
                scores = {}
                if options.evaluate_every and run.step % options.evaluate_every == 0:
                    scores = check(chat, prompts, options, 10)
                run.log(progress=round(run.progress, 4), loss=mean[0], first_turn=mean[1], visuals_per_s=rate, **scores)
                sums, count = torch.zeros(2), 0
                run.pause()
        run.save()
        final = check(chat, prompts, options, 30)
    run.log(event="end", visuals=run.step * options.batch, **final)
    about = {
        "stage": options.stage,
        "steps": run.step,
        "batch": options.batch,
        "seed": options.seed,
        "rank": options.rank,
    }
    save_stage(options.out, chat.model.multi_modal_projector, language_model, about | {"held_out": final})
    if tuned_branch:
        attached_branch(chat).save_pretrained(Path(options.out) / "branch", dtype=torch.float16)


def word_embeddings(chat, prompts: Prompts, words: Iterable[str]) -> Tensor:
    """Unit vectors [n, D]: the mean embedding of each word's tokens."""
    table = chat.get_input_embeddings().weight.detach()
    rows = [table[prompts.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]].mean(0) for word in words]
    return F.normalize(torch.stack(rows), dim=-1)


def align(chat, prompts: Prompts, items: Items, options: argparse.Namespace, run: training.Run) -> None:
    """Draw the mean visual token towards the words for what is seen: cross-entropy of cosines over the words of a kind.

    A second term keeps the tokens at the size of word embeddings.
    """
    groups = [group for group in parameter_groups(chat, options) if group["name"] != "adapters"]
    optimizer = training.adamw(groups, options.weight_decay)
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    size = chat.get_input_embeddings().weight.std()
    moving = options.stage != "projector"
    words = [word_embeddings(chat, prompts, names) for names in (ITEMS, COLOURS, MOTIONS)[: 3 if moving else 2]]
    begin, sums, count = time.monotonic(), torch.zeros(len(words)), 0
    for step in range(options.align_steps):
        training.set_rate(optimizer, training.cosine(step / options.align_steps))
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + 500_000 + step)
        batch = options.align_batch
        frames, labels = clips(items, batch, generator=generator) if moving else stills(items, batch, generator)
        visual = visual_tokens(chat, normalise(frames))
        mean = F.normalize(visual.mean(1), dim=-1)
        losses = [F.cross_entropy(mean @ w.T / 0.05, labels[:, column]) for column, w in enumerate(words)]
        optimizer.zero_grad(set_to_none=True)
        (sum(losses) + (visual.std() / size).log().square()).backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        sums, count = sums + torch.stack(losses).detach(), count + 1
        if (step + 1) % 50 == 0:
            found = [round(v, 4) for v in (sums / count).tolist()]
            seconds = round(time.monotonic() - begin, 1)
            run.log(event="align", align_step=step + 1, align_seconds=seconds, losses=found)
            sums, count = torch.zeros(len(words)), 0


@torch.no_grad()
def check(chat, prompts: Prompts, options: argparse.Namespace, each: int) -> dict[str, float]:
    """Accuracies on scenes of the test split, 9·each clips or 9·each stills: generated and by likelihood."""
    if options.stage == "projector":
        items = load_items("test", options.data)
        frames, labels = stills(items, 9 * each, torch.Generator().manual_seed(77))
        told = ask_all(chat, prompts, frames, labels, ("item", "colour"), others=1)
    else:
        frames, labels = held_out(each, 77, "test", options.data)
        told = ask_all(chat, prompts, frames, labels)
    return {
        kind + suffix: round(result[way].float().mean().item(), 4)
        for kind, result in told.items()
        for way, suffix in (("generated", ""), ("likelihood", "_likelihood"))
    }


DEFAULTS: dict[str, dict[str, Any]] = {
    "projector": {"steps": 160, "log": "projector", "align_steps": 250, "align_batch": 128},
    "tuned": {"steps": 260, "log": "tune", "align_steps": 200, "align_batch": 32},
    "control": {"steps": 260, "log": "control", "align_steps": 200, "align_batch": 32},
}


def main() -> None:
    choice = argparse.ArgumentParser(add_help=False)
    choice.add_argument("stage", choices=STAGES, nargs="?", default="tuned")
    stage = choice.parse_known_args()[0].stage
    own = DEFAULTS[stage]
    parser = training.arguments(
        "Train the mini chat model.", steps=own["steps"], minutes=30.0, batch=8,
        log=f"{LOG}/{own['log']}.jsonl", out=f"mini:{stage}",
    )  # fmt: skip
    parser.add_argument("stage", choices=STAGES, nargs="?", default="tuned")
    parser.add_argument("--lr", type=numeric(float, POSITIVE), default=1e-3, help="of the projector")
    parser.add_argument("--lr-lora", type=numeric(float, POSITIVE), default=5e-4, help="of the adapters")
    parser.add_argument(
        "--lr-branch",
        type=numeric(float, POSITIVE),
        default=3e-4,
        help="of the branch; its temporal layers take twice as much",
    )
    parser.add_argument(
        "--align-steps", type=numeric(int, NATURAL), default=own["align_steps"], help="towards word embeddings; 0: none"
    )
    parser.add_argument("--align-batch", type=numeric(int, COUNT), default=own["align_batch"])
    parser.add_argument("--weight-decay", type=numeric(float, NATURAL), default=0.01)
    parser.add_argument("--rank", type=numeric(int, NATURAL), default=8, help="of the adapters; 0: none")
    parser.add_argument("--half", choices=("auto", "yes", "no"), default="auto", help="frozen products in bfloat16")
    parser.add_argument(
        "--start", type=folder_argument, default="mini:projector", help="stage to start from (tuned, control)"
    )
    parser.add_argument(
        "--branch", type=folder_argument, default="mini:branch", help="pretrained branch (tuned, control)"
    )
    parser.add_argument("--clip", type=folder_argument, default="mini:clip")
    parser.add_argument("--every", type=numeric(int, COUNT), default=10, help="steps between lines of the log")
    parser.add_argument(
        "--evaluate-every",
        type=numeric(int, NATURAL),
        default=100,
        help="steps between checks on held-out scenes; 0: none",
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
