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

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from miniature.items import ITEMS, Items, load_items  # noqa: E402
from miniature.world import (  # noqa: E402
    COLOURS,
    EVENTS,
    EXPOSURES,
    SINGLE,
    SIZE,
    TEMPLATES,
    caption,
    exposures,
    plain_stills,
    random_labels,
)

from bt_adapter.data.image_settings import ImageSettings  # noqa: E402
from bt_adapter.files import writing  # noqa: E402

CONTEXT = 16
PATCHES, KEPT = 36, 18  # patches of an image, and how many are seen while half of them are dropped
PLAIN = 0.35  # share of plain stills
HINGE = 0.8  # cosine above which two different captions are pushed apart
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


class ImageEmbeddings(nn.Module):
    """The image embedding of CLS, and that of the mean patch token of the last layer but one."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``pixels`` [n, 3, 48, 48], ``kept`` int64 [n, 1+K] (CLS first) or None: two embeddings [n, 128]."""
        hidden = self.vision.embeddings(pixels)
        if kept is not None:
            hidden = hidden.gather(1, kept[:, :, None].expand(-1, -1, hidden.shape[-1]))
        hidden = self.vision.pre_layrnorm(hidden)
        for number, layer in enumerate(self.vision.encoder.layers):
            if number == len(self.vision.encoder.layers) - 1:
                patches = hidden[:, 1:].mean(1)
            found = layer(hidden, attention_mask=None)
            hidden = found[0] if isinstance(found, tuple) else found
        return self._project(hidden[:, 0]), self._project(patches)

    def _project(self, tokens: Tensor) -> Tensor:
        return self.projection(self.vision.post_layernorm(tokens))


def text_embeddings(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> Tensor:
    """Captions to their embeddings, float [n, 128]."""
    tokens = tokenizer(list(captions), padding=True, return_tensors="pt")
    found = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return model.text_projection(found.pooler_output)


def draw_stills(
    items: Items, n: int, generator: torch.Generator, kinds: Sequence[str] = EXPOSURES
) -> tuple[Tensor, Tensor]:
    """n stills, uint8 [n, 3, 48, 48], the plain ones first, and their labels [n, 3]."""
    plain = random_labels(round(n * PLAIN), (-1,), generator)
    shown = random_labels(n - len(plain), DIET, generator)
    images = torch.cat([plain_stills(items, plain, generator), exposures(items, shown, generator, kinds)])
    return images, torch.cat([plain, shown])


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


def make_optimizer(model: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW; vectors and embedding tables are not decayed."""
    decayed = {name for name, p in model.named_parameters() if p.ndim >= 2 and "embed" not in name}
    groups = [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.1), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def train(options: argparse.Namespace) -> None:
    """Train, score and save; resumes from OUT.ckpt where a run was killed."""
    torch.manual_seed(options.seed)
    items, tokenizer, images = load_items("train"), make_tokenizer(), ImageSettings(SIZE)
    model = make_clip(tokenizer).train()
    optimizer = make_optimizer(model, options.lr)
    embed = ImageEmbeddings(model)
    fast = torch.compile(embed, dynamic=False) if options.compile else embed
    checkpoint = Path(f"{options.out}.ckpt")
    done, spent = _resume(checkpoint, model, optimizer)
    began = saved = time.monotonic()
    for step in range(done, options.steps):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        progress = step / options.steps
        stills, labels = draw_stills(items, options.batch_size, generator, options.kinds)
        told = caption_labels(labels, generator)
        true = ((told == UNNAMED) | (told == labels[:, None])).all(-1)
        template = torch.randint(len(TEMPLATES), (len(told),), generator=generator).tolist()
        words = [caption(*label, t) for label, t in zip(told.tolist(), template, strict=True)]
        kept = None
        if progress < options.unmasked_from:
            order = torch.rand(len(stills), PATCHES, generator=generator).argsort(1)[:, :KEPT] + 1
            kept = torch.cat([torch.zeros_like(order[:, :1]), order], 1)
        texts = text_embeddings(model, tokenizer, words)
        whole, patches = fast(images.normalise(stills, torch.float32), kept)
        scale = model.logit_scale.exp().clamp(max=100)
        losses = torch.stack(
            [
                contrastive(whole, texts, true, scale),
                options.patches * contrastive(patches, texts, true, scale),
                apart(texts),
            ]
        )
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate(progress)
        optimizer.step()
        if (step + 1) % 50 == 0:
            told_losses = ", ".join(f"{value:.3f}" for value in losses.tolist())
            print(f"step {step + 1} of {options.steps}: CLS, patches, hinge {told_losses}", flush=True)
        if time.monotonic() - saved > 60:
            saved = time.monotonic()
            _save(checkpoint, model, optimizer, step + 1, spent + saved - began)
    seconds = spent + time.monotonic() - began
    scores = score(model.eval(), tokenizer, load_items("test"))
    print(json.dumps(scores), flush=True)
    drawn = options.steps * options.batch_size
    about = {
        "files": drawn, "frames": {"1": drawn}, "items": "train", "exposures": list(options.kinds),
        "seed": options.seed, "steps": options.steps, "batch": options.batch_size, "seconds": round(seconds, 1),
        "held_out": scores, "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    save(model, tokenizer, options.out, about)
    checkpoint.unlink(missing_ok=True)


def _resume(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Steps done and seconds spent."""
    if not checkpoint.exists():
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"]


def _save(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with writing(checkpoint) as temporary:
        torch.save(state, temporary)


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, out: Path, about: dict) -> None:
    """Write weights in float16, tokenizer and about.json; the folder appears when it is whole."""
    from bt_adapter.files import replace_folder

    aside = out.with_name(out.name + ".writing")
    model.half().save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    (aside / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    replace_folder(aside, out)


@torch.no_grad()
def score(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, items: Items, n: int = 960) -> dict[str, dict]:
    """Zero-shot accuracies on held-out stills, by CLS and by the patch tokens that a LLaVA reads.

    "plain": item and colour among 48 captions; "exposures" of single events: item, colour and event among 384.
    """
    generator, embed, images = torch.Generator().manual_seed(1234), ImageEmbeddings(model), ImageSettings(SIZE)
    found = {}
    for name, events, draw in (("plain", (-1,), plain_stills), ("exposures", SINGLE, exposures)):
        labels = random_labels(n, events, generator)
        every = torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor(events))
        every = every.view(-1, 3)
        texts = F.normalize(text_embeddings(model, tokenizer, [caption(*row) for row in every.tolist()]), dim=-1)
        stills = images.normalise(draw(items, labels, generator), torch.float32)
        both = zip(*(embed(part) for part in stills.split(240)), strict=True)
        for part, embeds in zip(("CLS", "patches"), both, strict=True):
            right = every[(torch.cat(embeds) @ texts.T).argmax(-1)] == labels
            kinds = ("item", "colour", "event")[: 2 + (events != (-1,))]
            shares = right.float().mean(0).tolist()
            found[f"{name}, {part}"] = {kind: round(share, 4) for kind, share in zip(kinds, shares, strict=False)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the trained CLIP")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-size", type=int, default=256, help="stills a step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patches", type=float, default=0.5, help="weight of the patch tokens' loss; 0: CLS alone")
    parser.add_argument(
        "--unmasked-from", type=float, default=0.8, help="share of the run after which all patches are seen"
    )
    parser.add_argument("--kinds", nargs="+", choices=EXPOSURES, default=list(EXPOSURES), help="kinds of exposure")
    parser.add_argument("--compile", action="store_true", help="compile the vision tower (needs a C++ compiler)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
