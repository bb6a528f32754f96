"""The paper in miniature, chat side: questions about held-out moving clips, with the branch and without.

    python bench/miniature/chat.py                       everything; half an hour of one core for each seed
    python bench/miniature/chat.py --steps 2 --clips 1 --pool 2 --seeds 0 --out /tmp/try.json     a try

Every finished row is stored at once; a run killed at any moment goes on with the rows that lack, and several that run
beside one another, each with its own seeds, store into the same file. For every seed (of
tuning and held-out clips): linear probes of what the features hold of a clip's events, then the answers of each of
`SETTINGS`, and exact paired tests. Training clips are composed of Fashion-MNIST's training images, held-out ones of
images in no training split. One branch serves all seeds: the shipped one, pretrained on captions of
single motions, and never told of two events in one clip or of speed. The settings say what was tuned on questions.
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(BENCH), str(BENCH.parent)]

from measure import facts, write  # noqa: E402
from miniature import probes  # noqa: E402
from miniature.chat_questions import TEMPORAL, TYPES, answers, exposures, pairs  # noqa: E402
from miniature.chat_tuning import Pool, Setting, Stand, Told, ask, tune, warm_start  # noqa: E402

from bt_adapter.mini import folder_argument, language, lora  # noqa: E402
from bt_adapter.mini.clip import normalise  # noqa: E402
from bt_adapter.mini.items import load_items  # noqa: E402
from bt_adapter.mini.llava import branch_folder, load_chat  # noqa: E402
from bt_adapter.mini.pretrain import load_branch_model  # noqa: E402
from bt_adapter.mini.trees import Prompts  # noqa: E402

RESULTS = BENCH / "results" / "miniature-chat.json"
OFF = ", branch off"
PROBE = "probe"
SETTINGS = {
    "image model, frame mean": Setting(False, warm=False),
    "branch, untuned": Setting(True, warm=False),
    "shipped": Setting(True, warm=False, stage="tuned"),
    "shipped" + OFF: Setting(False, warm=False, stage="control"),
    "projector and adapters": Setting(True, ("projector", "adapters")),
    "projector and adapters" + OFF: Setting(False, ("projector", "adapters")),
    "stills": Setting(True, ("projector", "adapters"), stills=True),
    "stills" + OFF: Setting(False, ("projector", "adapters"), stills=True),
    "projector and branch": Setting(True, ("projector", "branch")),
    "projector" + OFF: Setting(False, ("projector",)),
    "projector": Setting(True, ("projector",)),
    "warm start alone": Setting(True),
    "projector, no warm start": Setting(True, ("projector",), warm=False),
}
EXTRA = ("stills", "stills" + OFF, "warm start alone", "projector, no warm start")  # only where asked for
# with the branch off nothing of it can learn: projector tuning is the control of the tuning of both
TESTS = {
    "branch, untuned": "image model, frame mean",
    "shipped": "shipped" + OFF,
    "stills": "stills" + OFF,
    "projector": "projector" + OFF,
    "projector and branch": "projector" + OFF,
    "projector and adapters": "projector and adapters" + OFF,
}
# pairs of each type, times --pool for training and times --clips for evaluation
COUNTS = {"motion": 4, "order": 3, "speed": 1}
USES = ("train", "stills", "probe", "ask")  # of clips; the last two held out


@dataclass
class Row:
    """One result. part: "probe", "answers" or "test".

    figures: of a probe, {place: {type: share right}}; of answers, {type: {"generated", "likelihood": shares right, "n",
    "answers": there are}}; of a test, {type: {"generated": {"only_first", "only_second", "p"}, "likelihood": …}}.
    hits: of answers, "1" or "0" for every question, {type: {"generated": "1101…", …}}. losses: of the temporal answers
    in tuning. cpu_seconds: of the row, its tuning included, a shared tuning counted where it was done. options: what
    the run was asked for.
    """

    part: str
    setting: str
    seed: int | str
    figures: dict[str, Any]
    hits: dict[str, dict[str, str]] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    tuning_cpu_seconds: float = 0.0
    cpu_seconds: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """What all settings and seeds share, made when first needed: the chat model, training clips, warm starts."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._stands: dict[str, Stand] = {}  # one at a time
        self._features: dict[str, torch.Tensor] = {}
        self._warm: dict[tuple[bool, bool], dict[str, torch.Tensor]] = {}
        self._of_stills: dict[int, tuple[dict, dict, float, list[float]]] = {}

    def stand_of(self, stage: str) -> Stand:
        """A stage of the chat model, with its own branch or the one asked for."""
        if stage not in self._stands:
            chat, tokenizer = load_chat(stage)
            branch = branch_folder(stage) if stage == "tuned" else self.options.branch
            self._stands = {stage: Stand(chat, Prompts(tokenizer, chat.config.image_token_id), branch)}
        return self._stands[stage]

    @property
    def stand(self) -> Stand:
        return self.stand_of("projector")

    def clips(self, use: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames and labels for one of USES; those for "stills" are to be exposed."""
        pool, few = self.options.pool, self.options.clips
        times = {"train": pool, "stills": pool, "probe": 3 * few, "ask": few}[use]
        counts = {kind: n * times for kind, n in COUNTS.items() if kind == "motion" or use != "stills"}
        items = load_items("train", self.options.data) if use in USES[:2] else load_items("shipped")
        return pairs(items, counts, torch.Generator().manual_seed(10_000 * (seed + 1) + USES.index(use)))

    def features(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        self.stand.reset()
        branch = load_branch_model(self.options.branch)
        return probes.features(branch, self.stand.chat.model.multi_modal_projector, frames)

    @cached_property
    def pool(self) -> Pool:
        frames, labels = self.clips("train", 0)
        self._features = self.features(frames)
        places = self.stand.vision.vision_config.patches + 1
        tokens = {on: self._features[name].unflatten(1, (places, -1)) for on, name in probes.ALL_TOKENS.items()}
        return Pool(frames, labels, tokens)

    @cached_property
    def stills(self) -> Pool:
        clips, labels = self.clips("stills", 0)
        frames = exposures(clips)
        self.stand.reset()
        tokens = [self.stand.vision.frame_mean_tokens(normalise(part)) for part in frames.split(64)]
        return Pool(frames, labels, {False: torch.cat(tokens)})

    def probe(self, seed: int) -> dict[str, dict[str, float]]:
        """Accuracies of the probes on three times as many held-out clips as are asked about.

        The last ones are trained on long exposures and read motion in videos.
        """
        pool, stills = self.pool, self.stills
        frames, labels = self.clips("probe", seed)
        held_out = self.features(frames)
        found = probes.accuracies(self._features, pool.labels, held_out, labels)
        exposed = stills.tokens[False].mean(1)
        for place in ("frame mean, pooled", "video tokens, pooled"):
            found[f"{place}; probe of stills"] = probes.read("motion", exposed, stills.labels, held_out[place], labels)
        return found

    def warm(self, branch: bool, stills: bool) -> dict[str, torch.Tensor]:
        """The warm-started projector, one for all seeds."""
        if (branch, stills) not in self._warm:
            pool = self.stills if stills else self.pool
            self._warm[branch, stills] = warm_start(self.stand, pool, branch)
        return self._warm[branch, stills]

    def prepare(self, setting: Setting, seed: int) -> tuple[float, list[float]]:
        """Set the stand to a setting and tune it; CPU seconds and losses."""
        start = self.warm(setting.branch and not setting.stills, setting.stills) if setting.warm else None
        self.stand.reset(start, seed if "adapters" in setting.learns else None)
        if not setting.learns:
            return 0.0, []
        model = self.stand.chat.model
        if setting.stills and seed in self._of_stills:  # the branch took no part in it, so on and off are one tuning
            projector, adapters, seconds, losses = self._of_stills[seed]
            model.multi_modal_projector.load_state_dict(projector)
            lora.load_adapters(model.language_model, adapters)
            return seconds, losses
        pool = self.stills if setting.stills else self.pool
        seconds, losses = tune(self.stand, setting, pool, self.options.steps, self.options.batch, seed)
        if setting.stills:
            learned = (model.multi_modal_projector.state_dict(), lora.adapter_state(model.language_model))
            self._of_stills[seed] = (*copy.deepcopy(learned), seconds, losses)
        return seconds, losses

    def answers(self, setting: Setting, seed: int) -> tuple[Told, float, list[float]]:
        """Right or wrong of every answer, CPU seconds of tuning, losses."""
        stand = self.stand_of(setting.stage)
        seconds, losses = self.prepare(setting, seed) if setting.stage == "projector" else (0.0, [])
        return ask(stand, setting.branch, *self.clips("ask", seed), seed), seconds, losses


def summary(told: Told) -> dict[str, dict[str, float]]:
    """Share right of each type and way, how many were asked, and among how many answers."""
    return {
        kind: {way: round(sum(hits) / len(hits), 4) for way, hits in ways.items()}
        | {"n": len(ways["generated"]), "answers": len(answers(kind))}
        for kind, ways in told.items()
    }


def as_text(told: Told) -> dict[str, dict[str, str]]:
    return {
        kind: {way: "".join("01"[hit] for hit in hits) for way, hits in ways.items()} for kind, ways in told.items()
    }


def paired_p(first: str, second: str) -> dict[str, Any]:
    """Right in one alone, in the other alone, and p of the exact two-sided McNemar test, of hits as "1101…"."""
    only = [sum(a > b for a, b in zip(x, y, strict=True)) for x, y in ((first, second), (second, first))]
    tail = sum(math.comb(sum(only), k) for k in range(min(only) + 1))
    return {"only_first": only[0], "only_second": only[1], "p": min(1.0, 2 * tail / 2 ** sum(only))}


def tests(rows: Iterable[Row]) -> list[Row]:
    """Each setting against its control, over all seeds both have together, for every type and for all temporal ones."""
    told = {(row.setting, row.seed): row for row in rows if row.part == "answers"}
    found = []
    for setting, control in TESTS.items():
        seeds = sorted(seed for name, seed in told if name == setting and (control, seed) in told)
        if not seeds:
            continue
        figures: dict[str, Any] = {}
        for name, kinds in {**{kind: (kind,) for kind in TYPES}, "temporal": TEMPORAL}.items():
            figures[name] = {}
            for way in ("generated", "likelihood"):
                both = (
                    "".join(told[system, seed].hits[kind][way] for seed in seeds for kind in kinds)
                    for system in (setting, control)
                )
                figures[name][way] = paired_p(*both)
        found.append(Row("test", f"{setting} against {control}", ",".join(map(str, seeds)), figures))
    return found


def asked_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The options a row depends on."""
    wanted = {"clips": options.clips, "branch": os.path.relpath(options.branch, BENCH.parent)}
    if name == PROBE or SETTINGS[name].warm or SETTINGS[name].learns:
        wanted["pool"] = options.pool
    if name != PROBE and SETTINGS[name].learns:
        wanted |= {"steps": options.steps, "batch": options.batch}
    return wanted


def load_rows(path: Path) -> list[Row]:
    """Stored rows but for the tests, which follow from them."""
    if not path.is_file():
        return []
    rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return [row for row in rows if row.part != "test"]


def store(row: Row, path: Path) -> None:
    """Put a row among those stored by now, in the place of one of the same setting and seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)  # locked, so that of two runs that store at once neither's row is lost
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = [other for other in load_rows(path) if (other.setting, other.seed) != (row.setting, row.seed)]
        rows = sorted([*rows, row], key=lambda row: ([PROBE, *SETTINGS].index(row.setting), row.seed))
        write(rows + tests(rows), path)
    finally:
        os.close(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60, help="of each tuning")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step, in whole pairs")
    parser.add_argument("--pool", type=int, default=48, help="times 16 training clips")
    parser.add_argument("--clips", type=int, default=5, help="times 16 held-out clips")
    parser.add_argument(
        "--settings", nargs="+", choices=(PROBE, *SETTINGS), help=f"default: all but {', '.join(EXTRA)}"
    )
    parser.add_argument("--branch", type=folder_argument, default="mini:branch", help="folder of a pretrained branch")
    parser.add_argument("--data", default=None, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, default=RESULTS)
    run(parser.parse_args())


def run(options: argparse.Namespace) -> None:
    """Make what lacks, storing every row when it is there."""
    if not language.available():
        raise SystemExit("the language model is not installed: make demo installs it")
    torch.set_num_threads(1)
    command = shlex.join(["python", "bench/miniature/chat.py", *sys.argv[1:]])
    rows = load_rows(options.out)
    done = {(row.setting, row.seed) for row in rows if row.options == asked_of(row.setting, options)}
    wanted = options.settings or [PROBE, *(name for name in SETTINGS if name not in EXTRA)]
    shared = Bench(options)
    for seed in options.seeds:
        for name in wanted:
            if (name, seed) in done:
                continue
            began = time.process_time()
            if name == PROBE:
                row = Row(PROBE, name, seed, shared.probe(seed))
            else:
                told, seconds, losses = shared.answers(SETTINGS[name], seed)
                row = Row("answers", name, seed, summary(told), as_text(told), losses, round(seconds, 1))
            row.cpu_seconds = round(time.process_time() - began, 1)
            row.options, row.command, row.facts = asked_of(name, options), command, facts("cpu")
            store(row, options.out)
            print(f"seed {seed}, {name}: {row.figures} {row.losses}, {row.cpu_seconds:.0f} s", flush=True)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
