"""A folder of many clips made of few files, some of which are broken, and their manifest."""

from __future__ import annotations

import json
import os
from pathlib import Path

from video_files import numbered, write_sound, write_tagged

from bt_adapter.data import write_video

# How a file is broken, by what of it is left; the last two still show frames.
BROKEN = ("no index", "empty", "sound", "text", "noise")
CUT = ("cut", "cut late")


def write_kinds(folder: Path) -> dict[str, Path]:
    """One file of each kind: four good ones, the broken ones, and two that are cut but can be decoded.

    The last of the good ones has a title that is no UTF-8.
    """
    folder.mkdir(parents=True)
    kinds = {f"good{i}": folder / f"good{i}.mp4" for i in range(4)}
    for i, path in enumerate(kinds.values()):
        write_video(path, numbered(6 + 2 * i))
    write_tagged(kinds["good3"], kinds["good3"])
    whole = folder / "whole.mkv"
    write_video(whole, numbered(40), options={"crf": "30", "g": "8"})
    content = whole.read_bytes()
    parts = {
        "no index": kinds["good3"].read_bytes()[:-200],  # an MP4's index stands at its end
        "empty": b"",
        "text": b"this is a text " * 50,
        "noise": bytes((i * 197 + i // 7) % 256 for i in range(3000)),
        "cut": content[: len(content) // 2],
        "cut late": content[:-100],
    }
    for kind, part in parts.items():
        kinds[kind] = folder / kind.replace(" ", "_")
        kinds[kind].write_bytes(part)
    kinds["sound"] = folder / "sound.mp4"
    write_sound(kinds["sound"], "aac")
    return kinds


def write_folder(folder: Path, count: int = 200, share: float = 0.1) -> tuple[Path, set[str]]:
    """``count`` clips, ``share`` of them broken, as many cut; the manifest, and the names of the broken ones."""
    kinds = write_kinds(folder / "kinds")
    broken, lines = set(), []
    every = round(1 / share)
    for number in range(count):
        name = f"clip{number:03d}.mp4"
        kind = f"good{number % 4}"
        if number % every == 3:
            kind = BROKEN[number // every % len(BROKEN)]
            broken.add(name)
        elif number % every == 7:
            kind = CUT[number // every % len(CUT)]
        os.link(kinds[kind], folder / name)
        lines.append(json.dumps({"video": name, "captions": [f"caption of {name}"]}) + "\n")
    manifest = folder / "clips.jsonl"
    manifest.write_text("".join(lines))
    return manifest, broken
