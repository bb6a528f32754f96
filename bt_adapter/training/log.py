"""The log of a run: one JSON line per step, TensorBoard events on request, and a progress bar or lines on stderr."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from bt_adapter.files import parse_lines, write_whole
from bt_adapter.progress import make_console, make_progress, say

SECONDS = 10.0  # between lines where the output is no terminal


class Log:
    """The log that the first process writes. ``step``: the one a run resumes from; lines of later steps are removed."""

    def __init__(self, out: Path, step: int, total: int, tensorboard: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "log.jsonl"
        _truncate(self.path, step)
        _truncate(out / "validation.jsonl", step)
        self.file = self.path.open("a", encoding="utf-8")
        self.total, self.console, self.last_line = total, make_console(stderr=True), 0.0
        self.bar: Any = None  # rich's display of progress bars, on a terminal
        if self.console.is_terminal:
            self.bar = make_progress(self.console, remaining=True, transient=False)
            self.task = self.bar.add_task("training", total=total, completed=step)
            self.bar.start()
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(os.fspath(out / "tensorboard"), purge_step=step)

    def step(self, values: dict[str, Any]) -> None:
        """Log a finished step."""
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and name != "step":
                    self.events.add_scalar(name, value, values["step"])
        text = (
            f"loss {values['loss']:.4f}, {values['clips_per_s']:.1f} clips/s, {100 * values['data_wait']:.0f} % waiting"
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=values["step"], description=text)
        elif time.monotonic() - self.last_line > SECONDS:
            self.last_line = time.monotonic()
            self.say(f"step {values['step']} of {self.total}: {text}")

    def validation(self, values: dict[str, Any]) -> None:
        """Log retrieval on the validation clips, as a line of validation.jsonl."""
        with self.path.with_name("validation.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        ways = [name for name in values if name != "step"]
        if self.events is not None:
            for name in ways:
                self.events.add_scalar(f"validation/{name}_r1", values[name]["r1"], values["step"])
        shown = ", ".join(f"{name.replace('_', ' ')} {values[name]['r1']:.3f}" for name in ways)
        self.say(f"validation after step {values['step']}, R@1: {shown}")

    def say(self, text: str) -> None:
        """Print a line."""
        say(self.console, text)

    def close(self) -> None:
        """Release the terminal and close the files."""
        if self.bar is not None:
            self.bar.stop()
        if self.events is not None:
            self.events.close()
        self.file.close()


def _truncate(path: Path, step: int) -> None:
    """Remove the lines of steps that will run again, and an incomplete last line."""
    if not path.exists():
        return
    rows = [row for _, row in parse_lines(path.read_text(encoding="utf-8").split("\n"))]
    kept = [row for row in rows if isinstance(row, dict) and row.get("step", math.inf) <= step]
    write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
