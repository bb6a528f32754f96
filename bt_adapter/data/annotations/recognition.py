"""Reads the videos and classes of HMDB-51, UCF-101 and Kinetics-400."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bt_adapter.data.annotations.files import lines, one_split, table, words
from bt_adapter.data.finding import named_with_suffixes
from bt_adapter.data.gathering import Row
from bt_adapter.data.skipped import Skipped
from bt_adapter.data.tables import open_text
from bt_adapter.errors import CommandError

KINETICS_CLASSES = ("label_map_k400.txt", "label_map.txt", "kinetics_400_labels.csv", "classes.txt", "labels.txt")


def hmdb51(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read ``CLASS_test_splitN.txt``: each line has a video and 1 (train), 2 (test) or 0 (neither)."""
    part, number = _numbered(path, split)
    wanted = {"train": "1", "test": "2"}[part]  # 0: in neither
    for label, name in enumerate(hmdb51_classes(path)):
        file = path / f"{name}_test_split{number}.txt"
        for where, line in lines(file):
            video, _, flag = line.strip().rpartition(" ")
            video = video.strip()
            if flag == wanted:
                yield Row(where, f"{name}/{video}", [f"{name}/{video}", video], words(name), label=label)
            elif not video or flag not in ("0", "1", "2"):
                skipped.add(where, "is not a video followed by 0, 1 or 2")


def hmdb51_classes(path: Path) -> list[str]:
    """Return the class names in alphabetical order."""
    names = sorted({file.name.rpartition("_test_split")[0] for file in path.glob("*_test_split[123].txt")})
    if not names:
        raise CommandError(f"{path}: holds no files CLASS_test_split1.txt, which layout hmdb51 needs")
    return names


def ucf101(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read ``testlistNN.txt`` or ``trainlistNN.txt``, whose lines are ``Class/video.avi``."""
    part, number = _numbered(path, split)
    labels = {name: label for label, name in enumerate(ucf101_classes(path))}
    file = path / f"{part}list{number:02d}.txt"
    for where, line in lines(file):
        video = line.split()[0]  # training lists append the class number
        name, _, found = video.rpartition("/")
        if name not in labels:
            skipped.add(where, "its class is not in classInd.txt")
            continue
        yield Row(where, video, [video, found], words(name), label=labels[name])


def ucf101_classes(path: Path) -> list[str]:
    """Return the class names in the order of ``classInd.txt``."""
    numbered = [line.split() for _, line in lines(path / "classInd.txt")]
    if any(len(cells) != 2 or not cells[0].isdigit() for cells in numbered):
        raise CommandError(f"{path / 'classInd.txt'}: expected lines such as '1 ApplyEyeMakeup'")
    return [name for _, name in sorted((int(number), name) for number, name in numbered)]


def kinetics400(path: Path, split: str | None, skipped: Skipped) -> Iterator[Row]:
    """Read the official table, or a list of lines ``path number``."""
    names = [words(name) for name in kinetics400_classes(path)]
    if not _is_official(path):
        one_split(path, split)
        yield from _kinetics400_list(path, names, skipped)
        return
    labels, parts = {name: label for label, name in enumerate(names)}, set()
    for where, row in table(path, ("youtube_id", "time_start", "time_end", "label"), skipped):
        part = row.get("split", "")
        parts.add(part)
        if split is not None and part != split:
            continue
        label = labels.get(words(row["label"]))
        if label is None or not (row["time_start"].isdigit() and row["time_end"].isdigit()):
            skipped.add(where, "its class is not among the classes" if label is None else "its times are not numbers")
            continue
        stem = f"{row['youtube_id']}_{int(row['time_start']):06d}_{int(row['time_end']):06d}"
        folders = ("", f"{row['label']}/", f"{row['label'].replace(' ', '_')}/", f"{part}/", f"{part}/{row['label']}/")
        yield Row(
            where,
            stem,
            [place for folder in folders for place in named_with_suffixes(folder + stem)],
            names[label],
            label=label,
        )
    if split is not None and split not in parts:
        raise CommandError(f"{path}: no split {split!r}; it has {', '.join(sorted(parts))}")


def _kinetics400_list(path: Path, names: list[str], skipped: Skipped) -> Iterator[Row]:
    for where, line in lines(path):
        match = re.fullmatch(r"(.+?)[\s,]+(\d+)", line.strip())
        if match is None or int(match[2]) >= len(names):
            skipped.add(where, f"is not a path followed by a class number below {len(names)}")
            continue
        video, label = match[1], int(match[2])
        yield Row(where, video, [video], names[label], label=label)


def kinetics400_classes(path: Path) -> list[str]:
    """Return the class names in the order of the class list in the folder of ``path``, else alphabetically."""
    for file in (path.parent / name for name in KINETICS_CLASSES):
        if file.exists():
            if file.suffix != ".csv":
                return [line.strip() for _, line in lines(file)]
            rows = [row for _, row in table(file, ("id", "name"))]
            if not all(row["id"].isdigit() for row in rows):
                raise CommandError(f"{file}: every id must be a number")
            return [row["name"] for row in sorted(rows, key=lambda row: int(row["id"]))]
    if _is_official(path):
        return sorted({row["label"] for _, row in table(path, ("label",), Skipped()) if row["label"]})
    raise CommandError(f"{path}: needs a class list in the same folder: {', '.join(KINETICS_CLASSES)}")


def _is_official(path: Path) -> bool:
    with open_text(str(path)) as file:
        return "youtube_id" in file.readline()


def _numbered(path: Path, split: str | None) -> tuple[str, int]:
    match = re.fullmatch(r"(train|test)([123])", split or "test1")
    if match is None:
        raise CommandError(f"--split must be test1, test2, test3, train1, train2 or train3, got {split!r}")
    if not path.is_dir():
        raise CommandError(f"{path}: is not a folder; expected the folder of the splits")
    return match[1], int(match[2])
