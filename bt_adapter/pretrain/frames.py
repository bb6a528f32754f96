"""The number of frames of a pretraining step: fixed, or drawn for each step so that more time steps are trained."""

from __future__ import annotations

import re
from dataclasses import dataclass

from bt_adapter.errors import CommandError


@dataclass(frozen=True)
class FrameRange:
    """A range of frame numbers, ``least`` to ``most``, from which each step draws one."""

    least: int
    most: int

    @staticmethod
    def of(frames: int | str) -> FrameRange:
        """Parse the value of ``--frames``: 8, or "8..16".

        Raises:
            CommandError: it is neither, or no range of positive numbers.
        """
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(frames).strip())
        if not match or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise CommandError(f"--frames must be above 0, a whole number or a range as 8..16, got {frames}")
        return FrameRange(int(match[1]), int(match[2] or match[1]))

    def draw(self, seed: int, step: int) -> int:
        """T of a step (counted from 0): depends on the seed and the step alone, so all processes agree."""
        from bt_adapter.data.loading import numbers_seed  # imports torch, which the command line does not need

        return self.least + numbers_seed(seed, step, _FRAMES) % (self.most - self.least + 1)


_FRAMES = 0x66726D73  # separates these draws from others of the same seed and step
