"""Batches of training clips: what a step gets is a function of the seed and its number, and of nothing else."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch
from clip_files import write_folder, write_kinds
from torch.utils.data import Dataset
from video_files import numbered, numbers

from bt_adapter.data import TrainTransform, write_video
from bt_adapter.data.clips import Clip
from bt_adapter.data.loading import Batch, Damaged, SyntheticClips, TrainingClips, batches, in_order, shuffled
from bt_adapter.data.manifests import read_clips
from bt_adapter.data.skipped import Skipped, TooManySkipped
from bt_adapter.errors import CommandError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
WHOLE = TrainTransform(48, scale=(1.0, 1.0), ratio=(1.0, 1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """200 clips, 20 of them broken, 20 cut: manifest and names of the broken ones."""
    return write_folder(tmp_path_factory.mktemp("clips") / "folder")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Twelve clips of 16 numbered frames, which differ in their captions alone."""
    path = tmp_path_factory.mktemp("good") / "clip.mp4"
    write_video(path, numbered(16))
    return [Clip(f"clip{n}", str(path), (f"first {n}", f"second {n}")) for n in range(12)]


def data(clips: list[Clip], frames: int = 2, seed: int = 0, size: int = 16) -> TrainingClips:
    return TrainingClips(clips, frames, TrainTransform(size), seed)


def take(clips, size, done, steps, rank=0, world=1, workers=0) -> list[Batch]:
    return list(batches(clips, size, rank, world, done, steps, workers))


def same(mine: list[Batch], theirs: list[Batch]) -> bool:
    return len(mine) == len(theirs) and all(
        torch.equal(a.frames, b.frames) and (a.captions, a.failed, a.damaged) == (b.captions, b.failed, b.damaged)
        for a, b in zip(mine, theirs, strict=True)
    )


def test_an_epoch_goes_past_broken_clips_and_names_exactly_those_and_the_damaged(folder):
    manifest, broken = folder
    clips, skipped = read_clips(manifest)
    assert len(clips) == 200 and len(skipped) == 0 and len(broken) == 20
    seen, failed, damaged = [], Skipped(), Damaged()
    for batch in take(data(clips), 10, 0, 20, workers=2):
        assert batch.frames.shape == (10, 2, 3, 16, 16) and batch.frames.dtype == torch.uint8
        assert len(batch.captions) == len(set(batch.captions)) == 10
        seen += batch.captions
        for key, reason in batch.failed:
            failed.add(key, reason)
        damaged.note(batch.damaged)
    assert set(failed.reasons) == broken
    assert sorted(damaged.reasons) == [f"clip{number:03d}.mp4" for number in range(7, 200, 20)]  # cut amid frames
    assert damaged.report(1).startswith("10 used though damaged or truncated: clip") and "9 more" in damaged.report(1)
    assert {caption.removeprefix("caption of ") for caption in seen} == {clip.key for clip in clips} - broken
    report = failed.report()
    assert "20 skipped" in report and all(key in report for key in broken)
    for reason in ("is empty", "holds no video, only sound", "cannot be read as a video file"):
        assert reason in report
    failed.check(200, 0.1)
    with pytest.raises(TooManySkipped, match="(?s)20 of 200 clips.*clip003"):
        failed.check(200, 0.09)


def test_batches_do_not_depend_on_workers_processes_or_where_a_run_was_resumed(folder):
    clips = read_clips(folder[0])[0][:30]
    whole = take(data(clips), 8, 0, 7)  # 3 steps an epoch
    assert sum(len(batch.failed) for batch in whole) > 4
    assert same(whole, take(data(clips), 8, 0, 7, workers=2))
    assert same(whole[2:], take(data(clips), 8, 2, 7, workers=2))
    assert same(whole[5:], take(data(clips), 8, 5, 7))
    for world in (2, 4):
        parts = [take(data(clips), 8 // world, 0, 7, rank, world) for rank in range(world)]
        joined = [
            Batch(
                torch.cat([part.frames for part in step]),
                [caption for part in step for caption in part.captions],
                [named for part in step for named in part.failed],
                [key for part in step for key in part.damaged],
            )
            for step in zip(*parts, strict=True)
        ]
        assert same(whole, joined)
    assert not same(whole, take(data(clips, seed=1), 8, 0, 7))


def test_every_epoch_has_another_order_other_frames_crops_and_captions(good):
    clips = data(good, frames=4, size=32)
    epochs = [take(clips, 4, 3 * epoch, 3 * epoch + 3) for epoch in range(6)]
    orders = [[caption.split()[1] for batch in epoch for caption in batch.captions] for epoch in epochs]
    assert all(sorted(order, key=int) == [str(n) for n in range(12)] for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    words = {caption for epoch in epochs for batch in epoch for caption in batch.captions}
    assert len(words) > 20  # of 24: both alternatives come
    frames = torch.cat([batch.frames for epoch in epochs for batch in epoch]).flatten(1)
    assert len(frames.unique(dim=0)) > 60  # of 72; a small crop may be all of one colour


def test_frames_are_one_of_each_segment_and_a_short_clip_repeats_its_own(good, tmp_path):
    found = set()
    for batch in take(TrainingClips(good, 4, WHOLE, 0), 12, 0, 5):
        for clip in batch.frames:
            shown = numbers(clip)
            assert [number // 4 for number in shown] == [0, 1, 2, 3]
            found.add(tuple(shown))
    assert len(found) > 20
    write_video(tmp_path / "short.mp4", numbered(2))
    short = [replace(clip, source=str(tmp_path / "short.mp4")) for clip in good]
    assert numbers(take(TrainingClips(short, 4, WHOLE, 0), 2, 0, 1)[0].frames[0]) == [0, 0, 1, 1]
    part = [replace(clip, start=1.0, end=1.5) for clip in good]  # at 8 frames a second: 8 to 11
    assert numbers(take(TrainingClips(part, 4, WHOLE, 0), 2, 0, 1)[0].frames[0]) == [8, 9, 10, 11]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 200, 1000])
def test_an_order_holds_everything_once(count):
    orders = [tuple(shuffled(place, count, 7, epoch) for place in range(count)) for epoch in range(4)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    if count > 10:
        assert len(set(orders)) == 4 and orders[0] != tuple(range(count))


def test_an_order_favours_no_place():
    counts = torch.zeros(6, 6)
    for epoch in range(1200):
        for place in range(6):
            counts[place, shuffled(place, 6, 3, epoch)] += 1
    assert float(((counts - 200) ** 2 / 200).sum()) < 70  # chi squared of 25 degrees of freedom: 70 once in 200,000


def test_the_last_incomplete_batch_is_left_out(good):
    clips = data(good[:11])
    first, second = take(clips, 4, 0, 2), take(clips, 4, 2, 4)
    for epoch in (first, second):
        assert len({caption.split()[1] for batch in epoch for caption in batch.captions}) == 8
    with pytest.raises(CommandError, match="11 clips, fewer than one batch of 12"):
        batches(clips, 6, 0, 2, 0, 1, 0)


def test_a_clip_known_to_fail_is_not_tried_again_but_named_again(good, tmp_path, monkeypatch):
    read, tried = Clip.read, []
    monkeypatch.setattr(Clip, "read", lambda self, *a, **k: tried.append(self.key) or read(self, *a, **k))
    clips = [*good[:3], Clip("missing", str(tmp_path / "missing.mp4"), ("never",))]
    failed = [named for batch in take(data(clips), 2, 0, 6) for named in batch.failed]
    assert tried.count("missing") == 1
    assert [key for key, _ in failed].count("missing") >= 3 and "no such file" in failed[0][1]


def test_where_nothing_can_be_read_the_error_names_clips(tmp_path):
    clips = [Clip(f"missing{n}", str(tmp_path / f"{n}.mp4"), ("never",)) for n in range(300)]
    for workers in (0, 1):
        with pytest.raises(CommandError, match="none of the 100 clips.*missing") as error:
            take(data(clips), 2, 0, 1, workers=workers)
        assert "Traceback" not in str(error.value)


def test_the_global_random_state_is_left_alone(good):
    before = torch.get_rng_state()
    take(data(good), 4, 0, 3)
    assert torch.equal(before, torch.get_rng_state())


def test_synthetic_clips_are_all_different_and_a_function_of_the_step():
    clips = SyntheticClips(2, 16, 0)
    whole = take(clips, 4, 0, 3)
    assert same(whole[1:], take(SyntheticClips(2, 16, 0), 4, 1, 3, workers=2))
    frames = torch.cat([batch.frames for batch in whole])
    assert frames.shape == (12, 2, 3, 16, 16) and len(frames.flatten(1).unique(dim=0)) == 12
    assert len({caption for batch in whole for caption in batch.captions}) == 12


class Threads(Dataset):
    """Tells a worker's threads, or ends it."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal

    def __getitem__(self, step: int) -> int:
        if step == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.get_num_threads()


def test_workers_have_one_thread_and_their_death_is_an_error():
    assert list(in_order(Threads(-1), 0, 3, 2)) == [1, 1, 1]
    with pytest.raises(CommandError, match="decoding process died.*worker.*shared memory"):
        list(in_order(Threads(1), 0, 8, 2))


class Collections(Dataset):
    """Tells how much a worker's garbage collection found."""

    def __getitem__(self, step: int) -> int:
        return gc.collect()


HELD = threading.Lock()


class Locking(Dataset):
    """Takes a lock of this module."""

    def __getitem__(self, step: int) -> bool:
        with HELD:
            return True


@pytest.mark.timeout(60)
def test_a_lock_that_is_held_does_not_hold_up_workers():
    """As another thread's log message or decoder would hold one in the moment a worker starts."""
    with HELD:
        assert list(in_order(Locking(), 0, 2, 1)) == [True, True]


@pytest.mark.timeout(60)
def test_a_decoder_that_is_garbage_does_not_hold_up_workers(good):
    gc.disable()
    try:
        container = av.open(good[0].source)
        container.streams.video[0].thread_type = "AUTO"
        container.streams.video[0].codec_context.thread_count = 4
        cycle = [container, container.streams.video[0], next(container.decode(video=0))]
        cycle.append(cycle)
        del container, cycle
        assert len(list(in_order(Collections(), 0, 2, 1))) == 2
    finally:
        gc.enable()


@contextmanager
def decoding(folder, *arguments: str):
    """``workers.py`` in a process group of its own, and the ids of its workers."""
    script = Path(__file__).parent / "workers.py"
    environment = {**os.environ, "PYTHONPATH": str(script.parent.parent), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder[0]), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2, process.stderr.read()
        yield process, workers
    finally:
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_its_process(folder, how):
    """SIGKILL goes to the process alone, as from a memory killer; SIGINT to the whole group, as from a terminal."""
    with decoding(folder) as (process, workers):
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        process.wait(60)
        deadline = time.monotonic() + 60
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(alive, workers))


def test_workers_go_on_where_the_whole_group_is_asked_to_end(folder):
    """As a scheduler asks every process of a job: the training process ends its step first."""
    with decoding(folder, "go on") as (process, workers):
        os.killpg(process.pid, signal.SIGTERM)
        assert process.communicate(timeout=60)[1].strip() == "ended by itself"


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_skipped_keeps_the_first_reason_and_travels_as_json(tmp_path):
    skipped = Skipped()
    skipped.add("a", "x/a: is empty")
    skipped.add("a", "another reason")
    skipped.add("b", "x/b: is empty")
    other = Skipped()
    other.add("c", "no caption")
    skipped.merge(other)
    back = Skipped()
    back.load_state_dict(skipped.state_dict())
    assert back.reasons == skipped.reasons == {"a": "x/a: is empty", "b": "x/b: is empty", "c": "no caption"}
    assert skipped.report().splitlines() == ["3 skipped:", "  2: is empty: a, b", "  1: no caption: c"]
    assert "a and 1 more" in skipped.report(1) and len(skipped) == 3


def test_few_bad_clips_at_the_start_stop_nothing_unless_none_is_allowed():
    skipped = Skipped()
    skipped.check(100, 0.0)
    skipped.add("a", "is empty")
    skipped.check(4, 0.1)
    skipped.check(400, 0.001)
    with pytest.raises(TooManySkipped, match="1 of 4 clips"):
        skipped.check(4, 0.0)
    for key in "bc":
        skipped.add(key, "is empty")
    skipped.check(4, 0.1)
    skipped.check(20, 0.1, listed=1)
    with pytest.raises(TooManySkipped, match="(?s)3 of 20 clips.*a, b, c"):
        skipped.check(20, 0.1)


def test_kinds_of_files_are_what_they_are_called(tmp_path):
    """What the tests above rest on: of a cut file frames are left, of the broken ones none."""
    for kind, path in write_kinds(tmp_path / "kinds").items():
        clip = Clip(kind, str(path), ("",))
        if kind.startswith(("good", "cut")):
            assert clip.read(2, repeat=True).total > 0
        else:
            with pytest.raises(ValueError, match="."):
                clip.read(2, repeat=True)
