"""The counter of ``bench/traffic.py``, on kernels whose bytes are known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("triton")


OPS = ("temporal_attention", "gather_merge", "pool_video_tokens", "residual_norm", "bias_gelu", "quantize_rows")


@pytest.mark.slow
@pytest.mark.parametrize("patches", [64, pytest.param(256, marks=pytest.mark.full)])
def test_moves_little_more_than_the_least(patches, tmp_path):
    only = [word for op in OPS for word in ("--op", op)]
    done = subprocess.run(
        [sys.executable, "bench/traffic.py", *only, "--json", tmp_path / "rows.json", "--frames", "8", "--patches",
         str(patches)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["op"] for row in rows} >= set(OPS)
    for row in rows:
        # Less than the least would be a counter that misses something; the forward may skip nothing.
        assert 0.999 <= row["ratio"] <= row["limit"], row
        assert row["requested"] >= row["memory"] * 0.99
