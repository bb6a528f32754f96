"""What Triton makes of every launch for sm_80, sm_90 and sm_100, without a GPU: registers, spills, tensor cores.

Runs ``bench/resources.py`` in a process of its own: a process that interprets kernels cannot compile them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bt_kernels._cases import variants
from bt_kernels._library import OPS

ROOT = Path(__file__).resolve().parents[1]
FUNCTIONS = sorted({v.function for v in variants() if any(k.backend == "triton" for k in OPS[v.op].kernels)})
ATTENTION = [name for name in FUNCTIONS if "attention" in name]
ROWS = [name for name in FUNCTIONS if "attention" not in name]

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "functions, how",
    [
        pytest.param(ATTENTION, ["--by-turns"], id="attention by turns"),
        pytest.param(ROWS, ["--by-turns", "--few"], id="rows by turns"),
        pytest.param(ATTENTION, [], id="attention", marks=pytest.mark.full),
        pytest.param(ROWS, [], id="rows", marks=pytest.mark.full),
    ],
)
def test_compiles_without_spills(functions, how, tmp_path):
    """Every launch of attention and some of each other kernel, for one architecture by turns; ``full`` compiles every
    launch, the hottest for all three."""
    rows = tmp_path / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    only = [word for function in functions for word in ("--op", function)]
    done = subprocess.run(
        [sys.executable, "bench/resources.py", *only, "--quick", *how, "--json", rows],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    print(done.stdout)
    assert rows.exists(), done.stderr
    found = json.loads(rows.read_text())
    assert {row["target"] for row in found} == {"sm_80", "sm_90", "sm_100"}
    for row in found:
        told = f"{row['kernel']} {row['target']} {row['dtype']}, {row['case']}"
        assert row["spills"] == 0, f"{told}: {row['spills']} spills"
        assert row["shared"] <= row["shared_limit"], f"{told}: {row['shared']} bytes of shared memory"
        assert row["registers"] <= row["register_limit"], f"{told}: {row['registers']} registers"
        assert row["instructions"] > 8, told
    assert {row["op"] for row in found} >= set(functions)
    for function in set(functions) & set(ATTENTION):
        passes = [row for row in found if "forward" in row["kernel"] or "backward" in row["kernel"]]
        main = [row for row in passes if row["dtype"] == "bf16" and row["op"].startswith(function)]
        assert main and all(row["tensor_core"] > 0 for row in main)
        assert all(row["wide_loads"] > 0 for row in main)
