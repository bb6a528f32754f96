"""What the benchmarks share: alternating rounds, memory, what is written beside a figure, and where."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

import torch
from device_work import memory_of
from pytest_benchmark.stats import Stats

from bt_adapter.files import write_json

ROOT = Path(__file__).resolve().parent.parent
COPY_BYTES = 256 * 2**20
CYCLES_PER_MS = 2_000_000  # no GPU here runs at more than 2 GHz


def facts(device: str) -> dict:
    """What a row needs to be read later."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    packages = {p: v for p in ("torch", "triton", "xformers", "flash-attn") if (v := installed(p))}
    about = {"device": name, "kind": device, "threads": torch.get_num_threads(), "commit": commit.strip(), **packages}
    return about if device == "cuda" else about | {"flags": vector_flags()}


def vector_flags() -> list[str]:
    """The instructions on which a matrix product's speed rests, as Linux names them: of AVX-512 and AMX."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    return sorted(flag for flag in flags if flag.startswith(("avx", "amx", "fma")))


def cpu_name() -> str:
    """The processor as Linux names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rounds_of(
    functions: dict[str, Callable],
    device: str,
    seconds: float,
    least: int = 5,
    sleeps: Mapping[str, float] | None = None,
) -> dict[str, Stats]:
    """Run all functions in turn, again and again, and collect a time of each per round.

    Args:
        functions: by name.
        device: "cuda": CUDA events, the cache flushed before each run; else the wall clock.
        seconds: for each function.
        least: rounds at least.
        sleeps: milliseconds that the GPU sleeps before each run of a function, while the host enqueues it: what is
            timed is then the GPU's work alone.
    """
    stats = {name: Stats() for name in functions}
    flush = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    ends = time.perf_counter() + seconds * len(functions)
    rounds = 0
    while rounds < least or (time.perf_counter() < ends and rounds < 1000):
        pending = []
        for name, function in functions.items():
            if flush is not None:
                flush.zero_()
                torch.cuda._sleep(int(CYCLES_PER_MS * (sleeps or {}).get(name, 0.0)))
                start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                start.record()
                function()
                end.record()
                pending.append((name, start, end))
            else:
                began = time.perf_counter()
                function()
                stats[name].update(time.perf_counter() - began)
        if pending:
            torch.cuda.synchronize()
            for name, start, end in pending:
                stats[name].update(start.elapsed_time(end) / 1e3)
        rounds += 1
    return stats


def replay_of(function: Callable[[], object]) -> Callable[[], None] | None:
    """Record a function as a CUDA graph and return its replay, or None if it cannot be recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose kernels and allocate workspaces on their first calls
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0][:200]}", flush=True)
        return None
    return graph.replay


def peak_memory(function: Callable, device: str) -> float | None:
    """MiB the allocator held on top of what was there before; None on a CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kept_bytes(run: Callable[[], object], own: Collection[int]) -> int:
    """Return the bytes of the unique storages kept for the backward of ``run``, without those in ``own``."""
    kept: dict[int, int] = {}

    @torch.compiler.disable
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if memory_of(tensor) not in own:
            kept[memory_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def results_file(name: str, about: dict) -> Path:
    """Where rows go: ``$OUT`` or bench/results, by the kind of device."""
    folder = Path(os.environ.get("OUT", ROOT / "bench" / "results"))
    return folder / f"{name}-{'cpu' if about['kind'] == 'cpu' else about['device'].replace(' ', '-')}.json"


def write(rows: list, path: Path) -> None:
    """Write the rows aside and rename, so that a run killed at any moment leaves the last whole file."""
    write_json(path, [row if isinstance(row, dict) else asdict(row) for row in rows], indent=1)


def update(rows: list, path: Path, keys: Sequence[str]) -> None:
    """Write the rows after those that the file has of other cases, which the fields ``keys`` tell apart."""
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    write(merged(stored, rows, keys), path)


def merged(stored: list[dict], rows: list, keys: Sequence[str]) -> list:
    """Return the rows after those ``stored`` of other cases, which the fields ``keys`` tell apart."""
    new = {tuple(getattr(row, key) for key in keys) for row in rows}
    return [row for row in stored if tuple(row[key] for key in keys) not in new] + rows


def verdicts(reports: Sequence[Path]) -> dict[str, bool]:
    """Read test runs' JUnit XML: the name of each test that ran to an end or failed to, and whether it passed."""
    found: dict[str, bool] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            outcomes = {child.tag for child in case}
            if "skipped" not in outcomes:
                found[f"{case.get('classname')}::{case.get('name')}"] = not outcomes & {"failure", "error"}
    return found
