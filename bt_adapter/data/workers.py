"""Starts and ends the worker processes that decode."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.context import ForkServerContext
from multiprocessing.process import parent_process

# Modules that the fork server imports before it forks the first worker.
PRELOAD = ["bt_adapter.data._fork_server"]


def worker_context() -> ForkServerContext:
    """Return the context that forks workers from a fork server, which only imported the modules they need.

    A worker forked from the training process would copy locks that other threads hold and decoders whose threads do
    not exist in the copy, and could hang or crash. The server takes about two seconds to start, once; each worker then
    takes some hundredths of a second. Arguments of workers must be picklable.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def begin_worker(number: int) -> None:
    """Set up a worker's signals so that it ends with its parent process and not before.

    Only the training process handles SIGINT and SIGTERM sent to the whole process group: it may need its workers to
    finish its step. A worker ends when that process sends it SIGTERM or has exited.
    """
    parent = parent_process()
    assert parent is not None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_on_sigterm, args=(parent.pid,), daemon=True).start()
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_on_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_with_parent(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
