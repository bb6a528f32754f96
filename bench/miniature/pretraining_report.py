"""What ``miniature/pretraining.py`` found, as tables for ``bench/report.py`` and a plot for ``bench/plots.py``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from miniature.tables import small, spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "miniature-pretraining.json"
PLOT = ROOT / "docs" / "miniature-pretraining.png"
KINDS = {
    "direction": "direction, 1 of 2",
    "appearing": "appearing or vanishing, 1 of 2",
    "order": "order of two events, 1 of 2",
    "speed": "slow or quick, 1 of 2",
    "temporal": "these four together",
    "event": "event, 1 of 16",
    "object": "object, 1 of 8",
    "object alone": "object, captions without an event",
    "colour": "colour, 1 of 6",
    "text to video R@1": "text to video R@1",
    "video to text R@1": "video to text R@1",
}
SHORT = ("direction", "appearing", "order", "speed", "event", "object", "colour", "video to text R@1")
SHOWN = ("temporal", "direction", "appearing", "order", "speed", "event", "object", "colour")


def load(part: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of a part by system, seeds ascending; the base, which the others are compared with, first."""
    rows = sorted(json.loads(RESULTS.read_text(encoding="utf-8")), key=lambda row: row["seed"])
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["part"] == part:
            found.setdefault(row["system"], []).append(row)
    return found


def t_test(differences: Sequence[float]) -> float | None:
    """Two-sided p of Student's t that the mean is 0; None with fewer than two values or no spread."""
    if len(differences) < 2 or statistics.stdev(differences) == 0:
        return None
    freedom = len(differences) - 1
    t = statistics.mean(differences) / statistics.stdev(differences) * math.sqrt(len(differences))
    angle = math.atan(abs(t) / math.sqrt(freedom))
    # the closed forms for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    inside = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + inside) if odd else inside)


def _against_frames(names: Sequence[str]) -> list[str]:
    (rows,) = load("long").values()
    lines = [
        f"| | CLIP, mean of the frames | CLIP and branch, {len(rows)} seeds | p over seeds | p of each seed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in names:
        ours, plain = [row["figures"][name] for row in rows], [row["frame_mean"][name] for row in rows]
        p = t_test([a - b for a, b in zip(ours, plain, strict=True)])
        each = ", ".join(small(row["p"][name]) for row in rows) if name in rows[0]["p"] else ""
        lines.append(f"| {KINDS[name]} | {statistics.mean(plain):.3f} | {spread(ours)} | {small(p)} | {each} |")
    return lines


def _how(rows: list[dict[str, Any]], what: str) -> str:
    facts, count = rows[0]["facts"], len(rows)
    return (
        f"{what}: {count} seeds, {rows[0]['steps']} steps of {rows[0]['batch']} clips, float32, {facts['threads']} "
        f"thread of an {facts['device']}, torch {facts['torch']}; printed by `{rows[0]['command']}`."
    )


TESTS = (
    "± is the standard deviation over seeds. p over seeds: Student's t, two-sided, on the difference of each seed; "
    "p of each seed: exact two-sided McNemar tests on its clips."
)


def brief() -> str:
    """What changes and what does not, for the README."""
    (rows,) = load("long").values()
    chosen = ("temporal", "direction", "order", "object")
    labels = {**KINDS, "temporal": "all captions that the order of frames alone tells, 1 of 2"}
    lines = [
        "| held-out clips, in pairs of the same frames | mean of frames | with the branch |",
        "| --- " * 3 + "|",
    ]
    for name in chosen:
        ours, plain = ([row[side][name] for row in rows] for side in ("figures", "frame_mean"))
        lines.append(f"| {labels[name]} | {statistics.mean(plain):.3f} | {spread(ours)} |")
    return "\n".join([*lines, "", f"{len(rows)} seeds; printed by `{rows[0]['command']}`."])


def short() -> str:
    """The system against the frame mean."""
    (rows,) = load("long").values()
    return "\n".join([*_against_frames(SHORT), "", f"{_how(rows, 'Zero-shot on held-out clips')} {TESTS}"])


def full() -> str:
    """The same with every figure, and by seed."""
    (rows,) = load("long").values()
    lines = [*_against_frames(list(KINDS)), "", f"{_how(rows, 'Zero-shot on held-out clips')} {TESTS}", ""]
    lines += [f"| seed | {' | '.join(SHOWN)} | training, s |", "| --- " * (len(SHOWN) + 2) + "|"]
    for row in rows:
        cells = " | ".join(f"{row['figures'][name]:.3f}" for name in SHOWN)
        lines.append(f"| {row['seed']} | {cells} | {row['seconds']:.0f} |")
    return "\n".join(lines)


def ablation() -> str:
    """Every configuration against the base."""
    systems = load("ablation")
    base = next(iter(systems.values()))
    own = {row["seed"]: row["figures"] for row in base}
    columns = ["", *SHOWN, "temporal, less the base's", "p over seeds", "seeds"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    plain = " | ".join(f"{base[0]['frame_mean'][name]:.3f}" for name in SHOWN)
    lines.append(f"| CLIP, mean of the frames | {plain} | | | |")
    for name, rows in systems.items():
        cells = " | ".join(spread([row["figures"][kind] for row in rows]) for kind in SHOWN)
        less = [row["figures"]["temporal"] - own[row["seed"]]["temporal"] for row in rows if row["seed"] in own]
        compared = " | " if rows is base else f"{spread(less)} | {small(t_test(less))}"
        lines.append(f"| {name} | {cells} | {compared} | {len(rows)} |")
    lines += ["", f"{_how(base, 'As many steps, the same clips in the same order for a seed')} {TESTS.split(':')[0]}."]
    return "\n".join(lines).replace(". p over seeds.", ".")


def cost() -> str:
    """Seconds and bytes of a whole step against the ratio."""
    rows = [row for (row,) in load("cost").values()]
    whole = rows[0]
    lines = ["| masked | s a step | of the unmasked | kept for backward, MB | of the unmasked |", "| --- " * 5 + "|"]
    for row in rows:
        seconds, kept = row["cpu_seconds"], row["saved_bytes"]
        lines.append(
            f"| {row['settings']['ratio']} | {seconds:.3f} | {seconds / whole['cpu_seconds']:.2f} | {kept / 1e6:.1f} | "
            f"{kept / whole['saved_bytes']:.2f} |"
        )
    facts = whole["facts"]
    lines += [
        "",
        f"Whole steps of {whole['batch']} clips of 8 frames, the tower running, depth {whole['settings']['depth']}, "
        f"{facts['threads']} thread of an {facts['device']}, torch {facts['torch']}; medians of alternating rounds, "
        f"seconds of the process since the machine was shared; printed by `{whole['command']}`.",
    ]
    return "\n".join(lines)


def plot() -> Path:
    """Bars of the ablation with their spread, and the cost of a step against the ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    systems = load("ablation")
    figure, (bars, ratio) = plt.subplots(1, 2, figsize=(13, 5.5), width_ratios=[2.4, 1], layout="constrained")
    shown = {"direction": "tab:blue", "order": "tab:cyan", "object": "tab:orange"}
    for offset, (kind, colour) in enumerate(shown.items()):
        for line, rows in enumerate(systems.values()):
            values = [row["figures"][kind] for row in rows]
            error = statistics.stdev(values) if len(values) > 1 else 0.0
            place = line + (offset - 1) * 0.27
            bars.barh(place, statistics.mean(values), 0.25, xerr=error, color=colour, label="" if line else kind)
        bars.axvline(next(iter(systems.values()))[0]["frame_mean"][kind], color=colour, linestyle=":", linewidth=1)
    bars.set_yticks(range(len(systems)), list(systems))
    bars.invert_yaxis()
    bars.set_xlim(0.4, 1.02)
    bars.set_xlabel("share of right choices, mean and standard deviation over seeds; dotted: mean of the frames")
    bars.legend(fontsize=8, loc="upper right")
    costs = [row for (row,) in load("cost").values()]
    at = [row["settings"]["ratio"] for row in costs]
    ratio.plot(at, [row["cpu_seconds"] for row in costs], "o-", color="tab:blue", label="s a step")
    ratio.set_ylim(bottom=0)
    ratio.set_ylabel("seconds of a step of 16 clips")
    ratio.set_xlabel("masked share of tubes")
    kept = ratio.twinx()
    kept.plot(at, [row["saved_bytes"] / 1e6 for row in costs], "s--", color="tab:green")
    kept.set_ylim(bottom=0)
    kept.set_ylabel("kept for backward, MB (dashed)")
    ratio.grid(alpha=0.3)
    figure.savefig(PLOT, dpi=120)
    return PLOT
