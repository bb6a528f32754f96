"""Move the small world's models between the folder of a chain and the weights of the package bt-adapter-mini.

``chain.py WORK --install`` calls :func:`install`; ``python bench/miniature/stored.py WORK seed0/branch`` is a stage of
``chain.py WORK --stored``, which takes the stored weights in the place of a training.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from bt_adapter.files import write_json, writing  # noqa: E402
from bt_adapter.mini import CHECKOUT, weights_folder  # noqa: E402

# The trained parts, and where a chain has them.
PLACES = {
    "clip": "clip", "branch": "seed{}/branch/branch", "image": "seed{}/image/tuned", "tuned": "seed{}/tuned/tuned",
    "control": "seed{}/control/tuned",
}  # fmt: skip
NAMES = {"mini": "clip", "mini:fresh": "fresh", "mini:image": "seed{}/image/tuned"}  # of folders, in the stored files


def install(work: Path, seed: int, weights: Path = CHECKOUT / "weights") -> None:
    """Copy the models of a seed to the package's weights: float16, and no path of this machine in their files."""
    known = {place.format(seed): name for name, place in NAMES.items()} | {PLACES["branch"].format(seed): None}

    def shorten(text: str) -> str | None:
        inside = text.removeprefix(f"{work}/")
        return known.get(inside, inside) if inside != text else text

    for part, place in PLACES.items():
        with writing(weights / part) as aside:
            shutil.copytree(work / place.format(seed), aside, ignore=shutil.ignore_patterns("README.md"))
            for path in aside.rglob("*.safetensors"):
                state = {name: value.half() for name, value in load_file(path).items()}
                save_file(state, path, metadata={"format": "pt"})
            _rename(aside, shorten)
    headline = json.loads((ROOT / "bench/results/miniature.json").read_text(encoding="utf-8"))["headline"]
    write_json(weights.with_name("results.json"), {"headline": headline}, indent=1)
    print(f"installed in {weights}: {sum(f.stat().st_size for f in weights.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def lay_out(work: Path, stage: str) -> None:
    """Copy a part of the stored weights to where a chain of seed 0 has the output of a stage, as "seed0/branch"."""

    def lengthen(text: str) -> str:
        name = NAMES[text].format(0) if text in NAMES else text
        return str(work / name) if name != text or text.startswith(("data/", "seed0/")) else text

    part = stage.rpartition("/")[2]
    target = work / PLACES[part].format(0)
    target.parent.mkdir(parents=True, exist_ok=True)
    with writing(target) as aside:
        shutil.copytree(weights_folder(part), aside)
        _rename(aside, lengthen)
        if part == "tuned":  # it holds a branch of its own, but begins with the image model and that one's
            about = json.loads((aside / "tuned.json").read_text(encoding="utf-8"))
            about["branch"]["source"] = str(work / PLACES["branch"].format(0))
            write_json(aside / "tuned.json", about)


def _rename(folder: Path, rename: Callable[[str], str | None]) -> None:
    """Replace strings that are values in a folder's JSON files."""

    def renamed(found: dict[str, Any]) -> dict[str, Any]:
        return {key: rename(value) if isinstance(value, str) else value for key, value in found.items()}

    for path in folder.rglob("*.json"):
        write_json(path, json.loads(path.read_text(encoding="utf-8"), object_hook=renamed))


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), sys.argv[2])
