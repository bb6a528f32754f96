"""Decode in two workers without end, for a test that kills this process. Prints the workers' ids.

``python tests/workers.py MANIFEST``. With a further argument, SIGTERM lets it read forty more batches, after which it
says that it ended by itself.
"""

import multiprocessing
import signal
import sys

from bt_adapter.data import TrainTransform
from bt_adapter.data.loading import TrainingClips, batches
from bt_adapter.data.manifests import read_clips

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
    clips, _ = read_clips(sys.argv[1])
    steps = batches(TrainingClips(clips, 2, TrainTransform(16), 0), 4, 0, 1, 0, 10**6, workers=2)
    last = []
    if len(sys.argv) > 2:
        signal.signal(signal.SIGTERM, lambda *_: last.append(number + 40))
    for number, _ in enumerate(steps):
        if number == 1:
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        if last and number >= last[0]:
            sys.exit("ended by itself")
