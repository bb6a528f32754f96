"""The tables of README and docs, from ``bench/results/``: ``python bench/report.py`` writes them, ``--check`` compares.

A table stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``: never edit it by hand.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import live_tables
import plugins
import serve_tables
from summaries import ON_BFLOAT16, SMALL_WORLD, budget, compiled, decode, highlights, long_videos, pretrain

from bt_adapter.files import write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


AIMS = (
    "as quick as `torch.compile` (2 % are a tie), and 1.5 × eager (gathers and pooling) or, forward and backward, "
    "1.3 × the better of eager and SDPA (attention). An op is the default where it beats eager, which would run in its "
    "place, and SDPA in every case, and forward and backward together keep up with `torch.compile` "
    "(`tests/test_defaults.py`)."
)


def below_target(op: str, direction: str, ms: dict[str, float]) -> bool:
    """Whether a case misses :data:`AIMS`; ``ms`` by implementation."""
    least = ms["compiled"] / 0.98
    if op.startswith(("gather", "pool")):
        least = min(least, ms["eager"] / 1.5)
    elif "attention" in op and direction == "forward+backward":
        least = min(least, ms["eager"] / 1.3, ms["sdpa"] / 1.3)
    return ms["cpu"] > least


def kernels() -> str:
    """The CPU kernels against their peers, from ``bench/kernels.py``."""
    rows = json.loads((RESULTS / "kernels-cpu.json").read_text(encoding="utf-8"))
    cases: dict[tuple, dict] = {}
    for row in rows:
        key = (row["op"], row["frames"], row["ratio"], row["direction"])
        cases.setdefault(key, {})[row["implementation"]] = row
    peers = ("eager", "compiled", "sdpa")
    missed = False
    lines = [
        "| op | tokens | pass | C++, ms | over eager | over `torch.compile` | over SDPA |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (op, frames, ratio, direction), found in cases.items():
        ours = found["cpu"]
        shown = "all tokens" if ratio == 0 else f"tube {ratio}"
        times = [f"{found[peer]['ms'] / ours['ms']:.2f}×" if peer in found else "" for peer in peers]
        name = f"`{op}`" + ("" if ours["default"] else " (not the default)")
        mark = " †" if below_target(op, direction, {peer: row["ms"] for peer, row in found.items()}) else ""
        missed = missed or bool(mark)
        lines.append(f"| {name} | T = {frames}, {shown} | {direction} | {ours['ms']:.2f}{mark} | {' | '.join(times)} |")
    facts = rows[0]["facts"]
    if missed:
        lines += ["", f"† below what was aimed at: {AIMS}"]
    lines += [
        "",
        f"ViT-L/14, one video, float32, {facts['threads']} threads of an {facts['device']}, torch {facts['torch']}: "
        "medians of alternating runs in one process, a peer's time over ours, printed by `python bench/kernels.py`. "
        "SDPA's time includes the layout changes it needs.",
    ]
    return "\n".join(lines)


def traffic() -> str:
    """Bytes the Triton kernels move over the least possible, from ``bench/traffic.py``."""
    rows = json.loads((RESULTS / "traffic.json").read_text(encoding="utf-8"))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    ratios = {(row["op"], row["case"], row["direction"]): row["ratio"] for row in rows}
    columns = [(case, direction) for case in cases for direction in ("forward", "backward")]
    lines = ["| op | " + " | ".join(f"{case}, {direction}" for case, direction in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for op in dict.fromkeys(row["op"] for row in rows):
        lines.append(
            f"| `{op}` | " + " | ".join(f"{ratios[op, *c]:.2f}" if (op, *c) in ratios else "" for c in columns) + " |"
        )
    lines += ["", "ViT-L/14, one video, bf16; counted by `python bench/traffic.py`."]
    return "\n".join(lines)


CONTENDERS = {
    "eager": "the reference's structure",
    "sdpa": "the same with SDPA",
    "compiled": "the same under `torch.compile`",
    "checkpoint": "the same with checkpointing",
    "none": '**ours**, `recompute="none"`',
    "mlp": '**ours**, `"mlp"`',
    "layer": '**ours**, `"layer"`',
    "half": '**ours**, `"mlp"`, tower in bfloat16',
    "products": "the matrix products alone",
}
STEP_CASES = {
    ("branch", 8, 0.7, 1): "Branch alone, forward and backward, T = 8, tubes 0.7",
    ("branch", 16, 0.0, 1): "Branch alone, T = 16, all tokens",
    ("step", 8, 0.7, 1): "Whole step: tower, branch, three losses, gradients; T = 8, tubes 0.7",
    ("step", 8, 0.7, 4): "The same for 4 clips",
    ("chat", 8, 0.0, 1): "Encoding a video for chat, 8 frames",
    ("chat", 100, 0.0, 1): "Encoding a video for chat, 100 frames",
}


def step() -> str:
    """Steps and encodings against the reference's structure, from ``bench/step.py``."""
    rows = json.loads((RESULTS / "step-cpu.json").read_text(encoding="utf-8"))
    lines = []
    for key, title in STEP_CASES.items():
        found = {
            r["contender"]: r
            for r in rows
            if (r["part"], r["frames"], r["ratio"], r["batch"]) == key and not r["error"]
        }
        if "eager" not in found:
            continue
        chat = key[0] == "chat"
        eager = found["eager"]
        columns = ["", "s", "speed", *([] if chat else ["kept for backward, MB"]), "peak, MB"]
        columns += [] if chat else ["peak, gradients not counted, MB"]
        columns += ["operators", "waits"]
        lines += [f"**{title}**", "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
        for name, label in CONTENDERS.items():
            if name not in found:
                continue
            row = found[name]
            timed = row["seconds"] > 0
            cells = [
                label,
                *([f"{row['seconds']:.2f}", f"{eager['seconds'] / row['seconds']:.2f}×"] if timed else "  "),
            ]
            wanted = ["peak"] if chat else ["saved", "peak", "peak_gradients_standing"]
            cells += ["" if row[value] is None else f"{row[value] / 1e6:.0f}" for value in wanted]
            counted = row["operators"] and name != "compiled"  # counting would run it operator by operator
            cells += [str(row["operators"]), str(row["waits"])] if counted else ["", ""]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    facts = rows[0]["facts"]
    lines.append(
        f"ViT-L/14 of random weights, depth 4, float32, {facts['threads']} threads of an {facts['device']}, torch "
        f"{facts['torch']}; printed by `python bench/step.py`, which says how each column is taken. Speed: the first "
        "row's time over this one's. Waits: operators whose result the host would wait for on a GPU. " + ON_BFLOAT16
    )
    return "\n".join(lines)


CHAT = {
    "image": "the image model, frames one by one",
    "reference": "video tokens, the reference's way",
    "ours": "**ours**",
}


def chat() -> str:
    """Answering about a video, from ``bench/chat.py``."""
    rows = json.loads((RESULTS / "chat-cpu.json").read_text(encoding="utf-8"))
    columns = ["frames", "videos at once", "", "tokens of a prompt", "first token, s", "tokens/s", "peak, MB"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in sorted(rows, key=lambda row: (row["frames"], row["batch"])):
        cells = [str(row["frames"]), str(row["batch"]), CHAT[row["contender"]]]
        if row["error"]:
            needed = re.search(r"the prompt takes (\d+) tokens", row["error"])
            told = (
                f"{needed[1]}: more than its context"
                if needed
                else "not run: " + row["error"].partition(":")[2].strip()
            )
            cells += [told, "", "", ""]
        else:
            cells += [
                str(row["prompt"]),
                f"{row['first']:.2f}",
                f"{row['tokens_per_s']:.1f}",
                f"{row['peak'] / 1e6:.0f}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    facts = rows[0]["facts"]
    lines += [
        "",
        f"The small stack ({rows[0]['model']}), float32, {facts['threads']} thread of an {facts['device']}, torch "
        f"{facts['torch']}; printed by `python bench/chat.py`, which says how each column is taken."
        + (" Seconds of the process, since the machine was shared." if rows[0]["clock"] == "cpu" else ""),
    ]
    return "\n".join(lines)


TABLES = {
    "long-videos": long_videos,
    "highlights": highlights,
    "decode": decode,
    "pretrain": pretrain,
    "kernels": kernels,
    "traffic": traffic,
    "step": step,
    "budget": budget,
    "compiled": compiled,
    "chat": chat,
    "vllm": plugins.vllm,
    "lmms-eval": plugins.lmms_eval,
    "live-hour": live_tables.hour,
    "live-rate": live_tables.rate,
    "live-gpu": live_tables.on_gpu,
    "serve-load": serve_tables.load,
    "serve-threads": serve_tables.threads,
    "serve-faults": serve_tables.faults,
    **SMALL_WORLD,
}


def documents() -> list[Path]:
    """Return the documents that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """``text`` with every table in it made anew."""

    def table(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"there is no table {name!r}; known: {', '.join(TABLES)}")
        return f"<!-- results:{name} -->\n{TABLES[name]()}\n<!-- /results:{name} -->"

    return re.sub(r"<!-- results:([\w-]+) -->\n.*?<!-- /results:\1 -->", table, text, flags=re.DOTALL)


def main() -> int:
    """Write the documents, or with --check compare: 1 where one differs or a table has no place."""
    before = {path: path.read_text(encoding="utf-8") for path in documents()}
    if lost := [name for name in TABLES if not any(f"<!-- results:{name} -->" in text for text in before.values())]:
        print(f"without a place in README.md or docs: {', '.join(lost)}")
        return 1
    changed = {path: after for path, text in before.items() if (after := render(text)) != text}
    if "--check" in sys.argv[1:]:
        for path in changed:
            print(f"{path.relative_to(ROOT)} differs from bench/results: python bench/report.py")
        return int(bool(changed))
    for path, text in changed.items():
        write_whole(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
