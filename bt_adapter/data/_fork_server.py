"""Imported by the process that worker processes are forked from, and by nothing else (see ``workers.py``).

That process stays alive where SIGTERM goes to the whole group or job, as the training process then still ends its step
and needs its workers. What is forked from it answers SIGTERM as usual.
"""

import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

import bt_adapter.data.loading  # noqa: E402, F401 - imported once for all workers
