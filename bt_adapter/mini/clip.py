"""The mini CLIP: trained from scratch on captioned stills and, for a quarter, long-exposure trails of moving clips.

``python -m bt_adapter.mini.clip`` trains it (about 20 minutes on two cores) and writes the weights and
bench/results/mini/clip.jsonl; it resumes where it was stopped.

Within a batch many images share a caption, so only the different captions are encoded and the loss counts all images
of a caption as its positives. Half of the patches are dropped for most of the training (FLIP, arXiv 2212.00794). A
text tower trained on stills alone keeps captions apart by item and colour only: the trails, and a hinge on the cosines
between captions that differ in the motion alone, give motion words a direction of their own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from bt_adapter.limits import NATURAL, POSITIVE, SHARE, numeric

from . import training, weights_folder
from .items import ITEMS, Items, load_items
from .scenes import COLOURS, MOTIONS, SIZE, TEMPLATES, caption, random_labels, stills, trails
from .tokenizer import CONTEXT, make_tokenizer

HINGE = 0.8  # cosine above which two different captions are pushed apart
KEPT = 18  # patches of 36 seen while half of them are dropped


def make_clip() -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The mini CLIP with random weights, and its tokenizer."""
    tokenizer = make_tokenizer()
    config = CLIPConfig(
        vision_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
            "image_size": SIZE, "patch_size": 8, "projection_dim": 128,
        },
        text_config={
            "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
            "vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "projection_dim": 128,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        projection_dim=128,
    )  # fmt: skip
    return CLIPModel(config), tokenizer


def load_clip(folder: str | os.PathLike[str] | None = None) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The trained mini CLIP in float32 and evaluation mode, and its tokenizer.

    folder: where it was saved; None: the mini stack's weights (CommandError where they are not installed).
    """
    name, folder = ("mini", weights_folder("clip")) if folder is None else (str(folder), Path(folder))
    if not (folder / "model.safetensors").exists():
        raise FileNotFoundError(f"{folder} holds no model.safetensors: train it with python -m bt_adapter.mini.clip")
    model = CLIPModel(CLIPConfig.from_pretrained(folder)).float()
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    model.name_or_path = name
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(folder)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: str | os.PathLike[str]) -> None:
    """Write config.json, model.safetensors (float16) and the tokenizer's files."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict() | {"architectures": ["CLIPModel"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    temporary = folder / "model.safetensors.tmp"
    save_file(training.export_half(model), temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    os.replace(temporary, folder / "model.safetensors")
    tokenizer.save_pretrained(folder)


def normalise(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [..., 3, h, w] -> float32, CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (frames.float() - mean) / std


def text_embeds(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    """Captions -> float [n, 128], not normalised."""
    tokens = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    out = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
    return model.text_projection(out.pooler_output)


def unique_labels(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [n, 3] -> the different labels [u, 3] and which of them each row is [n]."""
    return torch.unique(labels, dim=0, return_inverse=True)


class _ImageTower(nn.Module):
    """The vision tower on a subset of the patches, kept apart so that it can be compiled."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.vision, self.projection = model.vision_model, model.visual_projection

    def forward(self, pixels: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
        hidden = self.vision.embeddings(pixels)
        if keep is not None:  # int64 [n, K + 1], CLS among them
            hidden = hidden.gather(1, keep[:, :, None].expand(-1, -1, hidden.shape[-1]))
        hidden = self.vision.encoder(inputs_embeds=self.vision.pre_layrnorm(hidden)).last_hidden_state
        return self.projection(self.vision.post_layernorm(hidden[:, 0]))


def _spread(embeds: torch.Tensor) -> torch.Tensor:
    """Hinge on the cosines between different captions: embeds [u, F] -> scalar."""
    cosine = F.normalize(embeds, dim=-1) @ F.normalize(embeds, dim=-1).T
    return (cosine - HINGE).relu().square().fill_diagonal_(0).sum() / len(embeds)


def every_caption() -> torch.Tensor:
    """The labels of all 480 captions, with and without a motion, int64 [480, 3], motion fastest."""
    return torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.arange(-1, len(MOTIONS)))


def spread_text(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, items: Items, steps: int, seed: int) -> None:
    """Tune the text tower alone: the contrastive loss against fixed images, and a strong hinge between all captions.

    Trails leave a few motions close ("standing still" and "appearing", whose trails look alike); the branch would have
    next to nothing to learn towards.
    """
    labels = every_caption()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        still, moving = labels[labels[:, 2] < 0].repeat(96, 1), labels[labels[:, 2] >= 0].repeat(5, 1)
        frames = torch.cat(
            [stills(items, len(still), generator, still)[0], trails(items, len(moving), generator, moving)[0]]
        )
        tower = _ImageTower(model)
        images = torch.cat([tower(normalise(part), None) for part in frames.split(256)])
    shown = torch.cat([still, moving])
    which = (shown[:, 0] * len(COLOURS) + shown[:, 1]) * (len(MOTIONS) + 1) + shown[:, 2] + 1
    named = [(name, p) for name, p in model.named_parameters() if name.startswith("text_")]
    optimizer = training.adamw([{"named": named, "lr": 5e-4}], weight_decay=0.1)
    for step in range(steps):
        training.set_rate(optimizer, training.cosine(step / steps))
        template = torch.randint(len(TEMPLATES), (len(labels),), generator=generator).tolist()
        texts = text_embeds(
            model, tokenizer, [caption(row, t) for row, t in zip(labels.tolist(), template, strict=True)]
        )
        cosine = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).T
        apart = (cosine - torch.eye(len(texts)) - HINGE).relu().sum() / len(texts)
        loss = training.contrastive(images, texts, which, model.logit_scale.exp().detach()) + 4 * apart
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def zero_shot(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, items: Items, n: int = 960) -> dict[str, float]:
    """Item and colour accuracy on stills of held-out items (all 48 captions compete), and the closest motion words."""
    model.eval()
    images, labels = stills(items, n, torch.Generator().manual_seed(1234))
    every = torch.cartesian_prod(torch.arange(len(ITEMS)), torch.arange(len(COLOURS)), torch.tensor([-1]))
    texts = F.normalize(text_embeds(model, tokenizer, [caption(row) for row in every.tolist()]), dim=-1)
    tower = _ImageTower(model)
    best = torch.cat([(tower(normalise(part), None) @ texts.T).argmax(-1) for part in images.split(240)])
    motions = text_embeds(model, tokenizer, [caption((5, 0, motion)) for motion in range(-1, len(MOTIONS))])
    motions = F.normalize(motions, dim=-1)
    closest = (motions @ motions.T).fill_diagonal_(-1).max()
    model.train()
    found = every[best]
    return {
        "item": round((found[:, 0] == labels[:, 0]).float().mean().item(), 4),
        "colour": round((found[:, 1] == labels[:, 1]).float().mean().item(), 4),
        "closest_motion_words": round(closest.item(), 3),
    }


def train(options) -> None:
    torch.manual_seed(options.seed)
    items, held_out = load_items("train", options.data), load_items("test", options.data)
    model, tokenizer = make_clip()
    model.train()
    tower = _ImageTower(model)
    vision = torch.compile(tower, dynamic=False) if options.compile else tower
    optimizer = training.adamw([{"named": list(model.named_parameters()), "lr": options.lr}], weight_decay=0.1)
    run = training.Run(options, {"model": model, "optimizer": optimizer})
    generator = torch.Generator().manual_seed(options.seed + run.step)
    trailing = options.batch // 4
    losses, count = torch.zeros(2), 0
    while run.progress < 1:
        training.set_rate(optimizer, training.cosine(run.progress))
        a, first = stills(items, options.batch - trailing, generator)
        b, second = trails(items, trailing, generator)
        pixels, labels = normalise(torch.cat([a, b])), torch.cat([first, second])
        keep = None
        if run.progress < options.unmasked_from:
            order = torch.rand(len(pixels), 36, generator=generator).argsort(1)[:, :KEPT] + 1
            keep = torch.cat([torch.zeros_like(order[:, :1]), order], 1)

        different, which = unique_labels(labels)
        anchors = random_labels(4, False, generator).repeat_interleave(len(MOTIONS) + 1, 0)
        anchors[:, 2] = torch.arange(-1, len(MOTIONS)).repeat(4)
        extra = torch.cat([different, anchors]).unique(dim=0)  # sorted: the batch's own are found by their key
        key = torch.tensor([1000, 100, 1])
        place = torch.searchsorted((extra * key).sum(1), (different * key).sum(1))
        template = torch.randint(len(TEMPLATES), (len(extra),), generator=generator).tolist()
        texts = text_embeds(
            model, tokenizer, [caption(row, t) for row, t in zip(extra.tolist(), template, strict=True)]
        )

        images = vision(pixels, keep)
        match = training.contrastive(images, texts[place], which, model.logit_scale.exp().clamp(max=100))
        spread = _spread(texts)
        optimizer.zero_grad(set_to_none=True)
        (match + spread).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses += torch.stack([match, spread]).detach()
        count += 1
        run.advance()
        if run.step % 50 == 0:
            values = dict(zip(("loss", "spread"), (round(v, 4) for v in (losses / count).tolist()), strict=True))
            scores = zero_shot(model, tokenizer, held_out) if run.step % 250 == 0 else {}
            rate = round(run.step * options.batch / run.spent, 1)
            scale = round(model.logit_scale.exp().item(), 2)
            run.log(progress=round(run.progress, 4), **values, scale=scale, images_per_s=rate, **scores)
            losses, count = torch.zeros(2), 0
            run.pause()
    run.save()
    run.log(event="before the text tower's finish", **zero_shot(model, tokenizer, held_out, 3840))
    spread_text(model, tokenizer, items, options.text_steps, options.seed)
    run.log(event="end", images=run.step * options.batch, **zero_shot(model, tokenizer, held_out, 3840))
    save_clip(model, tokenizer, options.out)


def main() -> None:
    parser = training.arguments(
        "Train the mini CLIP.", steps=2800, minutes=18, batch=256, log="bench/results/mini/clip.jsonl", out="mini:clip"
    )
    parser.add_argument("--lr", type=numeric(float, POSITIVE), default=1.5e-3)
    parser.add_argument(
        "--unmasked-from",
        type=numeric(float, SHARE),
        default=0.85,
        help="share of the run after which all patches are seen",
    )
    parser.add_argument(
        "--text-steps", type=numeric(int, NATURAL), default=200, help="steps of the text tower's own finish"
    )
    parser.add_argument("--compile", action="store_true", help="compile the vision tower")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
