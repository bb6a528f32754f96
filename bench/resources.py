"""Registers, spills, shared memory and tensor-core instructions of every Triton and CUDA kernel, without a GPU.

    python bench/resources.py                     every op, sm_80, sm_90, sm_100
    python bench/resources.py --op gather_merge --target 90 --json rows.json

The launchers run on meta tensors at true shapes and their launches are recorded, so what is compiled here is what a
GPU would be given, specialised as Triton's JIT does it. CUDA kernels come from ``_C_cuda.so``, if it is built.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from compiled_forms import form, launches
from measure import write

from bt_kernels import VisibleTokens, _triton
from bt_kernels._cases import variants

TARGETS = (80, 90, 100)
# KiB of shared memory of a multiprocessor by target, of which each program takes one for itself.
SHARED = {80: 164, 90: 228, 100: 228}
# Bytes of a program, however few are meant to share a multiprocessor. What is planned for 80 runs on 86 and 89 too.
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_LIMIT = 512  # columns on sm_100; above, Triton compiles an empty kernel without a word
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (name, heads, head width, patches): ViT-L/14 and EVA-CLIP-g
MODELS = (("L/14", 16, 64, 256), ("EVA-g", 16, 88, 256))


@dataclass(frozen=True)
class Row:
    """What one kernel takes on one target."""

    op: str
    kernel: str
    target: str
    dtype: str
    case: str
    registers: int  # of a thread
    register_limit: int  # for as many programs on a multiprocessor as the launcher plans
    spills: int  # bytes of local memory, or load and store instructions to it
    shared: int
    shared_limit: int
    tensor_core: int  # instructions
    warps: int
    wide_loads: int  # 128-bit
    instructions: int

    @property
    def broken(self) -> bool:
        """Whether it spills or needs more than planned."""
        return bool(self.spills) or self.registers > self.register_limit or self.shared > self.shared_limit


def visible_forms(patches: int) -> Iterator[tuple[str, VisibleTokens]]:
    """The forms a kernel may be specialised for."""
    for frames in (8, 16, 32, 64, 128):
        yield f"T={frames} tube 0.7", VisibleTokens.tube(2, patches, frames, 0.7)
    yield "T=12 all", VisibleTokens.all(2, patches, 12)
    for frames in (8, 32, 64):
        counts = torch.tensor([frames, frames - 3])
        yield f"T={frames} ragged", VisibleTokens.random(2, patches, frames, 0.7, frame_counts=counts)


# What the tests look at: every target where kernels are hottest, elsewhere the one where registers are scarcest.
QUICK: dict[str, dict[tuple[str, str, str], tuple[int, ...]]] = {
    "": {
        ("L/14", "T=8 tube 0.7", "bf16"): TARGETS,
        ("EVA-g", "T=8 tube 0.7", "bf16"): TARGETS,
        ("L/14", "T=8 ragged", "bf16"): (80,),
        ("L/14", "T=8 tube 0.7", "fp32"): (80,),
        ("EVA-g", "T=8 tube 0.7", "fp32"): (80,),
    },
    "temporal_attention": {
        ("L/14", "T=8 tube 0.7", "fp16"): (80,),
        ("L/14", "T=64 tube 0.7", "bf16"): TARGETS,
        ("EVA-g", "T=64 tube 0.7", "bf16"): (80,),
        ("L/14", "T=128 tube 0.7", "bf16"): (80,),
        ("EVA-g", "T=128 tube 0.7", "bf16"): TARGETS,
        ("EVA-g", "T=64 ragged", "bf16"): (90, 100),
        ("L/14", "T=64 tube 0.7", "fp32"): (80,),
        ("EVA-g", "T=32 tube 0.7", "fp32"): (80,),
    },
    "spatial_attention": {("L/14", "T=12 all", "bf16"): TARGETS},
}


def tool(name: str) -> str:
    """Triton's own copy of a CUDA tool."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compiled(launch, target: int) -> dict:
    """Compile a launch for ``sm_<target>`` and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    made = form(launch, target)
    source = ASTSource(launch.kernel, made.signature, constexprs=made.constants, attrs=made.attributes)
    options = launch.options(target)
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        found = cubin_facts(file.name, kernel.metadata.name)
    limits = {
        "register_limit": launch.registers(target),
        "shared_limit": min(SHARED_LIMITS[target], (SHARED[target] // launch.programs_per_sm(target) - 1) * 1024),
    }
    tensor_memory = getattr(kernel.metadata, "tmem_size", None) or 0
    if tensor_memory > TENSOR_MEMORY_LIMIT:
        raise RuntimeError(f"{kernel.metadata.name} wants {tensor_memory} columns of tensor memory")
    return {**found, **limits, "shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}


def cubin_facts(path: str, kernel: str, cuobjdump: str | None = None, nvdisasm: str | None = None) -> dict:
    """Registers, local memory and instruction counts of a cubin of one kernel."""
    usage = subprocess.run(
        [cuobjdump or tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True
    )
    line = next(x for x in usage.stdout.splitlines() if "REG:" in x)
    code = subprocess.run([nvdisasm or tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.M)
    local = sum(name.startswith(("STL", "LDL")) for name in instructions)
    stack = int(re.search(r"STACK:(\d+)", line)[1]) + int(re.search(r"LOCAL:(\d+)", line)[1])
    return {
        "registers": int(re.search(r"REG:(\d+)", line)[1]),
        "spills": local + stack,
        "tensor_core": sum(re.match(r"[HIDQO]G?MMA|UTC\w*MMA", name) is not None for name in instructions),
        "wide_loads": sum(name.startswith(("LDG", "LDGSTS")) and ".128" in name for name in instructions),
        "instructions": len(instructions),
    }


@dataclass(frozen=True)
class Planned:
    """A launch to compile, and the targets to compile it for."""

    op: str
    launch: _triton.Launch
    dtype: str
    case: str
    targets: tuple[int, ...]


def distinct_launches(only: Sequence[str], targets: tuple[int, ...], quick: bool) -> Iterator[Planned]:
    """Yield each launch of all ops, or of those named, that Triton compiles anew; ``quick``: of the cases in QUICK."""
    seen: set[str] = set()
    for variant in variants():
        if only and variant.function not in only:
            continue
        looked_at = QUICK[""] | QUICK.get(variant.function, {})
        for model, heads, width, patches in MODELS:
            for case, visible in visible_forms(patches):
                for name, dtype in DTYPES.items():
                    if quick and (model, case, name) not in looked_at:
                        continue
                    wanted = looked_at[model, case, name] if quick else targets
                    wanted = tuple(target for target in wanted if target >= variant.oldest)
                    if not wanted:
                        continue
                    for launch in launches(variant.name, visible, dtype, True, heads, width, every_gradient=True):
                        key = form(launch, TARGETS[0]).key
                        if key not in seen:
                            seen.add(key)
                            yield Planned(variant.name, launch, name, f"{model} {case}", wanted)


def representatives(planned: Iterable[Planned]) -> Iterator[Planned]:
    """Yield the first launch of each kernel of an op, and for every second kernel one more, by turns."""
    kernels: dict[tuple[str, str], list[Planned]] = {}
    for each in planned:
        kernels.setdefault((each.op, each.launch.kernel.__name__), []).append(each)
    for turn, (first, *others) in enumerate(kernels.values()):
        yield first
        if others and turn % 2:
            yield others[turn // 2 % len(others)]


def by_turns(planned: Iterable[Planned]) -> Iterator[Planned]:
    """Yield each launch for one of its targets, another one each time."""
    for turn, each in enumerate(planned):
        yield replace(each, targets=(each.targets[turn % len(each.targets)],))


def rows(planned: Iterable[Planned]) -> Iterator[Row]:
    """Compile launches and yield a row for each of their targets."""
    for each in planned:
        name = each.launch.kernel.__name__
        for target in each.targets:
            found = compiled(each.launch, target)
            if found["instructions"] < 8:
                raise RuntimeError(f"{name} compiled to nothing for sm_{target}")
            yield Row(each.op, name, f"sm_{target}", each.dtype, each.case, **found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="this op alone; may be given more than once")
    parser.add_argument("--target", type=int, action="append", help="80, 90 or 100; may be given more than once")
    parser.add_argument("--quick", action="store_true", help="a few cases: what the whole tests look at")
    parser.add_argument("--by-turns", action="store_true", help="each launch for one target, another one each time")
    parser.add_argument("--few", action="store_true", help="of each kernel of an op one launch, of every second two")
    parser.add_argument("--json", type=Path, help="write the rows there too")
    options = parser.parse_args()
    if _triton.interpreting():
        sys.exit("TRITON_INTERPRET=1 keeps Triton from compiling: unset it")
    planned = distinct_launches(options.op, tuple(options.target or TARGETS), options.quick)
    planned = representatives(planned) if options.few else planned
    found = []
    for row in rows(by_turns(planned) if options.by_turns else planned):
        found.append(row)
        print(
            f"{row.kernel:<20} {row.target:<7}{row.dtype:<5}{row.registers:>4} of {row.register_limit:>3} registers "
            f"{row.spills:>5} spills {row.shared:>7} B shared {row.tensor_core:>4} mma {row.wide_loads:>4} wide loads "
            f"{row.warps:>2} warps  {row.op}, {row.case}{'   <--' if row.broken else ''}",
            flush=True,
        )
    if options.json:
        write(found, options.json)
    return int(any(row.broken for row in found))


if __name__ == "__main__":
    sys.exit(main())
