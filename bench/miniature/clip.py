"""Train the mini CLIP from nothing, on captioned still images alone: ``python bench/miniature/clip.py OUT``.

Stills are drawn anew in each step: plain ones, and exposures in which an event shows (:mod:`miniature.world`). What a
larger CLIP gets from the variety of its data is given here by four means:

- captions name a part of what shows ("a thing moving left", "a red sneaker"), and every image of a batch of which a
  caption is true counts as a positive of it;
- the mean of the patch tokens of the last layer but one, which is what a LLaVA reads, is compared with the captions as
  well as CLS, through the same LayerNorm and projection;
- half of the patches are dropped for most of the run (FLIP, arXiv 2212.00794);
- a hinge keeps the cosines between different captions below 0.8.

OUT holds the weights in float16, the tokenizer, and ``about.json``: what was drawn, the options, and the scores. A
killed run resumes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature import world  # noqa: E402
from miniature.items import ITEMS, Items, load_items  # noqa: E402
from miniature.world import COLOURS, EVENTS, SINGLE, SIZE, TEMPLATES, caption, random_labels  # noqa: E402

from bt_adapter.data.image_settings import ImageSettings  # noqa: E402
from bt_adapter.files import remove_unfinished, write_json, writing  # noqa: E402

CONTEXT = 16
PATCHES, KEPT = 36, 18  # patches of an image, and how many are seen while half of them are dropped
PLAIN = 0.35  # share of plain stills
HINGE = 0.8  # cosine above which two different captions are pushed apart
UNMASKED_FROM = 0.8  # share of the run after which all patches are seen
PATCH_WEIGHT = 0.5  # of the patch tokens' loss beside that of CLS
RATE = 1.5e-3  # learning rate
UNNAMED = -2  # in a caption's label: any item, colour or event
# Of captions of exposures and of plain stills: which of item, colour and event they name, and how often.
NAMED = {
    True: {(1, 1, 1): 0.35, (1, 0, 1): 0.15, (0, 1, 1): 0.1, (0, 0, 1): 0.2, (1, 1, 0): 0.1, (1, 0, 0): 0.1},
    False: {(1, 1, 0): 0.5, (1, 0, 0): 0.3, (0, 1, 0): 0.2},
}
# Events of exposures: single ones six times as often as each of the others.
DIET = SINGLE * 6 + tuple(set(range(len(EVENTS))) - set(SINGLE))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose vocabulary is every word that a caption can hold; sequences are [BOS] words [EOS]."""
    labels = [(item, -1, -1) for item in range(-1, len(ITEMS))]
    labels += [(-1, colour, event) for colour in range(len(COLOURS)) for event in range(len(EVENTS))]
    words = {word for label in labels for t in range(len(TEMPLATES)) for word in caption(*label, t).split()}
    # The end must not be number 2, which CLIPTextModel takes for unset.
    special = ("[PAD]", "[UNK]", "[BOS]", "[EOS]")
    vocabulary = {word: number for number, word in enumerate((*special, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 2), ("[EOS]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]",
        model_max_length=CONTEXT, padding_side="right",
    )  # fmt: skip


def make_clip(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """The mini CLIP with random weights: 1.24 M parameters of vision, 0.6 M of text."""
    common = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "projection_dim": 128}
    config = CLIPConfig(
        vision_config={**common, "num_hidden_layers": 6, "image_size": SIZE, "patch_size": 8},
        text_config={
            **common, "num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=128,
    )  # fmt: skip
    return CLIPModel(config)


def image_embeddings(model: CLIPModel, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The image embedding of CLS, and that of the mean patch token of the last layer but one: both [n, 128].

    ``pixels`` [n, 3, 48, 48]; ``kept`` int64 [n, 1+K]: the tokens that are seen, CLS first; None: all.
    """
    vision = model.vision_model
    hidden = vision.embeddings(pixels)
    if kept is not None:
        hidden = hidden.gather(1, kept[:, :, None].expand(-1, -1, hidden.shape[-1]))
    hidden = vision.pre_layrnorm(hidden)
    for layer in vision.encoder.layers:
        before, hidden = hidden, layer(hidden, attention_mask=None)
    whole, patches = hidden[:, 0], before[:, 1:].mean(1)
    return tuple(model.visual_projection(vision.post_layernorm(tokens)) for tokens in (whole, patches))


def text_embeddings(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Captions to their embeddings, float [n, 128]."""
    tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
    found = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return model.text_projection(found.pooler_output)


def draw_stills(items: Items, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """n stills, uint8 [n, 3, 48, 48], the plain ones first, and their labels [n, 3]."""
    plain = random_labels(round(n * PLAIN), (-1,), generator)
    shown = random_labels(n - len(plain), DIET, generator)
    images = [world.plain_stills(items, plain, generator), world.exposures(items, shown, generator)]
    return torch.cat(images), torch.cat([plain, shown])


def caption_labels(labels: Tensor, generator: torch.Generator) -> Tensor:
    """The captions of a batch: each still's own, which may leave things unnamed, and one of each event alone."""
    told = labels.clone()
    for moves, named in NAMED.items():
        rows = (labels[:, 2] >= 0) == moves
        choice = torch.multinomial(torch.tensor([*named.values()]), len(labels), replacement=True, generator=generator)
        left_out = torch.tensor([*named])[choice] == 0
        told[rows[:, None] & left_out] = UNNAMED
    alone = torch.full((len(EVENTS), 3), UNNAMED)
    alone[:, 2] = torch.arange(len(EVENTS))
    return torch.cat([told, alone]).unique(dim=0)


def contrastive(images: Tensor, texts: Tensor, true: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss where several captions are true of an image, and several images of a caption.

    Each true pair is compared with what is untrue of its image, and of its caption. images [n, F], texts [m, F], true
    bool [n, m]. Returns the sum of both directions' means.
    """
    scores = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T

    def one_way(scores: Tensor, true: Tensor) -> Tensor:
        others = scores.masked_fill(true, -math.inf).logsumexp(1, keepdim=True)
        some = true.any(1)
        return ((F.softplus(others - scores) * true).sum(1)[some] / true.sum(1)[some]).mean()

    return one_way(scores, true) + one_way(scores.T, true.T)


def apart(texts: Tensor) -> Tensor:
    """The hinge on the cosines between different captions' embeddings [m, F]: a scalar."""
    cosine = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).T
    return 2 * (cosine - HINGE).relu().triu(1).sum() / len(texts)


def rate(progress: float, warmup: float = 0.04, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then the cosine down to ``floor``."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; vectors and embedding tables are not decayed."""
    decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        decayed[parameter.ndim >= 2 and "embed" not in name].append(parameter)
    groups = [{"params": decayed[True], "weight_decay": 0.1}, {"params": decayed[False], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6, fused=True)


def losses(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    items: Items,
    batch: int,
    masked: bool,
    generator: torch.Generator,
) -> Tensor:
    """Draw a batch of stills and captions and compute its three losses: of CLS, of the patch tokens, and the hinge."""
    stills, labels = draw_stills(items, batch, generator)
    told = caption_labels(labels, generator)
    true = ((told == UNNAMED) | (told == labels[:, None])).all(-1)
    template = torch.randint(len(TEMPLATES), (len(told),), generator=generator).tolist()
    words = [caption(*label, t) for label, t in zip(told.tolist(), template, strict=True)]
    kept = None
    if masked:
        order = torch.rand(batch, PATCHES, generator=generator).argsort(1)[:, :KEPT] + 1
        kept = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
    texts = text_embeddings(model, tokenizer, words)
    whole, patches = image_embeddings(model, ImageSettings(SIZE).normalise(stills, torch.float32), kept)
    scale = model.logit_scale.exp().clamp(max=100)
    of_cls, of_patches = (contrastive(images, texts, true, scale) for images in (whole, patches))
    return torch.stack([of_cls, PATCH_WEIGHT * of_patches, apart(texts)])


def train(out: Path, steps: int, batch: int) -> None:
    """Train, score and save; resumes from OUT.ckpt where a run was killed."""
    torch.manual_seed(0)
    items, tokenizer = load_items("train"), make_tokenizer()
    model = make_clip(tokenizer).train()
    optimizer = make_optimizer(model)
    checkpoint = out.with_name(f"{out.name}.ckpt")
    out.parent.mkdir(parents=True, exist_ok=True)
    done, spent = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, spent = state["step"], state["seconds"]
    began = saved = time.monotonic()
    for step in range(done, steps):
        masked, generator = step / steps < UNMASKED_FROM, torch.Generator().manual_seed(step)
        found = losses(model, tokenizer, items, batch, masked, generator)
        optimizer.zero_grad(set_to_none=True)
        found.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate(step / steps)
        optimizer.step()
        if (step + 1) % 50 == 0:
            told = ", ".join(f"{value:.3f}" for value in found.tolist())
            print(f"step {step + 1} of {steps}: CLS, patches, hinge {told}", flush=True)
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with writing(checkpoint) as temporary:
                torch.save(state | {"step": step + 1, "seconds": spent + saved - began}, temporary)
    about = {
        "files": steps * batch, "frames": {"1": steps * batch}, "items": "train", "exposures": list(world.EXPOSURES),
        "seed": 0, "steps": steps, "batch": batch, "seconds": round(spent + time.monotonic() - began, 1),
        "held_out": score(model.eval(), tokenizer, load_items("test")), "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(json.dumps(about["held_out"]), flush=True)
    remove_unfinished(out.parent, out.name)
    with writing(out) as aside:
        model.half().save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_json(aside / "about.json", about, indent=1)
    checkpoint.unlink(missing_ok=True)


@torch.no_grad()
def score(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, items: Items, n: int = 960) -> dict[str, dict]:
    """Zero-shot accuracies on held-out stills, by CLS and by the patch tokens that a LLaVA reads.

    "plain": item and colour among 48 captions; "exposures" of single events: item, colour and event among 384.
    """
    generator = torch.Generator().manual_seed(1234)
    found = {}
    for name, events, draw in (("plain", (-1,), world.plain_stills), ("exposures", SINGLE, world.exposures)):
        labels = random_labels(n, events, generator)
        every = torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor(events))
        every = every.view(-1, 3)
        texts = F.normalize(text_embeddings(model, tokenizer, [caption(*row) for row in every.tolist()]), dim=-1)
        stills = ImageSettings(SIZE).normalise(draw(items, labels, generator), torch.float32)
        both = zip(*(image_embeddings(model, part) for part in stills.split(240)), strict=True)
        for part, embeds in zip(("CLS", "patches"), both, strict=True):
            right = every[(torch.cat(embeds) @ texts.T).argmax(-1)] == labels
            kinds = ("item", "colour", "event")[: 2 + (events != (-1,))]
            shares = right.float().mean(0).tolist()
            found[f"{name}, {part}"] = {kind: round(share, 4) for kind, share in zip(kinds, shares, strict=False)}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the trained CLIP")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=256, help="stills a step")
    options = parser.parse_args()
    train(options.out, options.steps, options.batch_size)
