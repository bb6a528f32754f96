"""The short tables of README and docs, from ``bench/results/``; ``report.py`` puts them in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
NAMES = {
    "untuned": "branch attached, untuned", "untuned-off": "branch off, untuned", "tuned-answers": "tuned",
    "control-answers": "its control",
    "no-mbta": "branch without MBTA", "no-mbca": "branch without MBCA", "reference-order": "the published mask order",
    "one-exposure": "image stage on one kind of exposure", "plain-stills": "image stage on plain stills",
    "speed-untuned": "branch pretrained mostly on speeds", "speed-tuned": "the same branch, tuned",
}  # fmt: skip
ON_BFLOAT16 = (
    "Rows in bfloat16 rest on a CPU with instructions for it (`avx512_bf16` or `amx_bf16` among the flags of `lscpu`); "
    "without them bfloat16 is slower than float32."
)


def load(name: str) -> Any:
    """Read the stored results of a benchmark."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± standard deviation over seeds; the value alone where there is one."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def small(p: float) -> str:
    """A p-value."""
    return f"{p:.2f}" if p >= 0.1 else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


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


def budget() -> str:
    """Make the table of a step's work on a GPU, from ``bench/budget.py``."""
    names = {
        "eager": "the published structure", "sdpa": "the same with SDPA", "none": '**ours**, `recompute="none"`',
        "mlp": '**ours**, `"mlp"`', "layer": '**ours**, `"layer"`',
        "none own": '**ours**, `"none"`, `products="bt_kernels"`',
        "mlp own": '**ours**, `"mlp"`, `products="bt_kernels"`',
        "layer own": '**ours**, `"layer"`, `products="bt_kernels"`',
        "8 bits": "**ours**, `tower.optimize(fp8=True)`",
    }  # fmt: skip
    parts = {"inputs": "drawing and normalising", "tower": "tower", "branch": "branch, losses, backward"}
    device = "H200 SXM"
    found = load("budget.json")["steps"]
    rows = [
        (
            names[row["contender"]], parts[row["part"]], f"{row['tflop']:.1f}", f"{row['product_gb']:.0f}",
            f"{row['other_gb']:.0f}", f"{row['launches']}", f"{row['waits']}", f"{row['least_ms'][device]:.0f}",
        )
        for row in found
    ]  # fmt: skip
    columns = ("", "part", "TFLOP", "GB of products", "GB outside products", "launches", "waits", f"least ms, {device}")
    first = found[0]
    return "\n".join([
        table(columns, rows),
        "",
        f"Counted, not measured: ViT-L/14, depth 4, {first['batch']} clips of {first['frames']} frames, tubes "
        f"{first['ratio']}, bfloat16 under CUDA's autocast rule; printed by `python bench/budget.py`, which says how "
        "each column is taken.",
    ])  # fmt: skip


def compiled() -> str:
    """Make the table of the kernels that Triton compiles while lengths change, from ``bench/budget.py``."""
    counts = load("budget.json")["compiled"]
    rows = [(count["sequence"], str(count["kernels"]), str(count["limit"])) for count in counts]
    return "\n".join([
        table(("calls", "kernels compiled", "limit"), rows),
        "",
        "By Triton's own keys, sm_90; counted by `python bench/compiled_forms.py`.",
    ])  # fmt: skip


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


def answers() -> str:
    """Questions about held-out clips and stills."""
    found = load("miniature.json")["headline"]
    return "\n\n".join([table(found["columns"], found["rows"]), *found["notes"]])


def answers_by_event() -> str:
    """Each kind of event: right, within the pair, both of a pair."""
    found, rows = load("miniature.json"), []
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
    found = load("miniature.json")
    kinds = ("motion", "size", "order", "speed", "item", "colour")

    def row(label: str, shares: Mapping[str, Any], *p: str) -> list[str]:
        pair = "" if shares["motion"]["pair"] is None else f"{shares['motion']['pair']:.2f}"
        return [label, *(f"{shares[kind]['right']:.2f}" for kind in kinds), pair, *p]

    rows = [row("as in the headline", found["answers"]["untuned"][0], "", "")]
    tuned = row("as in the headline, tuned", found["answers"]["tuned-answers"][0], "", "")
    for name, shares in found["ablations"].items():
        rows += [tuned] if name == "speed-tuned" else []
        test = next(kinds for pair, kinds in found["tests"].items() if pair.startswith(f"{name} against "))
        rows.append(row(NAMES[name], shares, *(small(test[kind]["p"]) for kind in ("motion", "speed"))))
    return table(["branch attached", *kinds, "motion, within the pair", "p, motion", "p, speed"], rows)


def captions() -> str:
    """Pairs of captions and retrieval, branch against mean."""
    found = load("miniature.json")
    one, both = found["captions"], found["retrieval"]
    speed = one.get("mostly speed", {})  # of a branch whose pairs of clips are mostly of slow and quick motion
    rows = [
        [
            f"{kind} ({one['n'][kind]})",
            f"{share:.3f}",
            spread([seed[kind] for seed in one["branch"]]),
            small(one["p"][kind]),
            *([f"{speed[kind]:.3f}", small(one["mostly speed, p"][kind])] if speed else ["", ""]),
        ]
        for kind, share in one["mean"].items()
    ]
    for way, mean in both["mean"].items():
        shares = [seed[way]["r1"] for seed in both["branch"]]
        rows.append([f"{way} R@1", f"{mean['r1']:.3f}", spread(shares), "", "", ""])
    clip = found["clip"]["held_out"]
    right = {place: clip[f"exposures, {place}"]["event"] for place in ("CLS", "patches")}
    note = (
        "CLIP alone, on stills in which one of eight events shows, among the captions of all items, colours and these "
        f"events: the event is right in {right['CLS']:.2f} by CLS, and in {right['patches']:.2f} by the mean of the "
        "patch tokens of the last layer but one."
    )
    columns = ["", "CLIP, mean of the frames", "CLIP and branch", "p", "branch pretrained mostly on speeds", "p"]
    return f"{table(columns, rows)}\n\n{note}"


def probe_readings() -> str:
    """Make the table of the linear probes, one row per place.

    A still has no branch and is its own mean: of the places it is read at, all but two are the same.
    """
    seeds, rows = load("miniature.json")["probes"], []
    names = {"clips": "clips", "stills": "stills", "held-out stills": "stills, read in stills"}
    of_stills = {"frame mean": "the tower's tokens", "frame mean after the projector": "the same after the projector"}
    for fitted, label in names.items():
        places = of_stills if fitted == "held-out stills" else {place: place for place in seeds[0][fitted]}
        for place, shown_as in places.items():
            kinds, cells = seeds[0][fitted][place], []
            for kind in ("motion", "size", "order", "speed", "item"):
                found = [seed[fitted][place].get(kind) for seed in seeds]
                shown = [
                    spread([one[key] for one in found], 2)
                    for key in ("right", "pair")
                    if kind in kinds and key in kinds[kind]
                ]
                cells.append("; ".join(shown))
            rows.append([label, shown_as, *cells])
    return table(["fitted on", "read from", "motion; of the pair", "size", "order", "speed", "item"], rows)


def stage_times() -> str:
    """Time of each stage."""
    found = load("miniature.json")
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
    return lambda: table() if (RESULTS / "miniature.json").exists() else none


SMALL_WORLD = {
    name: shown(table)
    for name, table in {
        "miniature": answers, "miniature-events": answers_by_event, "miniature-ablation": ablation,
        "miniature-captions": captions, "miniature-probes": probe_readings, "miniature-cost": stage_times,
    }.items()
}  # fmt: skip
