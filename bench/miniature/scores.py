"""Score what the chain made: ``python bench/miniature/scores.py WORK`` writes bench/results/miniature.json.

Answers are read back to labels by ``questions.parse``. Of each kind of question there are three figures: the share that
is right; "pair", among the answers that name the event or its counterpart, the share that names the event; and "both",
the share of pairs of clips of which both are answered right, which is 0 for whoever sees the mean of the frames alone.
Two systems are compared by exact two-sided McNemar tests, seed by seed; the p told is the largest.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

from miniature.chain import BRANCH_ABLATIONS, IMAGE_ABLATIONS, ROOT, ChainError, check_stills_only, read_lines  # noqa: E402
from miniature.questions import parse  # noqa: E402
from miniature.world import EVENTS, KINDS, SINGLE  # noqa: E402
from summaries import small, spread  # noqa: E402

from bt_adapter.eval.ranking import retrieval  # noqa: E402
from bt_adapter.eval.report import read_json, versions  # noqa: E402
from bt_adapter.files import write_json  # noqa: E402

RESULT = ROOT / "bench" / "results" / "miniature.json"
# Folders of answers in that of a seed, with what they are called.
SYSTEMS = {
    "untuned": "image chat model with the branch attached, no video question in training",
    "untuned-off": "the same with the branch off: mean of the frames",
    "tuned-answers": "projector, branch and adapters tuned on video questions",
    "control-answers": "control: the same tuning with the branch off",
    "stills": "image chat model asked about stills, in which motion shows",
}
COMPARED = (("untuned", "untuned-off"), ("tuned-answers", "control-answers"), ("tuned-answers", "untuned"))
# Answers of the first seed with one stage made in another way: folder, and the system they are compared with.
OTHERWISE = {name: (f"ablations/{name}/untuned", "untuned") for name in (*BRANCH_ABLATIONS, *IMAGE_ABLATIONS)} | {
    "speed-untuned": ("speed/untuned", "untuned"), "speed-tuned": ("speed/tuned-answers", "tuned-answers"),
}  # fmt: skip
HEADLINE = {
    "motion, of 6": ("motion", "right"), "within the pair": ("motion", "pair"), "order, of 8": ("order", "right"),
    "speed, of 2": ("speed", "right"), "item, of 8": ("item", "right"), "colour, of 6": ("colour", "right"),
}  # fmt: skip

Answers = dict[str, dict[str, tuple[Any, Any]]]  # kind -> id -> (what is right, what was said)


def read_answers(folder: Path) -> Answers:
    """The answers in the output folder of ``bt-adapter eval qa``. Raises ChainError where some are missing."""
    about = read_json(folder / "scores.json")
    if about["answered"] != about["records"]:
        raise ChainError(f"{folder}: {about['answered']} of {about['records']} questions are answered")
    found: Answers = {}
    for row in read_json(folder / "predictions.json"):
        kind = row["type"]
        found.setdefault(kind, {})[row["id"]] = (parse(kind, row["answer"]), parse(kind, row["pred"]))
    return found


def hits(answers: Mapping[str, tuple[Any, Any]]) -> dict[str, bool]:
    """Which answers are right, by id."""
    return {key: right == said for key, (right, said) in answers.items()}


def figures(answers: Answers) -> dict[str, dict[str, float | int | None]]:
    """Of each kind n and the share right; of events also "pair" with its own n, and "both"."""
    found: dict[str, dict[str, float | int | None]] = {}
    for kind, told in answers.items():
        right = hits(told)
        found[kind] = {"n": len(right), "right": _share(right.values())}
        if kind in KINDS:
            named = [right == said for right, said in told.values() if said in (right, right ^ 1)]
            both = [right[key] and right[f"{key[:-1]}b"] for key in right if key[-1] == "a"]
            found[kind] |= {"pair": _share(named), "pair_n": len(named), "both": _share(both)}
    return found


def _share(values: Collection[bool]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def mcnemar(first: Mapping[Any, bool], second: Mapping[Any, bool]) -> dict[str, float | int]:
    """Exact two-sided test of two systems on the same questions: right in the one alone, in the other alone, p."""
    if first.keys() != second.keys():
        raise ChainError("two systems were not asked the same questions")
    one = sum(first[key] and not second[key] for key in first)
    other = sum(second[key] and not first[key] for key in first)
    tail = sum(math.comb(one + other, k) for k in range(min(one, other) + 1))
    return {"first": one, "second": other, "p": min(1.0, 2 * tail / 2 ** (one + other))}


def compare(first: Sequence[Answers], second: Sequence[Answers]) -> dict[str, Any]:
    """Tests of two systems by kind: one of each seed, and the largest p."""
    found = {}
    for kind in first[0]:
        seeds = [mcnemar(hits(a[kind]), hits(b[kind])) for a, b in zip(first, second, strict=True)]
        found[kind] = {"seeds": seeds, "p": max(one["p"] for one in seeds)}
    return found


def caption_hits(path: Path) -> dict[str, dict[str, bool]]:
    """Choices among the captions that differ in one thing alone, from a file of ``eval retrieval --scores``.

    Of an event: its caption against its counterpart's. "item" and "colour": among all of them. Ties are wrong.
    Returns {kind: {key of a clip: right}}; where few captions are there, the choice is among those.
    """
    scores, labels, clips = _read_scores(path)
    same, other = labels[:, None] == labels, labels[:, None] != labels
    rivals = {
        "event": same[..., :2].all(-1) & (labels[:, None, 2] == labels[:, 2] ^ 1),
        "item": same[..., 1:].all(-1) & other[..., 0],
        "colour": same[..., ::2].all(-1) & other[..., 1],
    }
    right = {name: ~(nearer & (scores >= scores.diagonal())).any(0) for name, nearer in rivals.items()}
    found: dict[str, dict[str, bool]] = {}
    for column, clip in enumerate(clips):
        for name, hit in right.items():
            kind = EVENTS[labels[column, 2]].kind if name == "event" else name
            found.setdefault(kind, {})[clip] = bool(hit[column])
    return found


def recall(path: Path) -> dict[str, dict[str, float]]:
    """R@1 and R@5 both ways: of captions of single events among one another, and of all captions."""
    scores, labels, _ = _read_scores(path)
    single = torch.isin(labels[:, 2], torch.tensor(SINGLE))
    found = {}
    for name, chosen in (("single events", single), ("all events", torch.ones_like(single))):
        matrix = scores[chosen][:, chosen]
        for way, one in (("text to video", matrix), ("video to text", matrix.T)):
            result = retrieval(one, torch.eye(len(one), dtype=torch.bool)).tie_corrected
            assert result is not None
            found[f"{name}, {way}"] = {"r1": round(result.r1, 4), "r5": round(result.r5, 4)}
    return found


def _read_scores(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Scores [Q, Q] with each caption's clip in its own column; the captions' labels [Q, 3]; the clips' keys."""
    with safe_open(path, "pt") as file:
        scores, right, texts = file.get_tensor("scores"), file.get_tensor("clip_of_caption"), file.metadata()
    clips = json.loads(texts["clips"])
    labels = [parse("caption", caption) for caption in json.loads(texts["captions"])]
    if len(clips) != len(labels) or None in labels:
        raise ChainError(f"{path}: expected one clip for each of {len(labels)} captions of the small world")
    return scores[:, right], torch.tensor(labels), [clips[number] for number in right.tolist()]


def score_captions(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Choices among captions and retrieval of the mean of the frames, of each seed's branch, and of one for speed."""
    places = ["mean", *(f"seed{seed}/retrieval" for seed in seeds), "speed/retrieval"]
    files = [work / place / "scores.safetensors" for place in places]
    *found, speed = [caption_hits(file) if file.exists() else {} for file in files]
    shares = [{kind: _share(one.values()) for kind, one in chosen.items()} for chosen in (*found, speed)]
    captions = {"mean": shares[0], "branch": shares[1:-1], "n": {kind: len(one) for kind, one in found[0].items()}}
    captions["p"] = {kind: max(mcnemar(one[kind], plain)["p"] for one in found[1:]) for kind, plain in found[0].items()}
    if speed:
        captions["mostly speed"] = shares[-1]
        captions["mostly speed, p"] = {kind: mcnemar(speed[kind], plain)["p"] for kind, plain in found[0].items()}
    mean, *branch = map(recall, files[:-1])
    return {"captions": captions, "retrieval": {"mean": mean, "branch": branch}}


def score(work: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """All figures of a chain: see :data:`RESULT`."""
    own = [work / f"seed{seed}" for seed in seeds]
    answers = {name: [read_answers(folder / name) for folder in own] for name in SYSTEMS}
    tests = {f"{a} against {b}": compare(answers[a], answers[b]) for a, b in COMPARED}
    ablations = {}
    for name, (place, headline_system) in OTHERWISE.items():
        if (work / place / "scores.json").exists():
            found = read_answers(work / place)
            ablations[name] = figures(found)
            tests[f"{name} against {headline_system}"] = compare([found], answers[headline_system][:1])
    times = read_lines(work / "times.jsonl")
    stages = {t["stage"]: {"command": t["command"], "seconds": 0.0} for t in times}
    for t in times:
        stages[t["stage"]]["seconds"] = round(stages[t["stage"]]["seconds"] + t["seconds"], 1)
    parameters = sum(value.numel() for value in load_file(work / "clip" / "model.safetensors").values())
    result = {
        "seeds": list(seeds), "made": versions(), "fed": check_stills_only(own[0] / "image" / "tuned"),
        "clip": read_json(work / "clip" / "about.json") | {"parameters": parameters},
        "answers": {name: [*map(figures, told)] for name, told in answers.items()},
        "tests": tests, "ablations": ablations, **score_captions(work, seeds),
        "probes": [read_json(folder / "probes" / "probes.json") for folder in own], "stages": stages,
        "core_minutes": round(sum(t.get("cpu_seconds") or 0 for t in times) / 60, 1),
    }  # fmt: skip
    return {"headline": headline(result), **result}


def headline(result: Mapping[str, Any]) -> dict[str, list]:
    """The table that the demo and README show, in plain text: {"columns", "rows", "notes"}."""
    rows = [
        [label, *(_cell(result["answers"][name], *shown) for shown in HEADLINE.values())]
        for name, label in SYSTEMS.items()
    ]
    seen = result["answers"]["untuned"][0]
    counts = ", ".join(f"{kind} {seen[kind]['n']}" for kind, figure in HEADLINE.values() if figure == "right")
    p = [small(result["tests"][f"{a} against {b}"]["motion"]["p"]) for a, b in COMPARED[:2]]
    seeds = ", ".join(map(str, result["seeds"]))
    notes = [
        f"Share of generated answers that are right, mean ± standard deviation over the seeds {seeds}; "
        f"questions a seed: {counts}. Items held out; clips in pairs of the same frames in another order.",
        "Within the pair: of the answers that name the event or its counterpart; the mean of the frames has 0.5.",
        f"Exact two-sided McNemar tests of the motion answers, the largest p of the seeds: branch attached against the "
        f"mean of the frames {p[0]}, tuned against its control {p[1]}.",
    ]
    return {"columns": ["", *HEADLINE], "rows": rows, "notes": notes}


def _cell(seeds: Sequence[Mapping[str, Any]], kind: str, figure: str) -> str:
    values = [seed[kind][figure] for seed in seeds if seed.get(kind, {}).get(figure) is not None]
    return spread(values, 2) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of the chain")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = score(options.work.resolve(), options.seeds)
    write_json(options.out, result)
    for row in (result["headline"]["columns"], *result["headline"]["rows"]):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
