"""Builds the native part by running CMakeLists.txt. All other settings of the package are in pyproject.toml.

Environment variables:
    BT_NATIVE       0: pure Python; 1: the native part must build; auto (default): build it if torch and a C++
                    compiler are found, else install without it and report the reason
    BT_CUDA         the CUDA kernels: 0: not built; 1: must build; auto (default): build them if nvcc is found
    BT_CUDA_ARCHS   CUDA targets, such as "80;90" (default: those of 80, 90 and 100 that nvcc supports)
    BT_NATIVE_ARCH  value of the C++ compiler's -march, such as native (default: code for any processor)
    MAX_JOBS        number of compiler processes (default: number of processors)
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_BUILD = "bt_kernels/_native_build.txt"  # why the native part is missing; read by bt_kernels._native


def read_switch(name):
    """Return the environment variable ``name``: "0", "1" or "auto" (also if unset)."""
    value = os.environ.get(name, "") or "auto"
    if value not in ("0", "1", "auto"):
        raise SystemExit(f"the environment variable {name} must be 0, 1 or auto, but is {value!r}")
    return value


def find_tool(name):
    """Return the path of cmake or ninja, also if pip installed it and the environment is not activated."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which(name, path=path)


def find_missing():
    """Return what the native build lacks on this machine, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not importable in the build: install torch first, then use pip's --no-build-isolation"
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    if find_tool("cmake") is None:
        return "cmake was not found: pip install cmake ninja"
    return None


def remove_built(target):
    """Delete the libraries of an earlier build, which newer Python files would load."""
    for old in (target / "bt_kernels").glob("*.so"):
        old.unlink()


class CMakeBuild(build_ext):
    """Builds the libraries of CPU kernels and, if nvcc is found, of CUDA kernels into the package folder."""

    def run(self):
        native, cuda = read_switch("BT_NATIVE"), read_switch("BT_CUDA")
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        note = target / NO_BUILD
        note.parent.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        reason = find_missing()
        if reason is None:
            reason = self.cmake(target, BT_CUDA=cuda)
            if reason is not None and cuda == "auto":
                self.warn(f"building again without the CUDA kernels: {reason}")
                reason = self.cmake(target, BT_CUDA="0", BT_CUDA_OFF=f"with the CUDA kernels {reason}")
        if reason is None:
            return
        if "1" in (native, cuda):
            raise SystemExit(f"BT_NATIVE={native} and BT_CUDA={cuda}, but {reason}")
        remove_built(target)
        note.write_text(reason + "\n")
        self.warn(f"bt_kernels is installed without its native part: {reason}")

    def cmake(self, target, **options):
        """Configure, build and install; return why it failed, or None."""
        try:
            self.run_cmake(target, options)
        except subprocess.CalledProcessError as error:
            return f"the build failed ({' '.join(map(str, error.cmd[:3]))} ...: exit status {error.returncode})"
        return None

    def run_cmake(self, target, options):
        build = Path(self.build_temp).resolve() / "cmake"
        options |= {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_INSTALL_PREFIX": target,
            "Python_EXECUTABLE": sys.executable,
            "BT_CUDA_ARCHS": os.environ.get("BT_CUDA_ARCHS", ""),
            "BT_NATIVE_ARCH": os.environ.get("BT_NATIVE_ARCH", ""),
            # It works with one Python only, so wheels leave it out. Tests use an editable install.
            "BT_INTERNALS": "ON" if self.inplace else "OFF",
        }
        ninja = find_tool("ninja")
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [find_tool("cmake"), "--fresh", "-S", ROOT, "-B", build, *generator]
        subprocess.check_call([*configure, *(f"-D{name}={value}" for name, value in options.items())])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([find_tool("cmake"), "--build", build, "--parallel", jobs])
        remove_built(target)
        subprocess.check_call([find_tool("cmake"), "--install", build])

    def get_outputs(self):
        folder = Path(self.build_lib) / "bt_kernels"
        return [str(path) for path in (*folder.glob("*.so"), *folder.glob(Path(NO_BUILD).name))]


class PlatformWheel(bdist_wheel):
    """A wheel for one platform and any Python 3, since the libraries use no Python symbols."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


is_native = read_switch("BT_NATIVE") != "0"
if not is_native and "editable_wheel" in sys.argv:
    remove_built(ROOT)
    (ROOT / NO_BUILD).unlink(missing_ok=True)
setup(
    ext_modules=[Extension("bt_kernels.libbt_kernels_cpu", sources=[])] if is_native else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
