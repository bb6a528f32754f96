"""Runs the quick part of the tests in several environments, all of them or those named (``make test-matrix``).

Each is an environment of its own in .matrix/, with its Python, torch and transformers and this project's requirements;
the package is the checkout's, with the libraries built there, so that what one Python and torch built runs under
another. ``--list`` prints the environments. The last line says how many passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TOOLS = (
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "expecttest",
    "hypothesis>=6",
    "packaging",
)
TESTS = (
    "test_native.py", "test_visible.py", "test_dispatch.py", "test_conformance.py", "test_nn.py", "test_model.py",
    "test_golden.py", "test_attach.py", "test_families.py", "test_family_towers.py", "test_family_visuals.py",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """Python (major.minor), and what pip is asked for before the project's own requirements."""

    python: str
    torch: str
    transformers: str

    @property
    def name(self) -> str:
        torch, transformers = self.torch.split("==")[1], self.transformers.split("==")[1]
        return f"python{self.python}-torch{torch}-transformers{transformers}"


ENVIRONMENTS = (
    Environment("3.11", "torch==2.11.0", "transformers==5.17.0"),
    Environment("3.12", "torch==2.12.1", "transformers==5.17.0"),
    Environment("3.11", "torch==2.13.0", "transformers==5.24.0"),
    Environment("3.11", "torch==2.14.1", "transformers==5.24.0"),
    Environment("3.13", "torch==2.14.1", "transformers==5.24.0"),
)


def requirements(environment: Environment) -> list[str]:
    """What pip installs beside torch: the project's own requirements, those of its extras for chat, and test tools."""
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["chat"], *extras["mini"], *TOOLS]
    return [environment.torch, environment.transformers, *(text for text in texts if not text.startswith("bt-adapter"))]


def run(environment: Environment, folder: Path, options: list[str]) -> str:
    """Make the environment unless it is there and run the tests; "passed" or what went wrong."""
    interpreter = shutil.which(f"python{environment.python}")
    if interpreter is None:
        return f"not run: no python{environment.python} on PATH"
    place = folder / environment.name
    python = place / "bin" / "python"
    if not (place / "ready").exists():
        # torch's own pins first and alone, as the Makefile does it.
        for command in (
            [interpreter, "-m", "venv", "--clear", place],
            [python, "-m", "pip", "install", "-q", environment.torch],
            [python, "-m", "pip", "install", "-q", *requirements(environment)],
        ):
            if subprocess.run(command).returncode:
                return f"not run: failed: {' '.join(map(str, command))}"
        (place / "ready").touch()
    tests = [str(ROOT / "tests" / name) for name in TESTS]
    chosen = "not slow and not gpu and not full"
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, *options, *tests]
    print("$", *command, flush=True)
    settings = {"PYTHONPATH": str(ROOT), "BT_TRITON": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings)
    return "passed" if done.returncode == 0 else f"pytest failed with {done.returncode}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="environments to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the environments and end")
    parser.add_argument("--folder", type=Path, default=ROOT / ".matrix", help="where the environments lie")
    parser.add_argument("--pytest", nargs="*", default=[], metavar="OPTION", help="options of pytest, such as -x")
    options = parser.parse_args()
    known = {environment.name: environment for environment in ENVIRONMENTS}
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no environment is named {', '.join(unknown)}; they are {', '.join(known)}")
    chosen = [known[name] for name in options.names or known]
    if options.list:
        print(*known, sep="\n")
        return 0
    results = {environment.name: run(environment, options.folder, options.pytest) for environment in chosen}
    for name, result in results.items():
        print(f"{name}: {result}")
    passed = sum(result == "passed" for result in results.values())
    print(f"{passed} passed, {len(results) - passed} failed")
    return int(passed != len(results))


if __name__ == "__main__":
    sys.exit(main())
