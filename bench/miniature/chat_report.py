"""What `bench/miniature/chat.py` found, as tables for ``bench/report.py`` and a plot for ``bench/plots.py``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from miniature.tables import small, spread

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "miniature-chat.json"
PLOT = ROOT / "docs" / "miniature-chat.png"
LABELS = {
    "image model, frame mean": "image model, mean of the frames",
    "branch, untuned": "branch attached, no question about motion",
    "shipped": "shipped: projector, LoRA and branch tuned on video questions, 260 steps",
    "shipped, branch off": "the same with the branch off: the shipped control",
    "stills": "branch attached; projector and LoRA tuned on stills that show motion, no video",
    "stills, branch off": "the same, branch off",
    "projector": "branch; projector tuned on video questions",
    "projector, branch off": "the same, branch off (control of the next row too)",
    "projector and branch": "projector and branch tuned on video questions",
    "projector and adapters": "branch; projector and LoRA tuned on video questions",
    "projector and adapters, branch off": "the same, branch off",
    "warm start alone": "branch; projector warm-started on labels, no question",
    "projector, no warm start": "branch; projector tuned without the warm start",
}
TEMPORAL = ("motion", "order", "speed")
TYPES = (*TEMPORAL, "object", "colour")
OFF = ", branch off"


def load(path: Path = RESULTS) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))


def compared(test: dict[str, Any]) -> str:
    """How often one alone was right, how often the other, and p."""
    return f"{test['only_first']} : {test['only_second']}, p = {small(test['p'])}"


def of_settings(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of answers by setting, in the order of LABELS."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LABELS}
    for row in rows:
        if row["part"] == "answers":
            found[row["setting"]].append(row)
    return {name: own for name, own in found.items() if own}


def answers(rows: list[dict[str, Any]], way: str) -> list[str]:
    """The table of shares right, mean and spread over seeds. way: "generated" or "likelihood"."""
    told = of_settings(rows)
    first = next(iter(told.values()))[0]["figures"]
    head = " | ".join(f"{kind} ({first[kind]['n']} a seed, of {first[kind]['answers']})" for kind in TYPES)
    lines = [f"| | seeds | {head} |", "| --- " * (len(TYPES) + 2) + "|"]
    for name, own in told.items():
        cells = " | ".join(spread([row["figures"][kind][way] for row in own], 2) for kind in TYPES)
        lines.append(f"| {LABELS[name]} | {len(own)} | {cells} |")
    return lines


def paired(rows: list[dict[str, Any]], way: str) -> list[str]:
    """Each setting against its control: right in one alone, and p."""
    shown = ("temporal", *TYPES)
    lines = [f"| | {' | '.join(shown)} |", "| --- " * (len(shown) + 1) + "|"]
    for row in rows:
        if row["part"] == "test":
            told = " | ".join(compared(row["figures"][kind][way]) for kind in shown)
            lines.append(f"| {row['setting']} | {told} |")
    return lines


def probed(rows: list[dict[str, Any]]) -> list[str]:
    """The probes' accuracies, mean and spread over seeds."""
    own = [row["figures"] for row in rows if row["part"] == "probe"]
    kinds = list(next(iter(own[0].values())))
    lines = [f"| read from | {' | '.join(kinds)} |", "| --- " * (len(kinds) + 1) + "|"]
    for place in own[0]:
        cells = (
            spread([figures[place][kind] for figures in own], 2) if kind in own[0][place] else "" for kind in kinds
        )
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return lines


def losses(rows: list[dict[str, Any]]) -> list[str]:
    """The temporal answers' training loss, first, middle and last tenth of the steps, mean over seeds."""
    lines = ["| | first tenth | halfway | last tenth | CPU seconds |", "| --- | --- | --- | --- | --- |"]
    for name, own in of_settings(rows).items():
        if own[0]["losses"]:
            at = [[row["losses"][i] for row in own] for i in (0, len(own[0]["losses"]) // 2, -1)]
            cells = [f"{statistics.mean(values):.2f}" for values in at]
            seconds = statistics.mean(row["tuning_cpu_seconds"] for row in own)
            lines.append(f"| {LABELS[name]} | {' | '.join(cells)} | {seconds:.0f} |")
    return lines


def conditions(rows: list[dict[str, Any]]) -> str:
    """What every table was made under."""
    told = [row for row in rows if row["part"] == "answers"]
    asked, about = max((row["options"] for row in told), key=len), told[-1]["facts"]
    seeds = ", ".join(map(str, sorted({row["seed"] for row in told})))
    minutes = sum(row["cpu_seconds"] for row in rows) / 60
    return (
        f"Seeds {seeds} (of tuning and held-out clips). Tunings made here: "
        f"{asked['steps']} steps of {asked['batch']} clips after the warm start. Branch: `{asked['branch']}`. One "
        f"thread of an {about['device']}, {minutes:.0f} CPU minutes in all, torch {about['torch']}; printed by "
        "`python bench/miniature/chat.py`, for some rows with `--seeds` and `--settings`."
    )


def brief(rows: list[dict[str, Any]]) -> list[str]:
    """For the README: what tuning on video questions gives, against its control, of the types that one can tell."""
    told, kinds = of_settings(rows), ("motion", "object")
    head = " | ".join(f"{kind}, branch {state}" for kind in kinds for state in ("off", "on"))
    lines = [f"| answers right | seeds | {head} | motion, p |", "| --- " * (2 * len(kinds) + 3) + "|"]
    for row in rows:
        if row["part"] != "test" or not row["setting"].endswith(OFF):
            continue
        name, control = row["setting"].split(" against ")
        pair = (told[control], told[name])
        cells = [spread([one["figures"][kind]["generated"] for one in side], 2) for kind in kinds for side in pair]
        cells.append(small(row["figures"]["motion"]["generated"]["p"]))
        lines.append(f"| {LABELS[name]} | {len(told[name])} | {' | '.join(cells)} |")
    return [*lines, "", "Generated answers; printed by `python bench/miniature/chat.py`."]


def short(rows: list[dict[str, Any]]) -> list[str]:
    """The main table, and each setting against its control."""
    head = "Right in the first alone : in its control alone (exact two-sided McNemar tests over all seeds' questions):"
    lines = [*answers(rows, "generated"), "", head, ""]
    lines += ["| | motion, order and speed together | object |", "| --- | --- | --- |"]
    for row in rows:
        if row["part"] == "test":
            told = " | ".join(compared(row["figures"][kind]["generated"]) for kind in ("temporal", "object"))
            lines.append(f"| {row['setting']} | {told} |")
    return [*lines, "", f"Generated answers, mean ± standard deviation over seeds. {conditions(rows)}"]


def table(make: Callable[[list[dict[str, Any]]], list[str]]) -> Callable[[], str]:
    """A table of the stored rows."""
    return lambda: "\n".join(make(load()))


TABLES: dict[str, Callable[[], str]] = {
    "miniature-chat-short": table(brief),
    "miniature-chat": table(short),
    "miniature-chat-probes": table(probed),
    "miniature-chat-likelihood": table(partial(answers, way="likelihood")),
    "miniature-chat-tests": table(partial(paired, way="generated")),
    "miniature-chat-tests-likelihood": table(partial(paired, way="likelihood")),
    "miniature-chat-losses": table(losses),
}


def plot(rows: list[dict[str, Any]], out: Path = PLOT) -> Path:
    """Left: what probes read of the events on the way. Right: generated answers, branch on and off."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", width_ratios=(1, 1.5))
    own = [row["figures"] for row in rows if row["part"] == "probe"]
    colours = dict(zip(TYPES, ("tab:blue", "tab:orange", "tab:green", "tab:gray", "tab:brown"), strict=True))
    places = list(own[0])
    for kind in TEMPORAL:
        name = f"{kind}, of the pair"
        at = [i for i, place in enumerate(places) if name in own[0][place]]
        means = [statistics.mean(figures[places[i]][name] for figures in own) for i in at]
        left.plot(means, at, "o", color=colours[kind], label=kind)
    left.set_yticks(range(len(places)), places, fontsize=8)
    left.invert_yaxis()
    left.axvline(0.5, color="black", linestyle=":", linewidth=1)
    left.set_title("linear probes: an event or its counterpart (chance 0.5)", fontsize=9)
    left.legend(fontsize=8)
    told = of_settings(rows)
    width = 0.8 / len(TYPES)
    for i, kind in enumerate(TYPES):
        values = [[row["figures"][kind]["generated"] for row in seeds] for seeds in told.values()]
        along = [j + (i - len(TYPES) / 2 + 0.5) * width for j in range(len(told))]
        right.bar(along, [statistics.mean(v) for v in values], width, color=colours[kind], label=kind)
        for x, seeds in zip(along, values, strict=True):
            right.plot([x] * len(seeds), seeds, "k.", markersize=3)
    right.set_xticks(
        range(len(told)), [name.replace(", ", ",\n").replace(" and ", "\nand ") for name in told], fontsize=7
    )
    right.set_ylim(0, 1.15)
    right.set_title("generated answers that are right; dots: seeds", fontsize=9)
    right.legend(fontsize=8, ncols=5, loc="upper left")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    return out
