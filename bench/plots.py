"""The plots in docs/, from ``bench/results/``: ``python bench/plots.py``."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from summaries import RESULTS, load  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {
    "eager": ("reference's structure", "tab:gray", "o-"),
    "checkpoint": ("with checkpointing", "tab:gray", "s--"),
    "none": ('ours, recompute="none"', "tab:blue", "o-"),
    "mlp": ('"mlp"', "tab:green", "^-"),
    "layer": ('"layer"', "tab:orange", "s-"),
}


def sweep(device: str) -> Path:
    """Bytes kept and seconds of the branch's forward and backward, against the mask's ratio and against frames."""
    rows = json.loads((ROOT / "bench" / "results" / f"step-sweep-{device}.json").read_text(encoding="utf-8"))
    rows = [row for row in rows if not row["error"]]
    axes_of = {"ratio": lambda row: row["frames"] == 8, "frames": lambda row: row["ratio"] == 0.7}
    values = {"saved": ("kept for backward, MB", 1e6), "seconds": ("forward + backward, s", 1.0)}
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharex="col", layout="constrained")
    for column, (axis, chosen) in enumerate(axes_of.items()):
        for line, (value, (label, unit)) in enumerate(values.items()):
            plot = axes[line][column]
            for name, (title, colour, style) in SHOWN.items():
                points = sorted((r[axis], r[value] / unit) for r in rows if r["contender"] == name and chosen(r))
                if not points:
                    continue
                plot.plot(*zip(*points, strict=True), style, color=colour, label=title, markersize=4)
            plot.set_ylim(bottom=0)
            plot.grid(alpha=0.3)
            plot.set_ylabel(label)
        axes[1][column].set_xlabel({"ratio": "masked share of tubes, 8 frames", "frames": "frames, 0.7 masked"}[axis])
    axes[0][0].legend(fontsize=8)
    facts = rows[0]["facts"]
    figure.suptitle(
        f"The branch alone: ViT-L/14, depth 4, {rows[0]['batch']} clip(s), {rows[0]['dtype']}, {facts['device']}, "
        f"torch {facts['torch']}",
        fontsize=10,
    )
    out = ROOT / "docs" / f"step-{device}.png"
    out.parent.mkdir(exist_ok=True)
    figure.savefig(out, dpi=120)
    return out


def small_world() -> Path:
    """Answers to questions about motion, and where motion can be read."""
    found = load("miniature.json")
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
    rows = {place: number for number, place in enumerate(found["probes"][0]["clips"])}
    for shift, fitted in ((-0.2, "clips"), (0.2, "stills")):  # not every place is there in stills
        means = {
            place: statistics.mean(seed[fitted][place]["motion"]["right"] for seed in found["probes"])
            for place in found["probes"][0][fitted]
        }
        heights = [rows[place] + shift for place in means]
        axes[1].barh(heights, [*means.values()], 0.4, label=f"probes fitted on {fitted}")
    axes[1].set_yticks([*rows.values()], [*rows])
    axes[1].invert_yaxis()
    axes[1].set_xlabel("motion read in held-out clips, of 6")
    axes[1].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    out = ROOT / "docs" / "miniature.png"
    figure.savefig(out, dpi=110)
    return out


if __name__ == "__main__":
    drawn = [sweep(device) for device in sys.argv[1:] or ["cpu"]]
    for path in (*drawn, *([small_world()] if (RESULTS / "miniature.json").exists() else [])):
        print(f"wrote {path.relative_to(ROOT)}")
