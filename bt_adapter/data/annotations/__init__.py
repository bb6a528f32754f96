"""Reads the annotation files of public retrieval and recognition data sets as clips."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bt_adapter.data.annotations import recognition, retrieval
from bt_adapter.data.annotations.files import one_split, words
from bt_adapter.data.clips import Clip
from bt_adapter.data.gathering import Gathered, Row
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.skipped import Skipped
from bt_adapter.errors import CommandError

Reader = Callable[[Path, str | None, Skipped], Iterator[Row]]
LAYOUTS: dict[str, Reader | None] = {
    "msrvtt": retrieval.msrvtt,
    "didemo": retrieval.didemo,
    "lsmdc": retrieval.lsmdc,
    "activitynet": retrieval.activitynet,
    "hmdb51": recognition.hmdb51,
    "ucf101": recognition.ucf101,
    "kinetics400": recognition.kinetics400,
    "clips": None,  # read_clips reads it
}
CLASSES: dict[str, Callable[[Path], list[str]]] = {
    "hmdb51": recognition.hmdb51_classes,
    "ucf101": recognition.ucf101_classes,
    "kinetics400": recognition.kinetics400_classes,
}


def read_annotations(
    layout: str, path: str | os.PathLike, videos: str | os.PathLike | None = None, split: str | None = None
) -> tuple[list[Clip], Skipped]:
    """Read a data set's annotations and return the usable clips and the skipped rows with reasons.

    ========== ===================================================================== ===============================
    layout     path                                                                  split
    ========== ===================================================================== ===============================
    msrvtt     MSRVTT_JSFUSION_test.csv (1k-A: key, vid_key, video_id, sentence);    none;
               a list of video_id, with MSRVTT_data.json beside it;                  none;
               MSRVTT_data.json                                                      "train", "validate" or "test"
    didemo     test_data.json; the descriptions of a video are one paragraph         none
    lsmdc      LSMDC16_challenge_1000_publictect.csv (tabs, no header)               none
    activitynet val_1.json, train.json: the sentences of a video are one paragraph   none
    hmdb51     the folder testTrainMulti_7030_splits                                 "test1" (default) to "train3"
    ucf101     the folder ucfTrainTestlist                                           "test1" (default) to "train3"
    kinetics400 the official .csv (label, youtube_id, time_start, time_end, split);  a value of its column, or none;
               a list of lines "path number"                                         none
    clips      as for :func:`~bt_adapter.data.manifests.read_clips`                  none
    ========== ===================================================================== ===============================

    A video is searched by its name with any known suffix, in the folder itself and in the subfolders that the data set
    is distributed in (movie, class, split).

    Args:
        layout: one of the names above.
        path: the file or folder above.
        videos: the folder of the videos; default: the folder of ``path``.
        split: name of the split, if ``path`` holds several.

    Returns:
        clips: for retrieval with all correct captions. For recognition with the class name in words as the only
            caption, and the class number (from 0, the index in :func:`class_names`) as ``label``.
        skipped: rows that cannot be used.

    Raises:
        CommandError: the layout or split is unknown, a file is missing or of another layout, or no clip is usable.
    """
    _check(layout, LAYOUTS)
    path = Path(path)
    folder = Path(videos) if videos is not None else path if path.is_dir() else path.parent
    try:
        reader = LAYOUTS[layout]
        if reader is None:
            one_split(path, split)
            return read_clips(path, videos)
        gathered = Gathered(str(folder))
        for row in reader(path, split, gathered.skipped):
            gathered.add(row)
    except OSError as error:
        raise CommandError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    return gathered.result(str(path))


def class_names(layout: str, path: str | os.PathLike) -> list[str]:
    """Return the class names of hmdb51, ucf101 or kinetics400 in words, in the order of their numbers.

    HMDB-51 ships no class list: its classes are numbered alphabetically, as usual. So are those of a Kinetics .csv
    without a class list in its folder (label_map_k400.txt, kinetics_400_labels.csv, classes.txt).

    Raises:
        CommandError: the layout is another one, or ``path`` holds no classes.
    """
    _check(layout, CLASSES)
    try:
        names = [words(name) for name in CLASSES[layout](Path(path))]
    except OSError as error:
        raise CommandError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    if not names:
        raise CommandError(f"{path}: holds no classes of layout {layout}")
    return names


def _check(layout: str, known: Iterable[str]) -> None:
    if layout not in known:
        raise CommandError(f"--layout must be one of {', '.join(known)}, got {layout!r}")
