"""The mini branch: pretrained on captioned moving clips with the three losses of the paper (arXiv 2309.15785, §3.2).

``python -m bt_adapter.mini.pretrain`` trains it on the mini CLIP (about 12 minutes on two cores) and writes
its weights and bench/results/mini/branch.jsonl; it resumes where it was stopped.

Only the branch learns. With 432 possible captions and a frozen text tower, all captions are encoded once and all of
them are negatives of every clip (video to text); text to video compares the clips of the batch. VTC and 0.1 MBCA are
this loss on the video's embedding and on the mean of the branch's patch tokens, at the CLIP's own learned temperature;
0.1 MBTA is the model's own. Half of each clip's tubes are masked, but for the last part of the run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerFast

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.limits import POSITIVE, SHARE, SHARE_BELOW_1, numeric
from bt_kernels import VisibleTokens

from . import training, weights_folder
from .clip import load_clip, normalise, text_embeds
from .items import load_items
from .retrieval import embed, every_label, score
from .scenes import TEMPLATES, caption, clips

DEPTH = 3
PATCHES = 36
FRAMES = 8
TIME_STD = 0.7  # of the time table at the start: of the size of the tokens it is added to


def make_branch_model(clip: CLIPModel) -> BTAdapterVisionModel:
    """A fresh branch of depth 3 beside the mini CLIP."""
    config = BTAdapterConfig(depth=DEPTH, drop_path=0.0, max_frames=64, trained_steps=FRAMES)
    model = BTAdapterVisionModel.from_clip(clip, config)
    nn.init.normal_(model.branch.time, std=TIME_STD)
    return model


def load_branch_model(
    stage: str | os.PathLike[str] = "pretrained", clip: CLIPModel | None = None
) -> BTAdapterVisionModel:
    """The mini CLIP's tower with a trained branch, float32, evaluation mode.

    stage: "pretrained" (the three losses), another part of the mini stack's weights, or a folder.
    """
    folder = weights_folder("branch") if stage == "pretrained" else Path(stage)
    if not folder.exists():
        folder = weights_folder(folder)
    if not folder.exists():
        raise FileNotFoundError(f"stage {stage!r}: {folder} is no folder; python -m bt_adapter.mini.pretrain makes one")
    clip = load_clip()[0] if clip is None else clip
    return BTAdapterVisionModel.from_pretrained(folder, clip=clip).float().eval()


@torch.no_grad()
def caption_bank(clip: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Embeddings of all captions in every template, float [templates, 432, F]."""
    rows = every_label().tolist()
    return torch.stack([text_embeds(clip, tokenizer, [caption(row, t) for row in rows]) for t in range(len(TEMPLATES))])


def branch_groups(branch: nn.Module, lr: float, temporal: float, spatial: float) -> list[dict[str, Any]]:
    """Named parameter groups: temporal layers and time table, spatial layers, the two gates, the rest at lr."""
    rates = {"temporal": temporal, "time": temporal, "spatial": spatial, "merge_gate": 1e-3, "output_gate": 2e-5}
    groups: dict[float, list] = {}
    for name, parameter in branch.named_parameters():
        groups.setdefault(rates.get(name.split(".")[0], lr), []).append((name, parameter))
    return [{"named": named, "lr": rate} for rate, named in groups.items()]


def bank_contrastive(
    videos: torch.Tensor, bank: torch.Tensor, which: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Video to text over all captions [432, F], text to video over the batch: the sum of both directions' means."""
    videos, bank = nn.functional.normalize(videos, dim=-1), nn.functional.normalize(bank, dim=-1)
    forward = nn.functional.cross_entropy(scale * videos @ bank.T, which)
    different, place = which.unique(return_inverse=True)
    own = nn.functional.one_hot(place, len(different)).float()
    backward = -((scale * videos @ bank[different].T).log_softmax(0) * own).sum(0) / own.sum(0)
    return forward + backward.mean()


def train(options: Any) -> None:
    torch.manual_seed(options.seed)
    items, held_out = load_items("train", options.data), load_items("test", options.data)
    clip, tokenizer = load_clip(options.clip) if options.clip else load_clip()
    model = make_branch_model(clip)
    bank = caption_bank(clip, tokenizer)
    scale = clip.logit_scale.exp().detach()
    branch = model.branch
    if options.compile:
        for layer in (*model.tower.layers, *branch.spatial, *branch.temporal):
            layer.compile(dynamic=False)
    optimizer = training.adamw(
        branch_groups(branch, options.lr, options.temporal_lr, options.spatial_lr), weight_decay=0.05
    )
    run = training.Run(options, {"branch": branch, "optimizer": optimizer})
    generator = torch.Generator().manual_seed(options.seed + 1 + run.step)
    test_clips = clips(held_out, len(bank[0]), FRAMES, torch.Generator().manual_seed(77), every_label())[0]
    sums: dict[str, float] = {}
    while run.progress < 1:
        model.train()
        training.set_rate(optimizer, training.cosine(run.progress))
        frames, labels = clips(items, options.batch, FRAMES, generator)
        which = (labels[:, 0] * 6 + labels[:, 1]) * 9 + labels[:, 2]
        template = torch.randint(len(TEMPLATES), (bank.shape[1],), generator=generator)
        texts = bank[template, torch.arange(bank.shape[1])]
        ratio = options.ratio if run.progress < options.unmasked_from else 0.0
        visible = VisibleTokens.tube(len(frames), PATCHES, FRAMES, ratio, generator)
        out = model(normalise(frames), visible)
        losses = model.pretraining_losses(out, texts[which], visible, temperature=1 / scale.item())
        losses["vtc"] = bank_contrastive(out.video_embeds, texts, which, scale)
        losses["mbca"] = 0.1 * bank_contrastive(
            model.tower.project(out.branch_tokens[:, 1:].mean(1)), texts, which, scale
        )
        optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(branch.parameters(), 5.0)
        optimizer.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item() / 50
        run.advance()
        if run.step % 50 == 0:
            rate = round(run.step * options.batch / run.spent, 1)
            run.log(
                progress=round(run.progress, 4),
                **{name: round(value, 4) for name, value in sums.items()},
                clips_per_s=rate,
                **(_scores(model, test_clips, bank[0]) if run.step % 200 == 0 else {}),
            )
            sums = {}
            run.pause()
    run.save()
    run.log(event="end", clips=run.step * options.batch, **_scores(model, test_clips, bank[0]))
    model.save_pretrained(options.out, dtype=torch.float16)


def _scores(model: BTAdapterVisionModel, frames: torch.Tensor, texts: torch.Tensor) -> dict[str, Any]:
    plain, branch = (score(embeds, texts)[0] for embeds in embed(model, frames))
    short = {name: branch[name] for name in ("motion", "direction", "item", "colour", "by_motion")}
    frame_mean = {"motion": plain["motion"], "item": plain["item"], "R@1": plain["video_to_text"]["R@1"]}
    return short | {"R@1": branch["video_to_text"]["R@1"], "frame_mean": frame_mean}


def main() -> None:
    parser = training.arguments(
        "Pretrain the mini branch.", steps=1400, minutes=12, batch=36, log="bench/results/mini/branch.jsonl",
        out="mini:branch",
    )  # fmt: skip
    parser.add_argument("--lr", type=numeric(float, POSITIVE), default=3e-4)
    parser.add_argument("--temporal-lr", type=numeric(float, POSITIVE), default=6e-4)
    parser.add_argument("--spatial-lr", type=numeric(float, POSITIVE), default=2e-4)
    parser.add_argument("--ratio", type=numeric(float, SHARE_BELOW_1), default=0.5, help="share of tubes masked")
    parser.add_argument(
        "--unmasked-from",
        type=numeric(float, SHARE),
        default=0.85,
        help="share of the run after which nothing is masked",
    )
    parser.add_argument("--compile", action="store_true", help="compile the layers of tower and branch")
    parser.add_argument("--clip", default=None, help="folder of the CLIP (default: the shipped one)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
