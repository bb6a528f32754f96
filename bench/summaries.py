"""The short tables of README and docs, from ``bench/results/``; ``report.py`` puts them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
ON_BFLOAT16 = (
    "Rows in bfloat16 rest on a CPU with instructions for it (`avx512_bf16` or `amx_bf16` among the flags of `lscpu`); "
    "without them bfloat16 is slower than float32."
)


def load(name: str) -> Any:
    """What a benchmark left."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def highlights() -> str:
    """Training step and chat encoding in a few lines, from ``bench/step.py``."""
    rows = {(r["part"], r["frames"], r["ratio"], r["batch"], r["contender"]): r for r in load("step-cpu.json")}

    def pair(case: tuple, ours: str, what: str) -> tuple[float, float]:
        return rows[*case, "eager"][what], rows[*case, ours][what]

    masked, whole = ("branch", 8, 0.7, 1), ("branch", 16, 0.0, 1)
    step, four, chat = ("step", 8, 0.7, 1), ("step", 8, 0.7, 4), ("chat", 100, 0.0, 1)
    kept = "kept for backward, MB"
    wanted = [
        (f"branch, T = 8, tubes 0.7: {kept}", masked, "none", "saved", 1e6, ".0f"),
        (f'the same with `recompute="layer"`: {kept}', masked, "layer", "saved", 1e6, ".0f"),
        (f"branch, T = 16, all tokens: {kept}", whole, "none", "saved", 1e6, ".0f"),
        ("the same: seconds", whole, "none", "seconds", 1, ".2f"),
        ("whole step of one clip: seconds", step, "none", "seconds", 1, ".2f"),
        ("the same, frozen tower in bfloat16: seconds", step, "half", "seconds", 1, ".2f"),
        ('whole step of 4 clips, `"layer"`: peak above the weights, MB', four, "layer", "peak", 1e6, ".0f"),
        ("100 frames encoded for chat: peak above the weights, MB", chat, "none", "peak", 1e6, ".0f"),
    ]
    lines = ["| | the published structure | ours | ratio |", "| --- | --- | --- | --- |"]
    for label, case, ours, what, unit, form in wanted:
        theirs, mine = pair(case, ours, what)
        lines.append(f"| {label} | {theirs / unit:{form}} | {mine / unit:{form}} | {mine / theirs:.2f} |")
    facts = rows[*masked, "none"]["facts"]
    lines += [
        "",
        f"ViT-L/14, depth 4, float32, forward and backward, {facts['threads']} threads of an {facts['device']}, torch "
        f"{facts['torch']}; printed by `python bench/step.py`. {ON_BFLOAT16}",
    ]
    return "\n".join(lines)


def long_videos() -> str:
    """More frames than in training, from ``bench/long_videos.py``: clips that are right, and p against 8 frames."""
    result = load("long-videos-cpu.json")
    found = {
        tuple(row[key] for key in ("rows_std", "task", "long", "windows", "frames")): row for row in result["rows"]
    }
    frames = list(dict.fromkeys(row["frames"] for row in result["rows"]))
    lines = [f"| untrained rows | | long videos | {' | '.join(f'{count} frames' for count in frames)} |"]
    lines.append("| --- " * (3 + len(frames)) + "|")
    for std, task, long, windows in dict.fromkeys(key[:4] for key in found):
        cells = []
        for count in frames:
            row = found.get(
                (std, task, "average" if count == frames[0] else long, 1 if count == frames[0] else windows, count)
            )
            cells.append(
                ""
                if row is None
                else f"{row['right']} of {row['n']}" + (f" (p = {row['p']:.0e})" if row["p"] < 0.05 else "")
            )
        name = long + (f", {windows} windows" if windows > 1 else "")
        lines.append(f"| {std} | {task} | {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"p of the paired sign test against 8 frames where it is below 0.05; printed by `{result['command']}` "
        f"({result['seconds']} s on {result['threads']} CPU thread of an {result['device']}, torch {result['torch']}).",
    ]
    return "\n".join(lines)


def decode() -> str:
    """Decoding on one core, from ``bench/decode.py``."""
    rows = load("decode-cpu.json")
    readers = list(dict.fromkeys(row["reader"] for row in rows))
    found = {(row["clip"], row["reader"]): row for row in rows}
    lines = ["| 8 frames of a clip, clips per second and core | " + " | ".join(readers) + " |"]
    lines.append("| --- " * (len(readers) + 1) + "|")
    for clip in dict.fromkeys(row["clip"] for row in rows):
        own = [f"{found[clip, r]['clips_per_s']:.1f}" if (clip, r) in found else "" for r in readers]
        lines.append(f"| {clip} | {' | '.join(own)} |")
    lines += ["", f"CPU time on one core of an {rows[0]['facts']['device']}; printed by `python bench/decode.py`."]
    return "\n".join(lines)


def pretrain() -> str:
    """Throughput and waiting for data, from ``bench/pretrain.py``."""
    rows = load("pretrain-cpu.json")
    lines = [
        "| clips | processes | workers of each | clips per second | waiting for data | over one process |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        times = "" if row["times_one"] is None else f"{row['times_one']:.2f}×"
        lines.append(
            f"| {row['data']} | {row['processes']} | {row['workers']} | {row['clips_per_s']:.1f} | "
            f"{100 * row['data_wait']:.1f} % | {times} |"
        )
    facts = rows[0]["facts"]
    lines += [
        "",
        f"The small stack, {rows[0]['batch']} clips a process and step, one thread a process, on two cores of an "
        f"{facts['device']}, torch {facts['torch']}; printed by `python bench/pretrain.py`.",
    ]
    return "\n".join(lines)
