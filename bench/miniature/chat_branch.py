"""The branch the chat side attaches: pretrained on captions of the paired clips, as `miniature.pretraining` does it."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import torch
from miniature.pretraining import Workshop
from miniature.scoring import PLAIN
from miniature.systems import FULL, SYSTEMS, make_model, train

FILE = "config.json"


def pretrained(cache: Path, steps: int, seed: int, data: str | None = None) -> Path:
    """Folder of a branch of the base system after so many steps; trained now where it is not there.

    cache: where it and the tuned text tower's captions are kept. data: folder of Fashion-MNIST's files.
    """
    folder = cache / f"branch-{steps}-seed-{seed}"
    if (folder / FILE).exists():
        return folder
    options = argparse.Namespace(
        data="train", folder=data, cache=cache, batch=16, pool=160, per_kind=16, text_steps=150
    )  # fmt: skip
    shop = Workshop(options)
    system = SYSTEMS[FULL]
    torch.manual_seed(seed)
    model = make_model(shop.clip, system, seed)
    train(model, system, shop.pool(seed), shop.texts[:, PLAIN:], shop.scale, steps, options.batch, seed)
    aside = folder.with_suffix(".writing")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    os.replace(aside, folder)
    return folder
