"""Bytes that each Triton kernel moves, over the least that its op could, counted in the interpreter.

    python bench/traffic.py                    ViT-L/14, bf16, T = 8 tube 0.7 and T = 16 all tokens
    python bench/traffic.py --op gather_merge --json rows.json

"memory" is what reaches memory if re-reads inside a launch hit the cache: distinct 32-byte sectors, summed over the
launches of a call. "requested" is what programs ask for, re-reads included. The least counts every input element used
once and every result once (``cases.py`` of the op). What torch moves between launches (reductions of partial sums) is
counted from its tensors' sizes. alignment_loss is left out: most of its bytes are those of torch's products.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402
from interpreter import counted, make_strict  # noqa: E402
from measure import write  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bt_kernels import VisibleTokens  # noqa: E402
from bt_kernels._cases import Shape, Variant, flat_arguments, passes, variants  # noqa: E402
from bt_kernels._library import OPS  # noqa: E402

DTYPE = torch.bfloat16
HEADS, WIDTH, PATCHES = 16, 64, 256
LIMITS = {"gather_embed": (1.10, 1.25), "gather_merge": (1.10, 1.25), "pool_video_tokens": (1.10, 1.25)}
LIMITS |= {"temporal_attention": (1.10, 1.25), "spatial_attention": (1.25, 1.25)}
LIMITS |= {"residual_norm": (1.02, 1.15), "bias_gelu": (1.02, 1.10), "quantize_rows": (1.02, None)}


@dataclass(frozen=True)
class Row:
    """Traffic of one pass of one op."""

    op: str
    case: str
    direction: str
    least: int
    memory: int
    requested: int
    launches: int
    ratio: float
    limit: float | None


class TorchTraffic(TorchDispatchMode):
    """Bytes of what torch's own operators read and write between the kernels."""

    FREE = ("empty", "new_empty", "ones_like", "fill_", "detach")  # ones_like, which fills: the gradient given

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.paused = False

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Inside, nothing is counted: the interpreter itself uses torch."""
        self.paused = True
        yield
        self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        own = not self.paused and func.namespace == "aten" and not name.startswith(self.FREE)
        if own and not func.is_view:
            tensors = [a for a in (*args, out) if isinstance(a, torch.Tensor)]
            self.bytes += sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
        return out


def cases(patches: int) -> list[tuple[str, VisibleTokens]]:
    generator = torch.Generator().manual_seed(0)
    return [
        ("T=8 tube 0.7", VisibleTokens.tube(1, patches, 8, 0.7, generator)),
        ("T=16 all tokens", VisibleTokens.all(1, patches, 16)),
    ]


def count(variant: Variant, case: str, visible: VisibleTokens) -> list[Row]:
    """Forward and backward of one op, with the gradients that training needs."""
    shape = Shape(1, visible.patches, visible.frames, visible.tokens, HEADS, WIDTH, DTYPE.itemsize)
    inputs = {
        name: None if t is None else t.to(torch.float32 if name in variant.float32 else DTYPE)
        for name, t in variant.draw(visible, HEADS, WIDTH).items()
    }
    op = OPS[variant.op]
    kernel = next(k for k in op.kernels if k.backend == "triton")
    needs = tuple(name in variant.learning for name in op.differentiable)
    runs = passes(kernel, op, flat_arguments(variant, inputs, visible), needs)
    rows = []
    works, limits = variant.work(shape), LIMITS.get(variant.function, (None, None))
    for direction, run, work, limit in zip(("forward", "backward"), runs, works, limits, strict=True):
        if direction == "backward" and not op.differentiable:
            continue
        with TorchTraffic() as between, counted(between.pause) as launches:
            run()
        memory = sum(each.distinct for each in launches) + between.bytes
        requested = sum(each.requested for each in launches) + between.bytes
        ratio = memory / work.bytes
        rows.append(Row(variant.name, case, direction, work.bytes, memory, requested, len(launches), ratio, limit))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="this op alone; may be given more than once")
    parser.add_argument("--patches", type=int, default=PATCHES, help="of a frame; fewer are quicker to count")
    parser.add_argument("--frames", type=int, help="8 or 16 alone")
    parser.add_argument("--json", type=Path, help="write the rows there too, beside those of what is not counted now")
    options = parser.parse_args()
    make_strict()
    rows = []
    for variant in variants():
        if variant.function not in LIMITS or (options.op and variant.function not in options.op):
            continue
        for case, visible in cases(options.patches):
            if options.frames and visible.frames != options.frames:
                continue
            for row in count(variant, case, visible):
                rows.append(row)
                limit = "" if row.limit is None else f"limit {row.limit:.2f}"
                print(
                    f"{row.op:<28}{row.case:<17}{row.direction:<9} least {row.least / 1e6:8.2f} MB  memory "
                    f"{row.memory / 1e6:8.2f} MB = {row.ratio:.3f}  requested {row.requested / row.least:6.3f}  "
                    f"{row.launches} launches  {limit}",
                    flush=True,
                )
    if options.json:
        stored = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else []
        new = {(row.op, row.case) for row in rows}
        kept = [row for row in (Row(**each) for each in stored) if (row.op, row.case) not in new]
        order = [variant.name for variant in variants()]
        write(sorted(kept + rows, key=lambda row: order.index(row.op)), options.json)
    over = [row for row in rows if row.limit is not None and row.ratio > row.limit]
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
