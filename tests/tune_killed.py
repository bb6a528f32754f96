"""A tuning run left alone, and the same one killed at random moments until it gets to its end.

``python tests/tune_killed.py DATA FOLDER KILLS SEED``. The runs are FOLDER/whole and FOLDER/killed. Prints how many
times the second was killed. As ``killed.py``, which has the loop.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from killed import run
from tuning import make_video_chat, recipe

from bt_adapter.tune.run import tune


def main(data: str, folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    for name, count in (("whole", 0), ("killed", kills)):
        wanted = recipe(
            data=data, out=folder / name, steps=24, save_steps=3, learn=("projector", "branch", "lora"), batch_size=3,
            lora_dropout=0.2, features=folder / f"{name}-features",
        )  # fmt: skip
        killed = run(lambda wanted=wanted: tune(wanted, make_video_chat()), wanted.out, "tuned", count, seed)
    print(killed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
