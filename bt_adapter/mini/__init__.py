"""The mini stack: a small CLIP, branch and chat parts, trained by commands in this folder and shipped with it."""

from pathlib import Path

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE / "weights"
CLIP_FOLDER = WEIGHTS / "clip"
BRANCH_FOLDER = WEIGHTS / "branch"
ITEMS_FILE = HERE / "items.npz"
