"""Worker processes for decoding: how they are started and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import ForkServerContext
from multiprocessing.process import parent_process

# Modules that the process which workers are forked from imports before the first of them.
PRELOAD = ["bt_adapter.data._fork_server"]


def worker_context() -> ForkServerContext:
    """The way to start worker processes: forked from a process of their own that only imported what they need.

    A worker forked from the training process itself would copy locks that other threads hold and decoders whose
    threads do not exist in the copy, and could hang or crash. Starting that process takes about two seconds, once;
    each worker then takes some hundredths of a second. What workers are given must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def begin_worker(number: int) -> None:
    """Let a worker end with the process that started it and not before.

    SIGINT and SIGTERM that go to the whole group are the training process's to answer: it may need its workers until
    it has ended its step. A worker ends when that process sends it SIGTERM or is gone.
    """
    parent = parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_when_alone, args=(parent,), daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_when_alone(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
