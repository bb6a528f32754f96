"""What an install contains and says: metadata, wheels with and without the native part, the report command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path

import check_wheels
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def run(*command, check=True, **environment):
    done = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of what a build reads, so that no test writes into the working tree."""
    copy = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, copy)
    (copy / "README.md").touch()
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.txt")
    for name in ("bt_kernels", "bt_adapter", "csrc", "mini"):
        shutil.copytree(ROOT / name, copy / name, ignore=left_out)
    return copy


def build_wheel(sources, to, **environment):
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", to, sources,
        **environment,
    )  # fmt: skip
    (wheel,) = to.glob("*.whl")
    return wheel


def test_metadata():
    project = PROJECT["project"]
    assert (project["name"], project["version"], project["license"]) == ("bt-adapter", "0.1.0", "Apache-2.0")
    assert "3.11.0" in SpecifierSet(project["requires-python"])
    assert "3.10.9" not in SpecifierSet(project["requires-python"])
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_torch_is_no_build_requirement():
    names = {Requirement(text).name for text in PROJECT["build-system"]["requires"]}
    assert "torch" not in names
    assert {"setuptools", "cmake", "ninja"} <= names


def test_every_requirement_has_a_lower_bound_and_fits_what_is_installed():
    from importlib.metadata import version

    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        assert any(spec.operator in (">=", "==", "~=") for spec in requirement.specifier), text
        if requirement.marker is None or requirement.marker.evaluate():
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), text


def test_extras_resolve_to_names():
    assert {"triton", "xformers", "flash-attn", "chat", "train", "demo", "dev"} <= set(EXTRAS)

    def names(extra):
        for requirement in map(Requirement, EXTRAS[extra]):
            if requirement.name == "bt-adapter":
                assert requirement.extras and requirement.extras <= set(EXTRAS), f"{extra}: {requirement}"
                for inner in requirement.extras:
                    yield from names(inner)
            else:
                yield requirement.name

    found = {extra: set(names(extra)) for extra in EXTRAS}
    assert all(found.values())
    assert {"peft", "gguf", "pytest"} <= found["dev"]


def test_compiled_part_is_never_packed_from_the_tree():
    patterns = [p for group in PROJECT["tool"]["setuptools"]["package-data"].values() for p in group]
    assert not [
        p for p in patterns if fnmatch("bt_kernels/libbt_kernels_cpu.so", p) or fnmatch("libbt_kernels_cpu.so", p)
    ]


def test_pure_wheel(sources, tmp_path):
    wheel = build_wheel(sources, tmp_path, BT_NATIVE="0")
    assert wheel.name == "bt_adapter-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        scripts = content.read("bt_adapter-0.1.0.dist-info/entry_points.txt").decode()
    assert not [name for name in names if name.endswith(".so")]
    assert {name.split("/")[0] for name in names} == {"bt_kernels", "bt_adapter", "bt_adapter-0.1.0.dist-info"}
    assert "bt-adapter = bt_adapter.commands.cli:main" in scripts
    assert wheel.stat().st_size < check_wheels.LARGEST_CORE
    data = {".safetensors", ".json", ".npz", ".txt", ".py"}
    wanted = {
        str(path.relative_to(sources))
        for package in ("bt_kernels", "bt_adapter")
        for path in (sources / package).rglob("*")
        if path.suffix in data or path.name.startswith("LICENSE") or path.name == "py.typed"
    }
    assert wanted <= set(names), f"not packed: {sorted(wanted - set(names))}"


def test_weights_of_the_small_stack_are_a_wheel_of_their_own(sources, tmp_path):
    wheel = build_wheel(sources / "mini", tmp_path)
    assert check_wheels.check_mini(wheel) == []
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
        metadata = content.read("bt_adapter_mini-0.1.0.dist-info/METADATA").decode()
        assert b"Version 2.0, January 2004" in content.read("bt_adapter_mini-0.1.0.dist-info/licenses/LICENSE")
    packed = {name for name in names if name.startswith("bt_adapter_mini/")}
    assert packed == {
        str(path.relative_to(ROOT / "mini"))
        for path in (ROOT / "mini" / "bt_adapter_mini").rglob("*")
        if path.suffix in {".py", ".json", ".safetensors", ".mp4"}
    }
    (needed,) = (Requirement(text) for text in EXTRAS["mini"] if text.startswith("bt-adapter-mini"))
    assert needed.specifier.contains(re.search(r"^Version: (.+)$", metadata, re.M)[1])


def test_checks_of_wheels_find_what_is_wrong(tmp_path):
    """A wheel for one Python, too large, with weights, a symbol of Python and the folder it was built in."""
    wheel = tmp_path / "bt_adapter-0.1.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as content:
        content.writestr("bt_kernels/_C.so", b"\0PyObject_Call\0" + str(Path.cwd()).encode())
        content.writestr("bt_adapter/mini/weights/clip/model.safetensors", bytes(check_wheels.LARGEST_CORE))
    wrong = "\n".join(check_wheels.check_core(wheel))
    for part in (
        "py3-none",
        "bytes, more than",
        "libbt_kernels_cpu.so) are missing",
        "belongs into",
        "PyObject_",
        "built in",
    ):
        assert part in wrong
    mini = tmp_path / "bt_adapter_mini-0.1.0-py3-none-linux_x86_64.whl"
    shutil.copy(wheel, mini)
    wrong = "\n".join(check_wheels.check_mini(mini))
    for part in ("py3-none-any", "clips/clips.json is missing", "weights/image/tuned.json is missing"):
        assert part in wrong


def test_auto_without_a_compiler_installs_and_says_why(sources, tmp_path):
    """PATH holds no compiler: the wheel is built all the same, with the reason in it."""
    wheel = build_wheel(sources, tmp_path, BT_NATIVE="auto", PATH=str(tmp_path), CXX="")
    with zipfile.ZipFile(wheel) as content:
        assert not [name for name in content.namelist() if name.endswith(".so")]
        assert "no C++ compiler was found" in content.read("bt_kernels/_native_build.txt").decode()


@pytest.mark.parametrize(("native", "cuda"), [("1", "auto"), ("auto", "1")])
def test_required_without_a_compiler_fails_and_says_why(sources, tmp_path, native, cuda):
    done = run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path,
        sources, check=False, BT_NATIVE=native, BT_CUDA=cuda, PATH=str(tmp_path), CXX="",
    )  # fmt: skip
    assert done.returncode != 0
    assert f"BT_NATIVE={native} and BT_CUDA={cuda}, but no C++ compiler was found" in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["BT_NATIVE", "BT_CUDA"])
def test_wrong_switch_is_named(sources, tmp_path, name):
    code = "import runpy, sys; sys.argv = ['setup.py', '--version']\n"
    code += f"runpy.run_path('setup.py')['read_switch']({name!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=sources, env=os.environ | {name: "yes"}, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert f"{name} must be 0, 1 or auto, but is 'yes'" in done.stderr


@pytest.mark.slow
@pytest.mark.full  # compiles the CPU library, as every install does
@pytest.mark.skipif(
    not (shutil.which("c++") and find_spec("cmake") and find_spec("setuptools")),
    reason="no C++ compiler, cmake or setuptools",
)
def test_native_wheel(sources, tmp_path):
    """The wheel is one for every Python 3, runs from where it is unpacked, and its library names no folder of the
    machine it was built on."""
    wheel = build_wheel(sources, tmp_path, BT_NATIVE="1", BT_CUDA="0")
    assert check_wheels.check_core(wheel) == []
    where = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as content:
        content.extractall(where)
    (library,) = where.rglob("*.so")
    assert library.relative_to(where) == Path("bt_kernels", "libbt_kernels_cpu.so")
    assert str(sources).encode() not in library.read_bytes()
    code = (
        f"import sys; sys.path.insert(0, {str(where)!r})\n"
        "from bt_kernels import _native as n\n"
        "print(n.__file__, n.why_not_cpu(), n.why_not_cuda(), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=os.environ | {"BT_NATIVE": ""}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    file, why_not_cpu, why_not_cuda = done.stdout.splitlines()
    assert file.startswith(str(where))
    assert why_not_cpu == "None"
    assert why_not_cuda == "not built: switched off by BT_CUDA=0"


def test_report_command_runs():
    report = run(sys.executable, "-m", "bt_kernels").stdout
    for line in (r"^python 3", *(rf"^C\+\+ for {name}: (loaded|not loaded: .+)$" for name in ("CPU", "CUDA"))):
        assert re.search(line, report, re.M), report
    without = run(sys.executable, "-m", "bt_kernels", BT_NATIVE="0").stdout
    assert "C++ for CPU: not loaded: switched off by BT_NATIVE=0" in without
    assert re.search(r"gather_merge\b.*\n(.*\n){3} *reference +runs", without)
