"""The small world's tables in README and docs, from ``bench/results/miniature.json``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parents[1] / "results" / "miniature.json"
NAMES = {
    "untuned": "branch attached, untuned", "untuned-off": "branch off, untuned", "tuned-answers": "tuned",
    "control-answers": "its control",
    "no-mbta": "branch without MBTA", "no-mbca": "branch without MBCA", "reference-order": "the published mask order",
    "one-exposure": "image stage on one kind of exposure", "plain-stills": "image stage on plain stills",
}  # fmt: skip


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def small(p: float) -> str:
    """A p-value."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def load() -> dict[str, Any]:
    """What ``scores.py`` left."""
    return json.loads(RESULT.read_text(encoding="utf-8"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def headline() -> str:
    """Questions about held-out clips and stills."""
    found = load()["headline"]
    return "\n\n".join([table(found["columns"], found["rows"]), *found["notes"]])


def events() -> str:
    """Each kind of event: right, within the pair, both of a pair."""
    found, rows = load(), []
    for name, label, *_ in (
        (key, row[0]) for key, row in zip(found["answers"], found["headline"]["rows"], strict=True)
    ):
        for kind in ("motion", "size", "order", "speed"):
            seeds = [seed[kind] for seed in found["answers"][name] if kind in seed]
            if not seeds or name == "stills":
                continue
            shares = [[seed[key] for seed in seeds if seed[key] is not None] for key in ("right", "pair", "both")]
            cells = [spread(values, 2) if values else "" for values in shares]
            rows.append([label, f"{kind} ({seeds[0]['n']})", *cells])
    tests = [
        [
            " against ".join(NAMES[name] for name in pair.split(" against ")),
            *(
                small(kinds[kind]["p"]) if kind in kinds else ""
                for kind in ("motion", "order", "speed", "item", "colour")
            ),
        ]
        for pair, kinds in found["tests"].items()
    ]
    first = table(["", "questions (a seed)", "right", "within the pair", "both of a pair"], rows)
    return first + "\n\n" + table(["largest p of the seeds", "motion", "order", "speed", "item", "colour"], tests)


def ablation() -> str:
    """The headline with one stage made in another way, one seed."""
    found = load()
    kinds = ("motion", "size", "order", "speed", "item", "colour")

    def row(label: str, shares: Mapping[str, Any], p: str) -> list[str]:
        pair = "" if shares["motion"]["pair"] is None else f"{shares['motion']['pair']:.2f}"
        return [label, *(f"{shares[kind]['right']:.2f}" for kind in kinds), pair, p]

    rows = [row("as in the headline", found["answers"]["untuned"][0], "")]
    for name, shares in found["ablations"].items():
        rows.append(row(NAMES[name], shares, small(found["tests"][f"{name} against untuned"]["motion"]["p"])))
    return table(["untuned, branch attached", *kinds, "motion, within the pair", "p, motion"], rows)


def captions() -> str:
    """Pairs of captions and retrieval, branch against mean."""
    found = load()
    one, both = found["captions"], found["retrieval"]
    rows = [
        [
            f"{kind} ({one['n'][kind]})",
            f"{share:.3f}",
            spread([seed[kind] for seed in one["branch"]]),
            small(one["p"][kind]),
        ]
        for kind, share in one["mean"].items()
    ]
    for way, mean in both["mean"].items():
        rows.append([f"{way} R@1", f"{mean['r1']:.3f}", spread([seed[way]["r1"] for seed in both["branch"]]), ""])
    return table(["", "CLIP, mean of the frames", "CLIP and branch", "p"], rows)


def probes() -> str:
    """What can be read at each place."""
    seeds, rows = load()["probes"], []
    names = {"clips": "clips", "stills": "stills", "held-out stills": "stills, read in stills"}
    for fitted, label in names.items():
        for place, kinds in seeds[0][fitted].items():
            cells = []
            for kind in ("motion", "size", "order", "speed", "item"):
                found = [seed[fitted][place].get(kind) for seed in seeds]
                shown = [
                    spread([one[key] for one in found], 2)
                    for key in ("right", "pair")
                    if kind in kinds and key in kinds[kind]
                ]
                cells.append("; ".join(shown))
            rows.append([label, place, *cells])
    return table(["fitted on", "read from", "motion; of the pair", "size", "order", "speed", "item"], rows)


def cost() -> str:
    """Time of each stage."""
    found = load()
    kinds: dict[str, list[float]] = {}
    for name, stage in found["stages"].items():
        if stage["seconds"]:
            kinds.setdefault(name.split("/")[-1] if name[:4] == "seed" else name.split("/")[0], []).append(
                stage["seconds"]
            )
    rows = [[name, str(len(times)), f"{sum(times) / 60:.1f}"] for name, times in kinds.items()]
    made = found["made"]
    note = f"{found['core_minutes']:.0f} minutes of one core in all, torch {made['torch']}; made by "
    note += "`python bench/miniature/chain.py WORK`."
    return table(["stage", "runs", "minutes"], rows) + "\n\n" + note


def shown(table: Callable[[], str]) -> Callable[[], str]:
    """The table, or a sentence while no result is stored."""
    none = "No result is stored yet: `python bench/miniature/chain.py WORK` makes one."
    return lambda: table() if RESULT.exists() else none


TABLES = {
    "miniature": shown(headline), "miniature-events": shown(events), "miniature-ablation": shown(ablation),
    "miniature-captions": shown(captions), "miniature-probes": shown(probes), "miniature-cost": shown(cost),
}  # fmt: skip


def plot() -> Path:
    """Answers to questions about motion, and where motion can be read."""
    import matplotlib.pyplot as plt

    found = load()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    off = {"untuned-off": "branch off", "control-answers": "tuned,\nbranch off"}
    labels = {**off, "untuned": "branch,\nuntuned", "stills": "stills", "tuned-answers": "tuned"}
    for place, name in enumerate(labels):
        values = [seed["motion"]["right"] for seed in found["answers"][name]]
        axes[0].bar(place, statistics.mean(values), color="tab:gray" if name in off else "tab:blue")
        axes[0].plot([place] * len(values), values, "k.")
    axes[0].set_xticks(range(len(labels)), labels.values())
    axes[0].axhline(1 / 6, color="black", linewidth=0.8, linestyle=":")
    axes[0].set_ylabel("motion answers right, of 6")
    places = list(found["probes"][0]["clips"])
    for shift, fitted in ((-0.2, "clips"), (0.2, "stills")):
        means = [
            statistics.mean(seed[fitted][place]["motion"]["right"] for seed in found["probes"]) for place in places
        ]
        axes[1].barh([number + shift for number in range(len(places))], means, 0.4, label=f"probes fitted on {fitted}")
    axes[1].set_yticks(range(len(places)), places)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("motion read in held-out clips, of 6")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    out = RESULT.parents[2] / "docs" / "miniature.png"
    figure.savefig(out, dpi=110)
    return out
