"""The tables of docs/live.md, from ``bench/results/live-cpu.json``; ``bench/report.py`` puts them in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import summaries
from summaries import table


def _rows(part: str) -> list[dict[str, Any]]:
    return summaries.load("live-cpu.json")[part]


def hour() -> str:
    """An hour of frames: times in its first, its middle and its last tenth, and memory."""
    rows = _rows("hour")

    def tenths(values: Sequence[float], digits: int) -> str:
        return " / ".join(f"{values[number]:.{digits}f}" for number in (0, len(values) // 2, -1))

    cells = [
        [
            row["window"], tenths(row["push_ms"], 1), tenths(row["tokens_ms"], 1), tenths(row["answer_s"], 2),
            f"{row['rss'][0] / 1e6:.1f} → {row['rss'][-1] / 1e6:.1f} MB ({100 * row['rss_growth']:.2f} %)",
            f"{row['window_bytes'] / 1e6:.2f} MB",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("window", "a frame, ms", "tokens, ms", "answer, s", "resident memory, first tenth → last", "its bytes")
    ratios = " and ".join(f"{row['time_ratio']:.2f} times the first ({row['window']})" for row in rows)
    (error,) = (row["error"] for row in rows if row["error"] is not None)
    return "\n".join([
        table(columns, cells),
        "",
        f"A frame of the last tenth takes {ratios}. The largest difference of the sliding window's tokens at the end "
        f"from `video_tokens` of its frames is {error:.0g}.",
    ])  # fmt: skip


def rate() -> str:
    """Frames per second of one core."""
    cells = [
        [
            f"{row['model']}, {row['dtype']}", f"{row['push_s']:#.3g}", f"{row['fps']:.3g}",
            f"{100 * row['tower_share']:.1f} %", f"{row['tokens_s']:#.3g}",
        ]
        for row in _rows("rate")
    ]  # fmt: skip
    return table(("model", "frame, s", "frames per second", "the tower's share", "tokens of 8 frames, s"), cells)


def on_gpu() -> str:
    """Work of 30 frames per second on a GPU, counted."""
    names = {"push": "a pushed frame", "tokens": "the tokens of 8 frames"}
    rows = _rows("gpu")
    cells = [
        [
            names[row["what"]], f"{row['tflop']:.3f}", f"{row['gb']:.2f}", f"{row['launches']}",
            f"{row['needed_tflop_per_s']:.1f} TFLOP/s, {row['needed_gb_per_s']:.0f} GB/s",
            ", ".join(f"{value:.2f}" for value in row["least_ms"].values()),
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("", "TFLOP", "GB moved", "launches", "at 30 a second", f"least ms on {', '.join(rows[0]['least_ms'])}")
    return table(columns, cells)
