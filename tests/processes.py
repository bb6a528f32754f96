"""A function in several gloo processes, each with a deadline: a hang says where, and never holds the suite."""

from __future__ import annotations

import faulthandler
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from bt_adapter.data.workers import PRELOAD, worker_context

# Imported once, by the process that these and the workers of data loaders are forked from: importing takes longer than
# most tests.
PRELOAD += ["pytest", "bt_adapter.pretrain.run", "bt_adapter.chat.engine", "bt_adapter.mini.llava"]


def run(folder: Path, world: int, function: Callable, *arguments, seconds: float = 180) -> None:
    """``function(rank, world, *arguments)`` in ``world`` processes of one process group.

    Raises AssertionError, with what the processes printed, when one fails or is not done after ``seconds``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = worker_context()
    children = [
        context.Process(target=child, args=(rank, world, function, arguments, str(folder), seconds), daemon=True)
        for rank in range(world)
    ]
    for process in children:
        process.start()
    deadline = time.monotonic() + seconds + 30  # the children's own deadline comes first, and says more
    while any(process.is_alive() for process in children) and time.monotonic() < deadline:
        if any(process.exitcode for process in children):
            break
        time.sleep(0.05)
    codes = [process.exitcode for process in children]
    for process in children:
        process.kill()
        process.join()
    printed = "\n".join(log.read_text() for log in sorted(folder.glob("rank*.log")))
    assert codes == [0] * world, f"the processes ended with {codes} (None: killed)\n{printed[-4000:]}"


def child(rank: int, world: int, function: Callable, arguments: tuple, folder: str, seconds: float) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # not what the machine's name happens to resolve to
    log = open(Path(folder) / f"rank{rank}.log", "w")  # noqa: SIM115 - open until the process ends
    sys.stdout = sys.stderr = log
    faulthandler.dump_traceback_later(seconds, exit=True, file=log)
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
        function(rank, world, *arguments)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        log.flush()
        os._exit(1)
    log.flush()
    os._exit(0)  # not through the libraries' own ends, which may wait for one another


def torch_alone(rank: int, world: int) -> None:
    """What the tests ask of torch, without a line of ours."""
    model = torch.nn.Linear(4, 4)
    fully_shard(model)
    model(torch.ones(2, 4)).sum().backward()
    total = torch.ones(3)
    dist.all_reduce(total)
    assert total.tolist() == [world] * 3
