"""Sets up the server process that worker processes are forked from; nothing else imports it (see ``workers.py``).

The server ignores SIGTERM sent to the whole process group or job, because the training process then still finishes its
step and needs its workers. Forked workers handle SIGTERM as usual.
"""

import os
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

import bt_adapter.data.loading  # noqa: E402, F401 - imported once for all workers
