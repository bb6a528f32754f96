"""``bt-adapter demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bt_adapter.limits import COUNT, SEED, check_numbers


@dataclass(frozen=True)
class Demo:
    """Ask about clips written as mp4 and about a real one, with the branch on and off, and show measured results."""

    evaluate: bool = False
    """Measure the small stack on held-out clips (minutes) and store the result, instead of the demo."""
    clips: int = 9
    """Moving clips to ask about; the nine motions take turns."""
    seed: int = 7
    """Of the clips' scenes."""
    keep: Path | None = None
    """Folder to leave the written mp4 files in."""
    out: Path | None = None
    """With --evaluate: where the result goes; default: bench/results/mini of a checkout, else the current folder."""
    each: int = 30
    """With --evaluate: clips of each of the nine motions."""


def run(command: Demo) -> int:
    """The demo or its evaluation. Returns the exit code."""
    check_numbers(command, {"clips": COUNT, "each": COUNT, "seed": SEED})
    from bt_adapter.demo import run_demo, run_evaluation

    return run_evaluation(command.out, command.each) if command.evaluate else run_demo(command)
