"""Every kernel where its loops turn more than once: several tiles, blocks, partial sums and chunks.

The forms of ``op_cases.py`` are small, so that all of them run on every backend in every dtype; each fits one tile.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import FORM, RUNS, Form, seeded
from test_conformance import check, exact_shape, prepared, upstream_like

from bt_kernels import VisibleTokens
from bt_kernels.ops.alignment_loss import chunks


def _padded(patches: int, frames: int, ratio: float) -> VisibleTokens:
    counts = torch.tensor([frames, frames - 3])
    return VisibleTokens.random(2, patches, frames, ratio, seeded(2), frame_counts=counts)


TIME = (
    Form("frames5", lambda: VisibleTokens.all(2, 23, 5), 1, 16),  # 30 rows of a tile of 32
    Form("frames8", lambda: VisibleTokens.tube(2, 22, 8, 0.5, seeded(1)), 2, 64),
    Form("frames12", lambda: VisibleTokens.all(1, 9, 12), 1, 88),
    Form("frames17", lambda: VisibleTokens.all(1, 4, 17), 1, 128),
    Form("frames40", lambda: VisibleTokens.all(1, 5, 40), 1, 16),
    Form("frames64", lambda: VisibleTokens.all(1, 3, 64), 1, 64),
    Form("frames100", lambda: VisibleTokens.all(1, 2, 100), 1, 16),
    Form("frames128", lambda: VisibleTokens.all(1, 1, 128), 1, 88),
    Form("ragged9", lambda: _padded(40, 9, 0.5), 1, 16),  # tiles overlap
    Form("ragged20", lambda: _padded(6, 20, 0.3), 1, 16),
    Form("ragged40", lambda: _padded(5, 40, 0.3), 1, 16),
)
SPACE = (
    Form("patches40", lambda: VisibleTokens.all(1, 40, 2), 1, 16),
    Form("patches70", lambda: VisibleTokens.all(1, 70, 2), 1, 88),
    Form("patches77", lambda: VisibleTokens.all(1, 77, 2), 1, 16),  # a small last block
    Form("patches130", lambda: VisibleTokens.all(1, 130, 2), 1, 16),
    Form("ragged50", lambda: _padded(50, 5, 0.5), 1, 16),
)
ROWS = (
    Form("frames11", lambda: VisibleTokens.tube(1, 4, 11, 0.5, seeded(1)), 1, 8),  # a mean takes 8 at a time
    Form("patches70", lambda: VisibleTokens.all(1, 70, 1), 1, 8),  # several partial sums of a frame
)


def _runs(*functions: str) -> list:
    """The kernels of these ops; the reference is their definition."""
    return [run for run in RUNS if run.values[0].function in functions and run.values[1] != "reference"]


ROW_RUNS = _runs("gather_embed", "gather_merge", "pool_video_tokens", "residual_norm", "bias_gelu")

# What Triton's interpreter, which is slow, runs: each tile, loop and branch of the kernels once.
INTERPRETED = {
    torch.float32: {
        "temporal_attention": ("frames5", "frames40", "ragged9", "ragged20"),
        "spatial_attention": ("patches40",),
        "gather_embed": ("frames11", "patches70"),
        "gather_merge": ("frames11",),
        "pool_video_tokens": ("frames11",),
        "residual_norm": ("frames11", "patches70"),
        "residual_norm-patches": ("patches70",),
        "bias_gelu": ("patches70",),
        "alignment_loss": ("padded",),
    },
    torch.bfloat16: {
        "temporal_attention": ("frames5", "frames12", "frames17", "frames40", "frames128", "ragged9", "ragged40"),
        "spatial_attention": ("patches70", "patches77", "patches130", "ragged50"),
    },
}


def compare(variant, backend: str, device: str, form: Form, dtype: torch.dtype) -> None:
    if backend == "triton" and device == "cpu" and form.name not in INTERPRETED[dtype].get(variant.name, ()):
        pytest.skip("not in Triton's interpreter, which is slow")
    visible = form.build()
    inputs = prepared(variant.draw(visible, form.heads, form.width), dtype, device, variant)
    upstream = upstream_like(exact_shape(variant, inputs, visible)).to(dtype)
    check(variant, inputs, visible.to(device), backend, upstream)


both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
by_name = {"ids": lambda form: form.name}


@both_dtypes
@pytest.mark.parametrize("form", TIME, **by_name)
@pytest.mark.parametrize("variant, backend, device", _runs("temporal_attention"))
def test_attention_over_time(variant, backend, device, form, dtype):
    compare(variant, backend, device, form, dtype)


@both_dtypes
@pytest.mark.parametrize("form", SPACE, **by_name)
@pytest.mark.parametrize("variant, backend, device", _runs("spatial_attention"))
def test_attention_in_space(variant, backend, device, form, dtype):
    compare(variant, backend, device, form, dtype)


@pytest.mark.parametrize("form", ROWS, **by_name)
@pytest.mark.parametrize("variant, backend, device", ROW_RUNS)
def test_rows(variant, backend, device, form):
    compare(variant, backend, device, form, torch.float32)


@pytest.mark.parametrize("form", ["tube70", "padded"])
@pytest.mark.parametrize("variant, backend, device", _runs("alignment_loss"))
def test_alignment_in_several_chunks(variant, backend, device, form, monkeypatch):
    monkeypatch.setattr(chunks, "chunk_rows", lambda device: 7)
    compare(variant, backend, device, FORM[form], torch.float32)
