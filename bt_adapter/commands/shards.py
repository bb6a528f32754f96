"""``bt-adapter shards``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bt_adapter.training.settings import COUNT, NATURAL, SHARE, check_numbers


@dataclass(frozen=True)
class Shards:
    """Write clips and captions into webdataset shards, unchanged or reduced. The same command again resumes a run.

    With --frames, a shard holds that many frames of each clip, small and each a keyframe: training then reads a
    fraction of the bytes and decodes no frame that it does not use.
    """

    data: str
    """WebVid-like .csv, .jsonl, or a folder or pattern of .tar shards."""
    out: Path
    """Folder of the shards."""
    videos: Path | None = None
    """Folder of the video files, where --data names them relative to another one."""
    per_shard: int = 500
    """Clips per shard."""
    frames: int | None = None
    """Frames kept of a clip, evenly spread; default: its file unchanged."""
    short_side: int = 256
    """Shorter side of the frames, in pixels, with --frames."""
    workers: int = 0
    """Processes that share the shards; 0: this process alone."""
    max_skipped: float = 0.1
    """Largest share of unusable clips, 0 to 1; where there are more, or no clip can be decoded, it is an error."""


def run(command: Shards) -> int:
    """Write the shards and print which clips are in none. Returns 0. Raises CommandError."""
    from bt_adapter.data.manifests import read_clips
    from bt_adapter.data.shards import write_shards
    from bt_adapter.errors import CommandError

    limits = {"per_shard": COUNT, "short_side": COUNT, "frames": COUNT, "workers": NATURAL, "max_skipped": SHARE}
    check_numbers(command, limits)
    clips, skipped = read_clips(command.data, command.videos)
    skipped.check(len(clips) + len(skipped), command.max_skipped)

    def print_progress(done: int, total: int) -> None:
        print(f"shard {done} of {total}", file=sys.stderr)

    broken = write_shards(
        clips, command.out, command.per_shard, command.frames, command.short_side, command.workers, print_progress
    )
    if len(broken) == len(clips):
        raise CommandError(f"--data {command.data}: none of {len(clips)} clips can be decoded; {broken.report(10)}")
    skipped.merge(broken)
    if len(skipped):
        print(skipped.report(), file=sys.stderr)
    print(f"{len(clips) - len(broken)} clips in {-(-len(clips) // command.per_shard)} shards in {command.out}")
    broken.check(len(clips), command.max_skipped)
    return 0
