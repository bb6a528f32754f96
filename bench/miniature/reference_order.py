"""``bt-adapter pretrain`` with the mask order of the published code, which is no option: arguments as there.

That code draws the hidden patches of one frame, repeats them frame by frame, and reads the result patch by patch
(arXiv 2309.15785), so that what is hidden is no tube, and token alignment compares tokens of different places.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from bt_adapter.commands import cli  # noqa: E402
from bt_adapter.pretrain import run  # noqa: E402
from bt_kernels import VisibleTokens  # noqa: E402

draw_tubes = run.draw_visible


def draw_in_reference_order(*arguments: Any) -> VisibleTokens:
    """Draw the same patches as ``draw_visible``, in the published code's order."""
    tubes = draw_tubes(*arguments)
    hidden = torch.ones(tubes.batch, tubes.patches, dtype=torch.bool)
    hidden.scatter_(1, tubes.index[:, :: tubes.frames] // tubes.frames, False)
    return VisibleTokens.from_reference_mask(hidden.repeat(1, tubes.frames), tubes.frames)


if __name__ == "__main__":
    run.draw_visible = draw_in_reference_order  # type: ignore[assignment]
    sys.exit(cli.main(["pretrain", *sys.argv[1:]]))
