"""The tables of docs/serving.md, from ``bench/results/serve-cpu.json``; ``bench/report.py`` puts them in place."""

from __future__ import annotations

from typing import Any

import summaries
from summaries import table


def _rows(part: str) -> list[dict[str, Any]]:
    return [row for row in summaries.load("serve-cpu.json") if row["part"] == part]


def load() -> str:
    """Throughput and times of mixed requests by several clients."""
    tokens = {"load": "12", "lengths": "8 to 200"}
    rows = [row for part in tokens for row in _rows(part)]
    head = ["tokens of an answer, at most", "clients", "`--batch-size`", "requests", "requests/s", "median, s",
            "95 %, s", "first text, s", "server's CPU, s a request"]  # fmt: skip
    cells = [
        [
            tokens[row["part"]], str(row["clients"]), str(row["batch_size"]), str(row["requests"]),
            f"{row['requests_per_s']:.2f}", f"{row['p50_s']:.2f}", f"{row['p95_s']:.2f}",
            f"{row['first_text_p50_s']:.2f}", f"{row['cpu_s_per_request']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    facts = rows[0]["facts"]
    return f"{table(head, cells)}\n\n{facts['device']}, torch {facts['torch']}, the small stack, one thread."


def threads() -> str:
    """Times of one request after another by the number of threads and the way they wait."""
    head = ["threads", "idle threads wait", "requests", "median, s", "longest, s", "server's CPU, s a request",
            "load average"]  # fmt: skip
    words = {"PASSIVE": "passively", "ACTIVE": "busily"}
    cells = [
        [
            str(row["threads"]), words[row["waiting"]], str(row["requests"]), f"{row['p50_s']:.2f}",
            f"{row['longest_s']:.2f}", f"{row['cpu_s_per_request']:.2f}", f"{row['load_average']:.0f}",
        ]
        for row in _rows("threads")
    ]  # fmt: skip
    return table(head, cells)


def faults() -> str:
    """What hostile requests and a kill did."""
    (hostile,), (kill,) = _rows("hostile"), _rows("kill")
    statuses = ", ".join(f"{count:,} × {status}" for status, count in hostile["statuses"].items())
    memory = hostile["memory_mib"]
    cells = [
        [
            f"{hostile['requests']:,} hostile requests, {hostile['by_schemathesis']:,} of them by schemathesis",
            f"{statuses}; {hostile['faults']} answers that are a 5xx or tell a path or address; resident memory "
            f"{memory[0]} MiB after the first tenth, {max(memory)} MiB at most",
        ],
        [
            f"a kill of the server while {kill['clients']} clients read or wait",
            f"clients get {', '.join(f'`{name}`' for name in kill['told'])}; processes left: {kill['processes_left']}",
        ],
    ]
    return table(["what was sent", "result"], cells)
