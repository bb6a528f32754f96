"""Pieces every mini training shares: the run log, the learning-rate schedule, checkpoints to resume from."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from bt_adapter.limits import COUNT, SEED, numeric

from . import folder_argument


def arguments(description: str, steps: int, minutes: float, batch: int, log: str, out: str) -> argparse.ArgumentParser:
    """The options every training command has; out: default folder of the weights, as ``folder_argument`` reads it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=numeric(int, COUNT), default=steps, help="end after so many steps")
    parser.add_argument("--minutes", type=numeric(float, "(0, inf]"), default=minutes, help="or after so many minutes")
    parser.add_argument("--batch", type=numeric(int, COUNT), default=batch)
    parser.add_argument("--seed", type=numeric(int, SEED), default=0)
    parser.add_argument("--out", type=folder_argument, default=out, help="folder of the trained weights")
    parser.add_argument("--log", type=Path, default=Path(log), help="JSON lines, appended to")
    parser.add_argument("--checkpoint", type=Path, default=None, help="file to resume from (default: OUT.ckpt)")
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's files")
    return parser


class Run:
    """Progress of one run: counts steps and training time, writes the log, saves and resumes.

    progress runs from 0 to 1 as steps / --steps or training time / --minutes, whichever is further on, so a run on a
    busy machine ends in time with its schedule complete.
    """

    def __init__(self, options: argparse.Namespace, modules: dict[str, Any]) -> None:
        self.options, self.modules = options, modules
        self.step, self.spent, self.saved = 0, 0.0, time.monotonic()
        self.checkpoint = options.checkpoint or Path(f"{options.out}.ckpt")
        self._tick = time.monotonic()
        resumed = self.checkpoint.exists()
        if resumed:
            state = torch.load(self.checkpoint, weights_only=True)
            for name, module in modules.items():
                module.load_state_dict(state[name])
            self.step, self.spent = state["step"], state["spent"]
        options.log.parent.mkdir(parents=True, exist_ok=True)
        self.log(
            event="resume" if resumed else "start",
            command=[_program(), *sys.argv[1:]],
            options={
                key: os.path.relpath(value) if isinstance(value, Path) else value
                for key, value in vars(options).items()
            },
            python=platform.python_version(),
            torch=torch.__version__,
            transformers=transformers.__version__,
            threads=torch.get_num_threads(),
        )

    @property
    def progress(self) -> float:
        return min(1.0, max(self.step / self.options.steps, self.spent / 60 / self.options.minutes))

    def advance(self) -> None:
        """Count a finished step; save every minute."""
        now = time.monotonic()
        self.step, self.spent, self._tick = self.step + 1, self.spent + now - self._tick, now
        if now - self.saved > 60:
            self.save()

    def pause(self) -> None:
        """Leave the time since the last step (evaluation) out of the training time."""
        self._tick = time.monotonic()

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        temporary = self.checkpoint.with_name(self.checkpoint.name + ".tmp")
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save({**state, "step": self.step, "spent": self.spent}, temporary)
        os.replace(temporary, self.checkpoint)
        self.saved = time.monotonic()

    def log(self, **values: Any) -> None:
        line = json.dumps({"step": self.step, "seconds": round(self.spent, 1)} | values)
        with self.options.log.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


def _program() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else Path(sys.argv[0]).name


def cosine(progress: float, warmup: float = 0.04, floor: float = 0.02) -> float:
    """Factor of the learning rate: linear warm-up, then cosine down to floor."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def adamw(groups: Iterable[dict[str, Any]], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over groups of named parameters ({"named": [(name, p)], "lr": ...}); vectors and tables are not decayed."""
    split = []
    for group in groups:
        named = [(name, p) for name, p in group["named"] if p.requires_grad]
        for decays in (True, False):
            chosen = [p for name, p in named if (p.ndim >= 2 and "embed" not in name) == decays]
            split.append({"params": chosen, "lr": group["lr"], "weight_decay": weight_decay if decays else 0.0})
    split = [group for group in split if group["params"]]
    optimizer = torch.optim.AdamW(split, betas=(0.9, 0.98), eps=1e-6, fused=True)
    for group in optimizer.param_groups:
        group["base"] = group["lr"]
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base"] * factor


def contrastive(images: torch.Tensor, texts: torch.Tensor, which: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Contrastive loss where several images may share a caption.

    images [N, F], texts [U, F] of the *different* captions, which int64 [N]: the caption of each image. Image to text:
    cross-entropy over the U captions. Text to image: mean log-likelihood of a caption's own images among all N.
    Returns the sum of both directions' means.
    """
    logits = scale * nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T  # [N, U]
    forward = nn.functional.cross_entropy(logits, which)
    own = nn.functional.one_hot(which, len(texts)).to(logits.dtype)
    backward = -(logits.log_softmax(0) * own).sum(0) / own.sum(0)
    return forward + backward.mean()


def export_half(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict with floating tensors in float16."""
    return {
        name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for name, value in module.state_dict().items()
    }
