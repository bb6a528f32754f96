"""The paper's pretraining side in miniature: what the branch learns that frames do not show, and what it needs for it.

    python bench/miniature/pretraining.py              everything; the same command again goes on where it stopped
    python bench/miniature/pretraining.py --only cost  the cost of masking alone (a minute)
    python bench/miniature/pretraining.py --only stored    the stored branches asked again, rows checked (minutes)

Moving clips of held-out items (``scenes.py``); the frozen mini CLIP; branches trained by the product's own step
(``bt_adapter.pretrain.step``) in the configurations of ``systems.py``, on the same clips in the same order for a seed.
Each finished run is a row of ``bench/results/miniature-pretraining.json``; the branches of the longer runs and the
captions' embeddings stay in ``weights/``. Training clips are made of Fashion-MNIST's
training images (Debian's dataset-fashion-mnist), evaluation clips of the shipped test images.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from measure import facts, write  # noqa: E402
from miniature import scoring, text  # noqa: E402
from miniature.cost import cost_rows  # noqa: E402
from miniature.scenes import balanced_labels, draw, label_number, object_labels, paired_labels, render  # noqa: E402
from miniature.systems import FULL, SYSTEMS, System, make_model, train  # noqa: E402
from miniature.tower import Clips, run_tower  # noqa: E402

from bt_adapter import BTAdapterVisionModel  # noqa: E402
from bt_adapter.mini.items import Items, load_items  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "miniature-pretraining.json"
WEIGHTS = ROOT / "bench" / "miniature" / "weights"
SAME = 0.005  # figures of stored branches on another machine: a clip or two of hundreds may fall to the other side
EVALUATION_SEED = 20_000


@dataclass
class Row:
    """One run. part: "long" (system against frame mean), "ablation" or "cost".

    figures: shares of right choices of CLIP and branch on the evaluation clips, frame_mean: of the frozen CLIP; p:
    exact two-sided McNemar tests between them. seconds: of training beside the stored tower, cpu_seconds: of the
    process in that time, the fairer one on a busy machine. Of "cost": medians of a step with the tower running;
    saved_bytes: what it keeps for backward, steps: how often it ran.
    """

    part: str
    system: str
    settings: dict
    seed: int
    steps: int
    batch: int
    seconds: float
    cpu_seconds: float
    losses: list[float]
    figures: dict[str, float]
    frame_mean: dict[str, float]
    p: dict[str, float]
    saved_bytes: int | None
    command: str
    facts: dict


def make_clips(model: BTAdapterVisionModel, items: Items, labels: Tensor, paired: bool, seed: int) -> Clips:
    """Clips of the labels with the tower's states; paired: counterparts hold the same frames."""
    generator = torch.Generator().manual_seed(seed)
    frames = []
    for part in labels.split(64):
        first = part[::2] if paired else part
        draws = draw(items, first[:, 0], first[:, 1], generator)
        frames.append(render(draws.repeat(2) if paired else draws, part[:, 2]))
    return run_tower(model, torch.cat(frames), labels)


def pool_labels(batches: int, batch: int, seed: int, objects: bool) -> Tensor:
    """Labels of a seed's training clips, batch after batch, no caption twice in one.

    objects: of every second batch on the average, all clips have one colour and each pair another object.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(batches):
        together = objects and torch.rand(1, generator=generator).item() < 0.5
        parts.append((object_labels if together else paired_labels)(batch // 2, generator))
    return torch.cat(parts)


class Workshop:
    """What runs share: items, the CLIP and its captions, clips of a seed and of evaluation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.clip, self.tokenizer = text.extended_clip()
        self.scale = self.clip.logit_scale.exp().item()
        self.model = make_model(self.clip, System(depth=max(system.depth for system in SYSTEMS.values())), 0)
        self.train_items = load_items("shipped" if options.data == "shipped" else "train", options.folder)
        self.evaluation = make_clips(
            self.model, load_items("shipped"),
            balanced_labels(options.per_kind, torch.Generator().manual_seed(EVALUATION_SEED)), False, EVALUATION_SEED,
        )  # fmt: skip
        self._pool: tuple[tuple[int, bool], Clips] | None = None
        self.texts = self._texts()
        self.frame_mean = self._score(self.evaluation.frame_mean)

    def _texts(self) -> Tensor:
        """Captions' embeddings, of the text tower as tuned; tuned once and kept in --weights."""
        options = self.options
        path = options.weights / (
            f"captions-{options.text_steps}-{options.pool}x{options.batch}-{options.data}.safetensors"
        )
        if path.exists():
            return load_file(path)["captions"]
        pool = self.pool(0)
        text.tune(
            self.clip, self.tokenizer, pool.frame_mean, label_number(pool.labels) + scoring.PLAIN,
            self.options.text_steps,
        )  # fmt: skip
        texts = text.bank(self.clip, self.tokenizer)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".writing")
        aside.write_bytes(save({"captions": texts}))
        os.replace(aside, path)
        return texts

    def pool(self, seed: int, long: bool = False) -> Clips:
        """The training clips of a seed; long: of its longer run, which sees each clip once and objects side by side."""
        if self._pool is None or self._pool[0] != (seed, long):
            self._pool = None  # let go of the last before the next is made
            batches = self.options.long_steps if long else self.options.pool
            labels = pool_labels(batches, self.options.batch, seed, objects=long)
            self._pool = ((seed, long), make_clips(self.model, self.train_items, labels, True, seed))
        return self._pool[1]

    def _score(self, videos: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
        told = (videos, self.texts[0], self.evaluation.labels)
        return scoring.figures_of(*told), scoring.hits_of(*told)

    def run(self, part: str, name: str, seed: int, steps: int) -> Row:
        """Train a system and score it."""
        system, options = SYSTEMS[name], self.options
        pool, model = self.pool(seed, part == "long"), make_model(self.clip, system, seed)
        cpu = time.process_time()
        events = self.texts[:, scoring.PLAIN :]
        seconds, losses = train(model, system, pool, events, self.scale, steps, options.batch, seed)
        cpu = time.process_time() - cpu
        if part == "long":  # what is scored is what is stored, in half precision
            model.save_pretrained(self.folder(seed), dtype=torch.float16)
            model = self.stored(seed)
        figures, hits = self._score(scoring.embed(model, self.evaluation))
        plain, plain_hits = self.frame_mean
        return Row(
            part, name, asdict(system), seed, steps, options.batch, round(seconds, 1), round(cpu, 1),
            [round(loss, 4) for loss in losses], figures, plain, scoring.paired_tests(plain_hits, hits), None,
            command(), facts("cpu"),
        )  # fmt: skip

    def folder(self, seed: int) -> Path:
        """Of a longer run's branch."""
        return self.options.weights / f"seed{seed}"

    def stored(self, seed: int) -> BTAdapterVisionModel:
        """A longer run's branch as it is stored."""
        return BTAdapterVisionModel.from_pretrained(self.folder(seed), clip=self.clip).float()

    def check(self, row: Row) -> bool:
        """Ask a longer run's stored branch again; whether it does what its row says."""
        figures, _ = self._score(scoring.embed(self.stored(row.seed), self.evaluation))
        show(replace(row, figures=figures, part="stored"))
        wrong = {
            name: (value, row.figures[name]) for name, value in figures.items() if abs(value - row.figures[name]) > SAME
        }
        if wrong:
            print(f"seed {row.seed}: now and in its row: {wrong}")
        return not wrong


def command() -> str:
    """As typed."""
    return " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])


def plan(options: argparse.Namespace) -> Iterable[tuple[str, str, int, int]]:
    """(part, system, seed, steps) of all runs: seed by seed, so that a run cut short has whole seeds."""
    for seed in range(options.seeds):
        if options.only in ("all", "long"):
            yield ("long", FULL, seed, options.long_steps)
        if options.only in ("all", "ablation"):
            yield from (("ablation", name, seed, options.steps) for name in SYSTEMS)


def read_rows(path: Path) -> list[Row]:
    """Rows there are."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def show(row: Row) -> None:
    """One line a run."""
    told = ", ".join(f"{kind} {row.figures[kind]:.3f}" for kind in ("temporal", *scoring.KINDS, "event", "object"))
    print(f"{row.part} {row.system}, seed {row.seed}, {row.steps} steps, {row.seconds:.0f} s: {told}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("all", "ablation", "long", "cost", "stored"), default="all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=220, help="of a run of the ablation")
    parser.add_argument("--long-steps", type=int, default=500, help="of the base system's longer run")
    parser.add_argument("--batch", type=int, default=16, help="clips, half of them the others' counterparts")
    parser.add_argument("--pool", type=int, default=240, help="batches made once a seed")
    parser.add_argument("--per-kind", type=int, default=208, help="evaluation clips of each temporal kind")
    parser.add_argument("--text-steps", type=int, default=150)
    parser.add_argument("--data", choices=("train", "shipped"), default="train", help="items of the training clips")
    parser.add_argument("--folder", default=None, help="Fashion-MNIST's files")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of trained branches and of captions")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    """Do what is not done yet."""
    options = parse()
    rows = read_rows(options.out)
    done = {(row.part, row.system, row.seed, row.steps) for row in rows if row.batch == options.batch}
    todo = [run for run in plan(options) if run not in done]
    shop = Workshop(options) if todo or options.only == "stored" else None
    if options.only == "stored":
        assert shop is not None
        good = [shop.check(row) for row in rows if row.part == "long"]
        raise SystemExit(0 if good and all(good) else "stored branches and rows do not agree")
    for run in todo:
        assert shop is not None
        rows.append(shop.run(*run))
        write(rows, options.out)
        show(rows[-1])
    if options.only in ("all", "cost") and not any(row.part == "cost" for row in rows):
        rows += cost_rows(Row, command())
        write(rows, options.out)
    print(f"{len(rows)} rows in {options.out}")


if __name__ == "__main__":
    main()
