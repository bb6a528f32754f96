"""A pretraining run left alone, and the same one killed at random moments until it gets to its end.

``python tests/killed.py MANIFEST FOLDER KILLS SEED STEPS``. The runs are FOLDER/whole and FOLDER/killed. Prints how
many times the second was killed. A process of its own, so that its children can be forked: they start with everything
imported, and a kill falls into the run and not into the imports.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from pretraining import recipe

from bt_adapter.pretrain.run import pretrain


def main(manifest: str, folder: Path, kills: int, seed: int, steps: int) -> None:
    torch.set_num_threads(1)
    for name, count in (("whole", 0), ("killed", kills)):
        wanted = recipe(
            data=manifest, out=folder / name, steps=steps, save_steps=3, ema=0.9, drop_path=0.3, accumulate=2
        )
        killed = run(lambda wanted=wanted: pretrain(wanted), wanted.out, "branch", count, seed)
    print(killed)


def run(work: Callable[[], object], out: Path, end: str, kills: int, seed: int) -> int:
    """``work`` in a child that is killed ``kills`` times, until it makes ``end`` in ``out``; how often it was killed.

    A kill comes at a random moment after none to five steps, as counted by the log of the run.
    """
    draws, killed = random.Random(seed), 0
    while True:
        child = os.fork()
        if not child:
            work()
            os._exit(0)
        if killed < kills and _logged(out / "log.jsonl", draws.randrange(6), child):
            time.sleep(draws.uniform(0, 0.2))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            continue
        assert os.waitstatus_to_exitcode(status) == 0, status
        if killed >= kills or (out / end).exists():
            return killed


def _logged(log: Path, times: int, child: int) -> bool:
    """Wait until the log has grown so often; False where the child ended before."""
    size = _size(log)
    while times:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        times -= _size(log) > size
        size = _size(log)
        time.sleep(0.002)
    return True


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *(int(word) for word in sys.argv[3:]))
