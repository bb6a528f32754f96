"""Make the small world's models from nothing and score them: ``python bench/miniature/chain.py WORK``.

Each stage is a process of its own: a command line of ``bt-adapter`` with a recipe of ``recipes/``, or a command of this
folder. ``--list`` prints them. A stage whose output is in WORK is skipped: the same command goes on where it stopped,
and a killed training resumes. WORK/logs holds what the stages print, WORK/times.jsonl the time of each.

No stage before the untuned answers may have seen a video but the branch, which is pretrained on clips and captions: the
chain reads what CLIP and image chat model were fed from what they recorded themselves, and stops if there is more than
stills. ``--stored`` trains nothing: it asks and scores the weights of the package bt-adapter-mini. ``--install`` puts
the models of the first seed there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from graphlib import TopologicalSorter
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

from miniature import stored  # noqa: E402

from bt_adapter.files import digest  # noqa: E402

HERE = "bench/miniature"
ASKED_SETS = ("stills", "heldout", "heldout-stills", "retrieval")  # all that the stored weights need
SETS = ("pretrain", "stills", "clips", "heldout", "heldout-stills", "retrieval", "stills-ramp", "stills-plain", "speed")
ON_CPU = "--device cpu --dtype float32"
# Of the first seed: one stage is made in another way, all others are the headline's.
BRANCH_ABLATIONS = {"no-mbta": "--mbta 0", "no-mbca": "--mbca 0", "reference-order": ""}
IMAGE_ABLATIONS = {"one-exposure": "stills-ramp", "plain-stills": "stills-plain"}
QUICK = {
    "datasets.py": "--count 64", "clip.py": "--steps 2 --batch-size 8", "pretrain": "--steps 2",
    "reference_order.py": "--steps 2", "tune": "--steps 2 --batch-size 8", "probes.py": "--count 36",
}  # fmt: skip


class ChainError(Exception):
    """A stage failed, or may not run: one sentence."""


class Stage(NamedTuple):
    """A command and what it leaves.

    Attributes:
        name: its folder in WORK, as "seed0/branch".
        command: its words; "WORK/…" is in the folder of the chain.
        done: a file that is there once all output is.
        needs: names of the stages it reads from.
    """

    name: str
    command: str
    done: Path
    needs: set[str]

    def words(self, work: Path) -> list[str]:
        """The command as a process takes it."""
        program, *words = [
            word.replace("WORK", str(work), 1) if word[:4] == "WORK" else word for word in self.command.split()
        ]
        return [sys.executable, *(["-m", "bt_adapter.commands"] if program == "bt-adapter" else []), *words]

    @property
    def log(self) -> str:
        return f"{self.name.replace('/', '-')}.log"

    def made_by(self) -> dict[str, str]:
        """The command, and a hash of its recipe where it has one."""
        recipes = [ROOT / word for word in self.command.split() if word.endswith(".yaml")]
        digests = [digest([recipe.read_bytes()], 16, "sha256") for recipe in recipes]
        return {"command": self.command, "recipe": " ".join(digests)}


class Plan:
    """All stages of a chain, in an order in which they can run.

    quick: a few steps and questions of each. use_stored: the trained parts are those of the package bt-adapter-mini.
    """

    def __init__(self, work: Path, seeds: Sequence[int], quick: bool = False, use_stored: bool = False) -> None:
        self.work, self.quick, self.use_stored = work, quick, use_stored
        self.stages: dict[str, Stage] = {}
        for name in ASKED_SETS if use_stored else SETS:
            self._add(f"data/{name}", f"python {HERE}/datasets.py WORK/data --only {name}", "about.json")
        self._add("clip", f"python {HERE}/clip.py WORK/clip", "about.json")
        self._add("fresh", f"python {HERE}/fresh.py WORK/clip WORK/fresh", "about.json")
        self._retrieval("mean", "--no-branch")
        for seed in seeds:
            self._add_seed(seed)
        if not use_stored:
            self._add_ablations(seeds[0])

    def _add_seed(self, seed: int) -> None:
        own = f"seed{seed}"
        image, branch = f"{own}/image", f"{own}/branch"
        self._branch(branch, seed)
        self._tune(image, seed, "image", "fresh", "stills")
        self._answers(f"{own}/untuned", image, branch)
        self._answers(f"{own}/untuned-off", image, branch, "--no-branch")
        self._answers(f"{own}/stills", image, options="--no-branch", data="heldout-stills")
        self._tune(f"{own}/tuned", seed, "video", image, "clips", branch)
        self._tune(f"{own}/control", seed, "video", image, "clips", options="--no-use-branch --learn projector lora")
        self._answers(f"{own}/tuned-answers", f"{own}/tuned")
        self._answers(f"{own}/control-answers", f"{own}/control")
        self._retrieval(f"{own}/retrieval", f"--branch WORK/{branch}/branch")
        self._add(f"{own}/probes", f"python {HERE}/probes.py WORK --seed {seed}", "probes.json", branch, image)

    def _add_ablations(self, seed: int) -> None:
        for name, options in BRANCH_ABLATIONS.items():
            program = f"python {HERE}/reference_order.py" if name == "reference-order" else "bt-adapter pretrain"
            self._branch(f"ablations/{name}/branch", seed, options, program)
            self._answers(f"ablations/{name}/untuned", f"seed{seed}/image", f"ablations/{name}/branch")
        self._branch("speed/branch", seed, data="speed")
        self._retrieval("speed/retrieval", "--branch WORK/speed/branch/branch")
        self._answers("speed/untuned", f"seed{seed}/image", "speed/branch")
        self._tune("speed/tuned", seed, "video", f"seed{seed}/image", "clips", "speed/branch")
        self._answers("speed/tuned-answers", "speed/tuned")
        for name, data in IMAGE_ABLATIONS.items():
            self._tune(f"ablations/{name}/image", seed, "image", "fresh", data)
            self._answers(f"ablations/{name}/untuned", f"ablations/{name}/image", f"seed{seed}/branch")

    def _branch(
        self, name: str, seed: int, options: str = "", program: str = "bt-adapter pretrain", data: str = "pretrain"
    ) -> None:
        command = f"{program} --config {HERE}/recipes/branch.yaml --data WORK/data/{data} --clip WORK/clip"
        self._add(name, f"{command} --seed {seed} --out WORK/{name} {options}", "branch/config.json")

    def _tune(
        self, name: str, seed: int, recipe: str, model: str, data: str, branch: str = "", options: str = ""
    ) -> None:
        folder, file = (model, "stills") if model == "fresh" else (f"{model}/tuned", "clips")
        command = f"bt-adapter tune --config {HERE}/recipes/{recipe}.yaml --model WORK/{folder}{_attached(branch)}"
        command += f" --data WORK/data/{data}/{file}.jsonl --seed {seed} --out WORK/{name} {options}"
        self._add(name, command, "tuned/tuned.json")

    def _answers(self, name: str, model: str, branch: str = "", options: str = "", data: str = "heldout") -> None:
        command = f"bt-adapter eval qa --model WORK/{model}/tuned{_attached(branch)}"
        command += f" --data WORK/data/{data}/questions.json --videos WORK/data/{data} --out WORK/{name}"
        command += f" --batch-size 32 --max-new-tokens 12 {ON_CPU} {options}"
        self._add(name, command, "scores.json")

    def _retrieval(self, name: str, options: str) -> None:
        command = f"bt-adapter eval retrieval --data WORK/data/retrieval/pairs.jsonl --clip WORK/clip {options}"
        command += f" --cache WORK/features --workers 0 {ON_CPU} --out WORK/{name}/retrieval.json"
        self._add(name, f"{command} --scores WORK/{name}/scores.safetensors", "retrieval.json")

    def _add(self, name: str, command: str, done: str, *needs: str) -> None:
        """Add a stage, which needs those whose folders its command names, and ``needs``."""
        named = {known for known in self.stages if f" WORK/{known}/" in command.replace(" ", "/ ") + "/"}
        if self.use_stored and name.rpartition("/")[2] in stored.PLACES:
            command = f"python {HERE}/stored.py WORK {name}"
        if self.quick:
            command += " " + QUICK.get(command.split()[1].rpartition("/")[2], "")
        self.stages[name] = Stage(name, " ".join(command.split()), self.work / name / done, named | set(needs))

    def chosen(self, only: Sequence[str]) -> list[Stage]:
        """The stages that ``--stages`` names: all of "data", "seed0" or "ablations", one by its name, or every "image".

        Raises ChainError for a name of no stage, or where a stage's input is neither there nor chosen.
        """
        found: set[str] = set()
        for asked in only or self.stages:
            names = {name for name in self.stages if asked == name or name.startswith(f"{asked}/")}
            names = names or {name for name in self.stages if name.endswith(f"/{asked}") and name[:5] != "data/"}
            if not names:
                raise ChainError(f"--stages: there is no {asked}; known: {', '.join(self.stages)}")
            found |= names
        chosen = [stage for name, stage in self.stages.items() if name in found]
        for stage in chosen:
            if missing := sorted(n for n in stage.needs - found if not self.stages[n].done.exists()):
                raise ChainError(f"{stage.name} needs {', '.join(missing)}: name it in --stages too")
        return chosen


def _attached(branch: str) -> str:
    return f" --branch WORK/{branch}/branch" if branch else ""


def check_stills_only(tuned: Path) -> dict[str, dict[str, Any]]:
    """Return the recorded training data of CLIP and image chat model: {"clip": …, "image": …}.

    tuned: OUT/tuned of the image stage. Raises ChainError where a file of more than one frame, a question about a video
    or a branch is among it.
    """
    about = json.loads((tuned / "tuned.json").read_text(encoding="utf-8"))
    questions = Path(about["recipe"]["data"])
    found = {}
    for name, folder in (("clip", Path(about["model"])), ("image", questions.parent)):
        fed = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if set(fed["frames"]) != {"1"}:
            raise ChainError(f"{tuned}: {name} was fed files of several frames, {fed['frames']}: {folder}/about.json")
        found[name] = {key: fed.get(key) for key in ("files", "frames", "items", "exposures")}
    records = read_lines(questions)
    for number, record in enumerate(records, 1):
        if "image" not in record or "video" in record or "<video>" in json.dumps(record):
            raise ChainError(f"{questions}, line {number}: it is no question about a still alone")
    found["image"]["questions"] = len(records)
    if "branch" in about["parts"] or (about.get("branch") or {}).get("source"):
        raise ChainError(f"{tuned}: a branch was part of the image stage")
    return found


def start(words: Sequence[str], log: IO[str], threads: int) -> subprocess.Popen:
    """Start a process on so many threads, whose output goes to a log."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


class Runner:
    """Runs stages, at most ``jobs`` at a time and on one thread each, as soon as what they need is there.

    CLIP is trained alone, on ``jobs`` threads.
    """

    def __init__(self, plan: Plan, jobs: int, start: Callable[..., subprocess.Popen] = start) -> None:
        self.plan, self.jobs, self.start = plan, jobs, start
        self.times, self.logs = plan.work / "times.jsonl", plan.work / "logs"
        self.running: dict[int, tuple[Stage, subprocess.Popen, int, float]] = {}  # with threads and time of its start

    def run(self, stages: Sequence[Stage]) -> None:
        """Run those that are not done. Raises ChainError for the first that fails; the others are stopped."""
        self.logs.mkdir(parents=True, exist_ok=True)
        missing = {stage.name: stage for stage in stages if not self._is_done(stage)}
        order = TopologicalSorter({name: stage.needs & missing.keys() for name, stage in missing.items()})
        if "clip" in missing:  # all others begin before it or need it
            order.add("clip", *(name for name in missing if name.startswith("data/")))
        order.prepare()
        ready: list[str] = []
        try:
            while order.is_active():
                ready += order.get_ready()
                while ready and len(self.running) < self.jobs:
                    self._start(missing[ready.pop(0)])
                order.done(self._wait())
        finally:
            for pid in self.running:
                os.kill(pid, signal.SIGTERM)
            for pid in list(self.running):
                self._end(*os.wait4(pid, 0))

    def records(self) -> list[dict[str, Any]]:
        """The lines of times.jsonl, one for each time that a stage ran."""
        return read_lines(self.times) if self.times.exists() else []

    def _is_done(self, stage: Stage) -> bool:
        if not stage.done.exists():
            return False
        made = [record for record in self.records() if record["stage"] == stage.name and record["finished"]]
        if made and (other := {key: made[-1][key] for key, value in stage.made_by().items() if made[-1][key] != value}):
            raise ChainError(f"{stage.done.parent} was made by another command or recipe, {other}; remove it")
        for source in (self.plan.stages[need].done for need in stage.needs):
            if source.exists() and source.stat().st_mtime > stage.done.stat().st_mtime:
                raise ChainError(f"{stage.done} is older than {source}, which it was made from; remove it")
        print(f"{stage.name}: there already", flush=True)
        return True

    def _start(self, stage: Stage) -> None:
        for need in stage.needs:
            if need.endswith("/image"):
                check_stills_only(self.plan.work / need / "tuned")
        threads = self.jobs if stage.name == "clip" else 1
        with (self.logs / stage.log).open("a", encoding="utf-8") as log:
            child = self.start(stage.words(self.plan.work), log, threads)
        self.running[child.pid] = stage, child, threads, time.monotonic()

    def _wait(self) -> str:
        """Wait until a stage ends; its name."""
        while not (ended := next((one for pid in self.running if (one := os.wait4(pid, os.WNOHANG))[0]), None)):
            time.sleep(0.05)
        stage, child, *_ = self.running[ended[0]]
        if not self._end(*ended):
            raise ChainError(f"{stage.name} ended with {child.returncode}; see {self.logs / stage.log}")
        return stage.name

    def _end(self, pid: int, status: int, usage: Any) -> bool:
        """Note a stage's time by the clock and of the processor; returns whether it finished its work."""
        stage, child, threads, began = self.running.pop(pid)
        child.returncode = os.waitstatus_to_exitcode(status)  # which the child's own wait() can no longer find out
        line = {"stage": stage.name, "seconds": round(time.monotonic() - began, 1), "threads": threads}
        line |= {"cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1)}
        line |= {"finished": child.returncode == 0 and stage.done.exists(), **stage.made_by()}
        with self.times.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{stage.name}: {line['seconds']:.0f} s{'' if line['finished'] else ', not finished'}", flush=True)
        return bool(line["finished"])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of everything that is made")
    parser.add_argument("--seeds", type=int, nargs="+", help="of branch, image stage and tuning; default: 0 1 2")
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="these alone, as seed1 or image")
    parser.add_argument("--jobs", type=int, default=2, choices=range(1, 65), metavar="N", help="stages at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--list", action="store_true", help="print the command of each stage, and run none")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--stored", action="store_true", help="score the package's weights, of seed 0; train nothing")
    source.add_argument("--install", action="store_true", help="copy the first seed's models to the package's weights")
    options = parser.parse_args()
    if options.stored and options.seeds not in (None, [0]):
        parser.error("--seeds: the stored weights are of seed 0 alone")
    seeds = options.seeds or ([0] if options.stored else [0, 1, 2])
    began, work = time.monotonic(), options.work.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stages at work are ended too
    try:
        plan = Plan(work, seeds, options.quick, options.stored)
        stages = plan.chosen(options.stages)
        if options.list:
            print(*(f"{stage.name}: {stage.command}" for stage in stages), sep="\n")
            return 0
        if options.install:
            stored.install(work, seeds[0])
            return 0
        runner = Runner(plan, options.jobs)
        runner.run(stages)
    except ChainError as error:
        print(f"chain: {error}", file=sys.stderr)
        return 1
    if not options.stages:
        command = [sys.executable, f"{HERE}/scores.py", str(work), "--seeds", *map(str, seeds)]
        own = ["--out", str(work / "miniature.json")] if options.quick or options.stored else []
        subprocess.run(command + own, cwd=ROOT, check=True)
    spent = sum(record.get("cpu_seconds") or 0 for record in runner.records())
    print(f"this run: {(time.monotonic() - began) / 60:.1f} min; all stages: {spent / 60:.1f} min of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
