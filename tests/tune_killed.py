"""Tuning killed at random moments, until one run gets to its end; as ``killed.py``, which has the loop.

``python tests/tune_killed.py DATA OUT FEATURES KILLS SEED``. Prints how many runs were killed before the last.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from killed import run
from tuning import make_video_chat, recipe

from bt_adapter.tune.run import tune


def main(data: str, out: str, features: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    wanted = recipe(
        data=data, out=Path(out), steps=40, save_steps=3, learn=("projector", "branch", "lora"), lora_dropout=0.2,
        batch=3, features=Path(features),
    )  # fmt: skip
    print(run(lambda: tune(wanted, make_video_chat()), Path(out) / "tuned", kills, seed))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
