"""``bench/device.sh`` rehearsed without a GPU, without ``av`` and ``tyro``; and with parts that fail and hang."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("av", "tyro"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""
PARTS = ["build", "facts", "conformance", "kernels-attention", "kernels-rows", "step", "sanitize", "gpu-tests",
         "step-compiled"]  # fmt: skip


def rehearse(tmp_path: Path, **changes: str) -> tuple[subprocess.CompletedProcess, Path]:
    """Run the script, results in ``tmp_path``; return what it printed and the unpacked archive."""
    own = {"OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path / "results"), "PYTHON": sys.executable}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "BT_"))}
    done = subprocess.run(
        ["bench/device.sh", "--rehearse"], cwd=ROOT, env=environment | own | changes, capture_output=True, text=True,
        timeout=500,
    )  # fmt: skip
    assert os.listdir(tmp_path / "out") == ["device-results.tar.gz"], "one archive is what remains"
    with tarfile.open(tmp_path / "out" / "device-results.tar.gz") as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    return done, tmp_path / "unpacked"


def parts_of(folder: Path) -> list[str]:
    return [line.split()[1].rstrip(":") for line in (folder / "summary.txt").read_text().splitlines()]


@pytest.mark.slow
def test_rehearsal_without_gpu_and_video_decoder(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(MISSING)
    done, folder = rehearse(tmp_path, PYTHONPATH=str(tmp_path / "without"))
    logs = "\n".join(path.read_text()[-3000:] for path in folder.glob("*.log"))
    assert done.returncode == 0, done.stdout + logs
    assert parts_of(folder) == PARTS
    kernels = json.loads((folder / "kernels-cpu.json").read_text())
    assert "attention" in kernels[0]["op"] and not any(row["error"] for row in kernels)
    assert {"spatial_attention", "gather_merge", "alignment_loss"} <= {row["op"] for row in kernels}
    steps = json.loads((folder / "step-cpu.json").read_text())
    assert {row["contender"] for row in steps} == {"eager", "sdpa", "none", "mlp"}
    assert all(row["seconds"] > 0 and not row["error"] for row in steps)


PYTHON = """#!/usr/bin/env bash
case "$*" in
  *bench/step.py*) echo begun; sleep 60 ;;
  *bench/kernels.py*) echo '[]' > "$OUT/kernels.json"; head -c 3000000 /dev/zero | tr '\\0' x; exit 3 ;;
esac
"""


def test_parts_that_fail_or_hang_stop_nothing(tmp_path):
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    done, folder = rehearse(tmp_path, PYTHON=str(python), LIMIT_S="1")
    assert done.returncode == 1
    assert parts_of(folder) == PARTS
    failed = done.stdout.splitlines()[-1]
    assert "kernels-attention: 3,kernels-rows: 3,step: 124,step-compiled: 124;" in failed
    assert {"begun", "stopped after 1 s"} <= set((folder / "step.log").read_text().splitlines())
    assert (folder / "kernels.json").exists()
    assert (folder / "kernels-rows.log").stat().st_size <= 512 * 1024, "of a long log its end"


def test_no_part_begins_after_the_deadline(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/usr/bin/env bash\n")
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        ["bench/device.sh", "--rehearse"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OUT": str(tmp_path / "out"), "RESULTS": str(tmp_path / "r"), "PYTHON": str(python),
                          "DEADLINE_S": "5"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout.count("no time left") >= len(PARTS)
