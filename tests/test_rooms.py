"""Imports of both packages form no circle, and ``bt_adapter``'s folders import only from those before them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rooms import FACADES, ROOT, find_circles, find_modules, find_upward, folders_of, read_imports

PACKAGES = ("bt_adapter", "bt_kernels")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_files_or_folders(package: str):
    modules = find_modules(package)
    imports = read_imports(modules)
    assert sum(map(len, imports.values())) > len(modules)  # imports are found at all
    assert find_circles({name: others for name, others in imports.items() if name not in FACADES}) == []
    assert find_circles(folders_of(imports, modules)) == []


def test_no_folder_imports_from_one_after_it():
    modules = find_modules("bt_adapter")
    assert find_upward(read_imports(modules), modules) == []


def test_kernels_know_nothing_of_the_model():
    modules = find_modules("bt_kernels")
    imports = read_imports(modules | find_modules("bt_adapter"))
    assert not [other for name in modules for other in imports[name] if other.startswith("bt_adapter")]


def test_six_files_at_the_top():
    assert len([path for path in (ROOT / "bt_adapter").iterdir() if path.is_file()]) <= 6


def test_circles_and_upward_imports_are_found():
    assert find_circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == [["b", "c"]]
    modules = {f"bt_adapter.{name}": ROOT / f"bt_adapter/{name.replace('.', '/')}.py" for name in ("data.a", "chat.b")}
    upward = {"bt_adapter.data.a": {"bt_adapter.chat.b"}, "bt_adapter.chat.b": {"bt_adapter.data.a"}}
    assert find_upward(upward, modules) == [("bt_adapter.data.a", "bt_adapter.chat.b")]


def test_lazy_and_type_only_imports_count(tmp_path: Path):
    path = tmp_path / "a.py"
    path.write_text("if TYPE_CHECKING:\n    from p.b import x\ndef f():\n    from p import c\n    import p.d\n")
    modules = {"p.a": path, "p.b": path, "p.c": path, "p.d": path}
    assert read_imports(modules)["p.a"] == {"p.b", "p.c", "p.d"}


def test_a_video_walks_down_the_folders():
    """Trace ``bt-adapter chat``: no folder is entered after one that stands behind it has been left."""
    done = subprocess.run([sys.executable, ROOT / "bench" / "walk.py"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    files = [line.strip() for line in done.stdout.splitlines()]
    order = ("data/stream.py", "towers/tower.py", "model/branch.py", "chat/conversation.py")
    assert sorted(order, key=files.index) == list(order)
