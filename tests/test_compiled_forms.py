"""How many kernels Triton compiles while lengths change, by its own keys (``bench/compiled_forms.py``).

In a process of its own: one that interprets kernels has no keys.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMITS = {"T = 4 … 16": 20, "ratios": 18, "a chat at": 14, "tuning": 24, "products": 4}

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")


def counted(code: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env={**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_lengths_compile_few_kernels():
    found = json.loads(
        counted(
            "import json, compiled_forms as forms\n"
            "print(json.dumps({name: [one.name for one in found] for name, _, found in forms.sequences()}))"
        )
    )
    assert len(found) == len(LIMITS)
    for part, limit in LIMITS.items():
        names = next(names for name, names in found.items() if part in name)
        assert len(names) <= limit, f"{part}: {len(names)} kernels, {sorted(names)}"
        own = {"_product"} if part == "products" else {"_forward", "forward"}  # of the gathers and of the attentions
        assert own <= set(names)


def test_what_asks_for_another_kernel_is_counted():
    """A width that is no multiple of 16 aligns no row: another kernel. A longer video is the same one."""
    out = counted(
        "import torch, compiled_forms as forms\n"
        "from bt_kernels import VisibleTokens\n"
        "few, more = VisibleTokens.all(1, 4, 2), VisibleTokens.all(3, 4, 16)\n"
        "def count(visible, width):\n"
        "    found = forms.launches('gather_merge', visible, torch.float32, False, heads=1, width=width)\n"
        "    return {forms.form(each, 90).key for each in found}\n"
        "print(count(few, 64) == count(more, 64), count(few, 64) == count(few, 72))"
    )
    assert out.split() == ["True", "False"]
