"""Checks the two wheels that ``make wheel`` made, and tries the kernels of one in another Python and torch.

``python release/check_wheels.py dist`` looks into the wheels of a folder: tags, size, contents, symbols.
``python release/check_wheels.py dist --python PYTHON`` then installs the core wheel by PYTHON's pip into a
folder of its own and runs ``bt_kernels --check`` there; PYTHON is an interpreter with another torch, from 2.11 on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST_CORE, LARGEST_MINI = 4_000_000, 16_000_000  # bytes of the wheels
OF_MINI = (
    "clips/clips.json",
    *(f"weights/{part}/model.safetensors" for part in ("clip", "branch", "tuned/branch")),
    *(
        f"weights/{stage}/{file}"
        for stage in ("image", "tuned", "control")
        for file in ("tuned.json", "projector.safetensors", "lora/adapter_model.safetensors")
    ),
)
SYMBOLS_OF_PYTHON = re.compile(rb"\0(_?Py[A-Z][A-Za-z]*_|[A-Za-z_]*pybind11)")


def check_core(wheel: Path) -> list[str]:
    """Whatever is wrong with the core wheel: its tag, its size, what it holds."""
    wrong = []
    if not re.search(r"-py3-none-[^-]+\.whl$", wheel.name):
        wrong.append(f"the tag must be py3-none-<platform>, the file is {wheel.name}")
    if wheel.stat().st_size > LARGEST_CORE:
        wrong.append(f"{wheel.stat().st_size:,} bytes, more than {LARGEST_CORE:,}")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        if "bt_kernels/libbt_kernels_cpu.so" not in names:
            wrong.append("the CPU kernels (bt_kernels/libbt_kernels_cpu.so) are missing")
        wrong += [f"{name} belongs into bt-adapter-mini" for name in names if name.endswith(".safetensors")]
        for name in (name for name in names if name.endswith(".so")):
            library = content.read(name)
            wrong += [
                f"{name} asks for {symbol.decode()} of Python" for symbol in SYMBOLS_OF_PYTHON.findall(library)[:1]
            ]
            if str(Path.cwd()).encode() in library:
                wrong.append(f"{name} names the folder it was built in")
    return wrong


def check_mini(wheel: Path) -> list[str]:
    """Whatever is wrong with the wheel of the small stack: its tag, its size, what it lacks."""
    wrong = []
    if (size := wheel.stat().st_size) > LARGEST_MINI:
        wrong.append(f"{size:,} bytes, more than {LARGEST_MINI:,}")
    if not wheel.name.endswith("-py3-none-any.whl"):
        wrong.append(f"the tag must be py3-none-any, the file is {wheel.name}")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        wrong += [f"bt_adapter_mini/{name} is missing" for name in OF_MINI if f"bt_adapter_mini/{name}" not in names]
    return wrong


def run_kernels(wheel: Path, python: str) -> int:
    """Install the core wheel by the pip of ``python`` into a folder of its own and run its kernels; the exit code.

    The environment of ``python`` stays as it is and gets no requirement; pip checks the wheel's tag against it.
    """
    with tempfile.TemporaryDirectory() as folder:
        install = [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            folder,
            str(wheel.resolve()),
        ]
        check = [python, "-P", "-m", "bt_kernels", "--check"]
        environment = {"PYTHONPATH": folder, "BT_NATIVE": "", "BT_KERNELS_BACKEND": ""}
        for command, added in ((install, {}), (check, environment)):
            print("$", *(f"{name}={value}" for name, value in added.items()), *command, flush=True)
            done = subprocess.run(command, cwd=folder, env=os.environ | added)
            if done.returncode:
                break
        return done.returncode


def only(folder: Path, pattern: str) -> Path:
    """The one file of this pattern. SystemExit where there is none, or more than one."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} in {folder}, found {[path.name for path in found]}: run make wheel")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the wheels")
    parser.add_argument("--python", help="run the kernels by this interpreter, which has torch")
    options = parser.parse_args()
    core, mini = only(options.folder, "bt_adapter-*.whl"), only(options.folder, "bt_adapter_mini-*.whl")
    failed = False
    for wheel, wrong in ((core, check_core(core)), (mini, check_mini(mini))):
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes: {'; '.join(wrong) or 'as it should be'}")
        failed |= bool(wrong)
    return int(failed or bool(options.python and run_kernels(core, options.python)))


if __name__ == "__main__":
    sys.exit(main())
