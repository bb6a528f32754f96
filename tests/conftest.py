"""Shared test settings: one thread, hypothesis without deadlines, Triton's interpreter where there is no GPU, a count
of the GPU tests that did not run."""

from __future__ import annotations

import importlib.util
import os

import processes
import pytest
import torch
from hypothesis import settings
from interpreter import make_strict

from bt_kernels._triton import interpreting

# Without a GPU Triton kernels run in its interpreter, on CPU tensors. Triton reads this when a kernel is defined.
if not torch.cuda.is_available() and os.environ.get("BT_TRITON") != "0":
    os.environ.setdefault("TRITON_INTERPRET", "1")
if interpreting() and importlib.util.find_spec("triton"):
    make_strict()

# The tests' tensors are small: threads cost more than they give, and two test runs would fight for cores.
torch.set_num_threads(int(os.environ.get("BT_TEST_THREADS", "1")))

# The first call of a case may compile or load; a deadline would only make the suite flaky. Elsewhere than in CI every
# run tries other examples; one that fails is printed with what reproduces it.
settings.register_profile("bt", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True)
settings.load_profile("bt")


@pytest.fixture
def narrow_four_bit_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes run the tests' small layers in 4 bits on every CPU.

    On one with avx512_bf16 it packs weights in blocks of 32 rows and 64 columns, and fails where a layer has fewer.
    """
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many GPU tests were skipped, so that a green run never reads as a run on a GPU."""
    skipped = sum("gpu" in getattr(report, "keywords", ()) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} GPU tests did not run: no GPU", yellow=True)


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fail where torch's own processes cannot reach one another, before a test of this package is blamed for it."""
    try:
        processes.run(tmp_path_factory.mktemp("gloo"), 2, processes.torch_alone, seconds=90)
    except AssertionError as failure:
        pytest.fail(f"gloo processes of torch alone do not work on this machine: {str(failure)[-1000:]}")
