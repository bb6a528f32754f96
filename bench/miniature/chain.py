"""Make the small world's models from nothing and score them: ``python bench/miniature/chain.py WORK``.

Each stage is a process of its own: a command line of ``bt-adapter`` with a recipe of ``recipes/``, or a command of this
folder. ``--list`` prints them. A stage whose output is in WORK is skipped: the same command goes on where it stopped,
and a killed training resumes. WORK/logs holds what the stages print, WORK/times.jsonl the time of each.

No stage before the untuned answers may have seen a video but the branch, which is pretrained on clips and captions: the
chain reads what CLIP and image chat model were fed from what they recorded themselves, and stops if there is more than
stills. ``--install`` puts the models of the first seed where the package bt-adapter-mini has its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from bt_adapter.files import digest, replace_folder, write_whole  # noqa: E402

HERE = "bench/miniature"
WEIGHTS = ROOT / "mini" / "bt_adapter_mini" / "weights"
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


@dataclass(frozen=True)
class Stage:
    """A command and what it leaves.

    Attributes:
        name: its folder in WORK, as "seed0/branch".
        command: its words; "WORK/…" is in the folder of the chain. done: a file that is there once all output is.
        needs: names of the stages it reads from. alone: it runs on all threads, with no other beside it.
        stills_only: a tuned folder; what was fed to it is checked before the stage runs.
    """

    name: str
    command: str
    done: Path
    needs: tuple[str, ...] = ()
    alone: bool = False
    stills_only: Path | None = None

    def words(self, work: Path) -> list[str]:
        """The command as a process takes it."""
        program, *words = [
            word.replace("WORK", str(work), 1) if word[:4] == "WORK" else word for word in self.command.split()
        ]
        return [sys.executable, *(["-m", "bt_adapter.commands"] if program == "bt-adapter" else []), *words]

    def made_by(self) -> dict[str, str]:
        """The command, and a hash of its recipe where it has one."""
        recipes = [ROOT / word for word in self.command.split() if word.endswith(".yaml")]
        digests = [digest([recipe.read_bytes()], 16, "sha256") for recipe in recipes]
        return {"command": self.command, "recipe": " ".join(digests)}


class Plan:
    """All stages of a chain, in an order in which they can run."""

    def __init__(self, work: Path, seeds: Sequence[int], quick: bool = False) -> None:
        self.work, self.quick = work, quick
        self.stages: dict[str, Stage] = {}
        for name in SETS:
            self._add(f"data/{name}", f"python {HERE}/datasets.py WORK/data --only {name}", "about.json")
        self._add("clip", f"python {HERE}/clip.py WORK/clip", "about.json", alone=True)
        self._add("fresh", f"python {HERE}/fresh.py WORK/clip WORK/fresh", "about.json", "clip")
        self._retrieval("mean", "--no-branch")
        for own, seed in ((f"seed{seed}", seed) for seed in seeds):
            image, branch = f"{own}/image", f"{own}/branch"
            self._branch(branch, seed)
            self._tune(image, seed, "image", "fresh", "stills")
            self._answers(f"{own}/untuned", image, branch)
            self._answers(f"{own}/untuned-off", image, branch, "--no-branch")
            self._answers(f"{own}/stills", image, options="--no-branch", data="heldout-stills")
            self._tune(f"{own}/tuned", seed, "video", image, "clips", branch)
            off = "--no-use-branch --learn projector lora"
            self._tune(f"{own}/control", seed, "video", image, "clips", options=off)
            self._answers(f"{own}/tuned-answers", f"{own}/tuned")
            self._answers(f"{own}/control-answers", f"{own}/control")
            self._retrieval(f"{own}/retrieval", f"--branch WORK/{branch}/branch", branch)
            command = f"python {HERE}/probes.py WORK --seed {seed}"
            self._add(f"{own}/probes", command, "probes.json", branch, image)
        first = f"seed{seeds[0]}"
        for name, options in BRANCH_ABLATIONS.items():
            program = f"python {HERE}/reference_order.py" if name == "reference-order" else "bt-adapter pretrain"
            self._branch(f"ablations/{name}/branch", seeds[0], options, program)
            self._answers(f"ablations/{name}/untuned", f"{first}/image", f"ablations/{name}/branch")
        self._branch("speed/branch", seeds[0], data="speed")
        self._retrieval("speed/retrieval", "--branch WORK/speed/branch/branch", "speed/branch")
        for name, data in IMAGE_ABLATIONS.items():
            self._tune(f"ablations/{name}/image", seeds[0], "image", "fresh", data)
            self._answers(f"ablations/{name}/untuned", f"ablations/{name}/image", f"{first}/branch")

    def _branch(
        self, name: str, seed: int, options: str = "", program: str = "bt-adapter pretrain", data: str = "pretrain"
    ) -> None:
        command = f"{program} --config {HERE}/recipes/branch.yaml --data WORK/data/{data} --clip WORK/clip"
        command += f" --seed {seed} --out WORK/{name} {options}"
        self._add(name, command, "branch/config.json", f"data/{data}", "clip")

    def _tune(
        self, name: str, seed: int, recipe: str, model: str, data: str, branch: str = "", options: str = ""
    ) -> None:
        folder, file = (model, "stills") if model == "fresh" else (f"{model}/tuned", "clips")
        command = f"bt-adapter tune --config {HERE}/recipes/{recipe}.yaml --model WORK/{folder}{_attached(branch)}"
        command += f" --data WORK/data/{data}/{file}.jsonl --seed {seed} --out WORK/{name} {options}"
        self._add(name, command, "tuned/tuned.json", f"data/{data}", model, branch)

    def _answers(self, name: str, model: str, branch: str = "", options: str = "", data: str = "heldout") -> None:
        command = (
            f"bt-adapter eval qa --model WORK/{model}/tuned{_attached(branch)} --data WORK/data/{data}/questions.json"
        )
        command += f" --videos WORK/data/{data} --out WORK/{name} --batch-size 32 --max-new-tokens 12"
        stills_only = self.work / model / "tuned" if model.endswith("image") else None
        command += f" --device cpu --dtype float32 {options}"
        self._add(name, command, "scores.json", f"data/{data}", model, branch, stills_only=stills_only)

    def _retrieval(self, name: str, options: str, branch: str = "") -> None:
        command = f"bt-adapter eval retrieval --data WORK/data/retrieval/pairs.jsonl --clip WORK/clip {options}"
        command += f" --cache WORK/features --workers 0 {ON_CPU} --out WORK/{name}/retrieval.json"
        command += f" --scores WORK/{name}/scores.safetensors"
        self._add(name, command, "retrieval.json", "data/retrieval", "clip", branch)

    def _add(self, name: str, command: str, done: str, *needs: str, **more: Any) -> None:
        if self.quick:
            command += " " + QUICK.get(command.split()[1].rpartition("/")[2], "")
        command = " ".join(command.split())
        self.stages[name] = Stage(name, command, self.work / name / done, tuple(filter(None, needs)), **more)

    def chosen(self, only: Sequence[str]) -> list[Stage]:
        """The stages that ``--stages`` names: all of "data", "seed0" or "ablations", one by its name, or every "image".

        Raises ChainError for a name of no stage, or where a stage's input is neither there nor chosen.
        """
        found: dict[str, Stage] = {}
        for asked in only or self.stages:
            names = [name for name in self.stages if asked == name or name.startswith(f"{asked}/")]
            names = names or [name for name in self.stages if name.endswith(f"/{asked}") and name[:5] != "data/"]
            if not names:
                raise ChainError(f"--stages: there is no {asked}; known: {', '.join(self.stages)}")
            found |= {name: self.stages[name] for name in names}
        for stage in found.values():
            if missing := [n for n in stage.needs if n not in found and not self.stages[n].done.exists()]:
                raise ChainError(f"{stage.name} needs {', '.join(missing)}: name it in --stages too")
        return [stage for name, stage in self.stages.items() if name in found]


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
    for number, line in enumerate(questions.read_text(encoding="utf-8").splitlines(), 1):
        record = json.loads(line)
        if "image" not in record or "video" in record or "<video>" in line:
            raise ChainError(f"{questions}, line {number}: it is no question about a still alone")
    found["image"]["questions"] = number
    if "branch" in about["parts"] or (about.get("branch") or {}).get("source"):
        raise ChainError(f"{tuned}: a branch was part of the image stage")
    return found


def start(words: Sequence[str], log: IO[str], threads: int) -> subprocess.Popen:
    """Start a process on so many threads, whose output goes to a log."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


class Process(NamedTuple):
    """A stage while it runs."""

    stage: Stage
    child: Any
    log: Path
    began: float
    threads: int


class Runner:
    """Runs stages, at most ``jobs`` at a time, each as soon as what it needs is there."""

    def __init__(self, plan: Plan, threads: int, jobs: int, start: Callable[..., Any] = start) -> None:
        self.plan, self.threads, self.jobs, self.start = plan, threads, min(jobs, threads), start
        self.times = plan.work / "times.jsonl"
        self.running: list[Process] = []

    def run(self, stages: Sequence[Stage]) -> None:
        """Run those that are not done. Raises ChainError for the first that fails; the others are stopped."""
        (self.plan.work / "logs").mkdir(parents=True, exist_ok=True)
        waiting = [stage for stage in stages if not self._is_done(stage)]
        unfinished = {stage.name for stage in waiting}
        try:
            while waiting or self.running:
                for stage in list(waiting):
                    if self._has_room(stage) and not unfinished.intersection(stage.needs):
                        waiting.remove(stage)
                        self._start(stage)
                unfinished.discard(self._wait())
        finally:
            for process in self.running:
                process.child.terminate()
            for process in self.running:
                process.child.wait()
                self._record(process, finished=False)

    def records(self) -> list[dict[str, Any]]:
        """The lines of times.jsonl, one for each time that a stage ran."""
        return [*map(json.loads, self.times.read_text(encoding="utf-8").splitlines())] if self.times.exists() else []

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

    def _has_room(self, stage: Stage) -> bool:
        if stage.alone and self.running:
            return False
        return len(self.running) < self.jobs and not any(process.stage.alone for process in self.running)

    def _start(self, stage: Stage) -> None:
        if stage.stills_only is not None:
            check_stills_only(stage.stills_only)
        threads = self.threads if stage.alone else self.threads // self.jobs
        path = self.plan.work / "logs" / f"{stage.name.replace('/', '-')}.log"
        with path.open("a", encoding="utf-8") as log:
            child = self.start(stage.words(self.plan.work), log, threads)
        self.running.append(Process(stage, child, path, time.monotonic(), threads))

    def _wait(self) -> str:
        """Wait until a stage ends; its name."""
        while True:
            for process in self.running:
                before = _cpu_seconds_of_ended_children()
                if (code := process.child.poll()) is None:
                    continue
                self.running.remove(process)
                finished = code == 0 and process.stage.done.exists()
                seconds = self._record(process, finished, _cpu_seconds_of_ended_children() - before)
                print(f"{process.stage.name}: {seconds:.0f} s", flush=True)
                if not finished:
                    raise ChainError(f"{process.stage.name} ended with {code}; see {process.log}")
                return process.stage.name
            time.sleep(0.1)

    def _record(self, process: Process, finished: bool, cpu: float | None = None) -> float:
        """Note a stage's time: by the clock, which other work on the machine lengthens, and of the processor."""
        seconds = round(time.monotonic() - process.began, 1)
        line: dict[str, Any] = {"stage": process.stage.name, "seconds": seconds, "threads": process.threads}
        line |= {"cpu_seconds": None if cpu is None else round(cpu, 1), "finished": finished}
        with self.times.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | process.stage.made_by()) + "\n")
        return seconds


def _cpu_seconds_of_ended_children() -> float:
    """Processor seconds of all child processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def score(work: Path, seeds: Sequence[int], quick: bool) -> None:
    """Write bench/results/miniature.json, or in a quick run WORK/miniature.json."""
    seed_words = [str(seed) for seed in seeds]
    out = ["--out", str(work / "miniature.json")] if quick else []
    subprocess.run([sys.executable, f"{HERE}/scores.py", str(work), *out, "--seeds", *seed_words], cwd=ROOT, check=True)


def install(work: Path, seed: int, weights: Path = WEIGHTS) -> None:
    """Copy the models of a seed to the package's weights: float16, and no path of this machine in their files."""
    from safetensors.torch import load_file, save_file

    own = work / f"seed{seed}"
    sources = {"clip": work / "clip", "branch": own / "branch" / "branch"}
    sources |= {name: own / name / "tuned" for name in ("image", "tuned", "control")}
    known = {
        "clip": "mini",
        "fresh": "mini:fresh",
        f"{own.name}/image/tuned": "mini:image",
        f"{own.name}/branch/branch": None,
    }
    for part, source in sources.items():
        aside = weights / f"{part}.writing"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(source, aside, ignore=shutil.ignore_patterns("README.md"))
        for path in aside.rglob("*.safetensors"):
            state = {name: value.half() for name, value in load_file(path).items()}
            save_file(state, path, metadata={"format": "pt"})
        for path in aside.rglob("*.json"):
            text = path.read_text(encoding="utf-8")
            named = re.sub(
                f'"{re.escape(str(work))}/([^"]*)"', lambda found: json.dumps(known.get(found[1], found[1])), text
            )
            path.write_text(named, encoding="utf-8")
        replace_folder(aside, weights / part)
    headline = json.loads((ROOT / "bench/results/miniature.json").read_text(encoding="utf-8"))["headline"]
    write_whole(weights.with_name("results.json"), json.dumps({"headline": headline}, indent=1) + "\n")
    print(f"installed in {weights}: {sum(f.stat().st_size for f in weights.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of everything that is made")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of branch, image stage and tuning")
    parser.add_argument("--stages", nargs="+", default=[], metavar="NAME", help="these alone, as seed1 or image")
    parser.add_argument("--threads", type=int, default=2, help="threads of all processes together")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything: does it run?")
    parser.add_argument("--list", action="store_true", help="print the command of each stage, and run none")
    parser.add_argument("--install", action="store_true", help="copy the first seed's models to the package's weights")
    options = parser.parse_args()
    for name in ("threads", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; expected at least 1")
    began, work = time.monotonic(), options.work.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stages at work are ended too
    try:
        plan = Plan(work, options.seeds, options.quick)
        stages = plan.chosen(options.stages)
        if options.list:
            for stage in stages:
                print(f"{stage.name}: {stage.command}")
            return 0
        if options.install:
            install(work, options.seeds[0])
            return 0
        runner = Runner(plan, options.threads, options.jobs)
        runner.run(stages)
        if not options.stages:
            score(work, options.seeds, options.quick)
    except ChainError as error:
        print(f"chain: {error}", file=sys.stderr)
        return 1
    spent = sum(record.get("cpu_seconds") or 0 for record in runner.records())
    print(f"this run: {(time.monotonic() - began) / 60:.1f} min; all stages: {spent / 60:.1f} min of processor time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
