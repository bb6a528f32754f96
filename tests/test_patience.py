"""Errors of storage and system are waited for and then stop a run; errors of a file leave out that file alone."""

from __future__ import annotations

import errno
import io
import os
import resource
from collections import Counter
from dataclasses import dataclass, fields

import av
import pytest
import torch
from av.error import err_check
from PIL import Image
from video_files import numbered

from bt_adapter.data import TrainTransform, VideoError, patience, read_image, read_video, write_video
from bt_adapter.data.clips import Clip, Member
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.data.loading import TrainingClips, batches
from bt_adapter.data.patience import StorageError, read_patiently
from bt_adapter.data.shards import write_shards
from bt_adapter.data.stream import FrameStream
from bt_adapter.errors import CommandError
from bt_adapter.eval.features import ClipFrames, Look
from bt_adapter.tune.batches import VisualReader
from bt_adapter.tune.conversations import Source

PASSING = [errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ETIMEDOUT, errno.ENOTCONN]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """How long was waited; nothing is."""
    waited = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    return waited


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("patience") / "clip.mp4"
    write_video(path, numbered(8))
    return path


class Failing:
    """Raises the errors given, one a call, and then returns 7."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.calls = list(errors), 0

    def __call__(self) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def wrapped(error: BaseException) -> VideoError:
    """A VideoError that was raised from another error."""
    wrapper = VideoError("clip.mp4: cannot be read as a video file")
    wrapper.__cause__ = error
    return wrapper


@pytest.mark.parametrize("number", PASSING)
@pytest.mark.parametrize("how", [lambda error: error, wrapped])
def test_an_error_of_the_system_is_waited_for(number, how, waits):
    read = Failing(*(how(OSError(number, os.strerror(number))) for _ in range(3)))
    assert read_patiently("clip.mp4", read) == 7 and read.calls == 4
    assert waits == list(patience.WAITS[:3]) and waits == sorted(waits)


@pytest.mark.parametrize("number", PASSING)
def test_an_error_of_the_system_that_stays_stops_the_run(number):
    read = Failing(*[OSError(number, os.strerror(number))] * 100)
    with pytest.raises(StorageError, match=f"clip.mp4: cannot be read .{os.strerror(number)}.*not skipped") as error:
        read_patiently("clip.mp4", read)
    assert read.calls == len(patience.WAITS) + 1
    assert isinstance(error.value, CommandError) and not isinstance(error.value, VideoError)
    if number == errno.EMFILE:
        assert "ulimit -n" in str(error.value)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"), FileNotFoundError(errno.ENOENT, "No such file"),
        VideoError("clip.mp4: holds no video"), ValueError("odd"), IndexError("list index"), RuntimeError("odd"),
        OverflowError("too large"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ZeroDivisionError("zero"),
        AssertionError(), RecursionError("deep"), EOFError(), KeyError("name"), SyntaxError("broken PNG file"),
    ],
)  # fmt: skip
def test_any_other_error_is_the_files_own(error, waits):
    read = Failing(error)
    with pytest.raises(VideoError, match="clip.mp4: ") as raised:
        read_patiently("clip.mp4", read)
    assert read.calls == 1 and waits == []
    assert type(error).__name__ in str(raised.value) or isinstance(error, VideoError | OSError)


@pytest.mark.parametrize("error", [TypeError("an argument"), AttributeError("a name"), NameError("a name")])
def test_a_mistake_of_the_program_is_no_files(error, video, tmp_path, monkeypatch):
    def mistaken(self, *arguments, **options):
        raise error

    with pytest.raises(type(error)):
        read_patiently("clip.mp4", Failing(error))
    monkeypatch.setattr(Clip, "read", mistaken)
    with pytest.raises(type(error)):
        write_shards(clips_of(video), tmp_path / "out", 3)
    monkeypatch.setattr("bt_adapter.data.images._pixels", mistaken)
    with pytest.raises(type(error)):
        read_image(video)


def test_an_error_inside_a_parser_is_the_files(video):
    def parse():
        av.open(str(video), options=7)  # PyAV's own TypeError or AttributeError

    with pytest.raises(VideoError, match="clip.mp4: cannot be read .(Type|Attribute)Error"):
        read_patiently(video, parse)


class Disk(io.FileIO):
    """A file of which storage fails to give what is behind a place, so many times."""

    place, failures = 0, 0

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() + (size or 0) > Disk.place and Disk.failures > 0:
            Disk.failures -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
@pytest.mark.parametrize("frames", [None, 3])
def test_storage_that_fails_inside_a_file_is_not_its_end(tmp_path, monkeypatch, suffix, frames):
    """FFmpeg itself goes on as if the file ended there."""
    path = tmp_path / f"clip.{suffix}"
    pictures = torch.randint(256, (30, 3, 96, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    write_video(path, pictures, codec="mpeg4" if suffix == "avi" else "libx264", options={})
    expected = read_video(path, frames)
    assert not expected.truncated
    monkeypatch.setattr("bt_adapter.data._source.open", lambda name, *a, **k: Disk(name), raising=False)
    Disk.place, Disk.failures = path.stat().st_size * 2 // 3, 2
    found = read_patiently(path, read_video, path, frames)
    assert Disk.failures == 0 and torch.equal(found.frames, expected.frames) and not found.truncated
    Disk.failures = 2
    stream = read_patiently(path, FrameStream, path, frames)
    assert Disk.failures == 0 and stream.total == expected.total and not stream.truncated
    Disk.failures = 1000
    with pytest.raises(StorageError, match=f"clip.{suffix}: cannot be read"):
        read_patiently(path, read_video, path, frames)


def test_memory_is_tried_again_and_then_the_file_is_named():
    for error in (
        MemoryError("Unable to allocate 4.47 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert read_patiently("clip.mp4", Failing(error)) == 7
        with pytest.raises(VideoError, match="clip.mp4: not enough memory to read it"):
            read_patiently("clip.mp4", Failing(*[error] * 100))


def test_what_stops_a_run_by_itself_is_passed_on():
    for error in (KeyboardInterrupt(), CommandError("none of 3 clips"), OSError(errno.ENOSPC, "No space left")):
        read = Failing(error)
        with pytest.raises(type(error)) as raised:
            read_patiently("clip.mp4", read)
        assert raised.value is error and read.calls == 1


def of_ffmpeg(number: int) -> Exception:
    try:
        err_check(-number, "clip.mp4")
    except Exception as error:
        return error
    raise AssertionError("no error")


def test_an_input_error_of_ffmpeg_is_the_files_where_its_bytes_can_be_read(video, tmp_path, monkeypatch):
    """FFmpeg calls it an input error too where a file breaks off."""
    with pytest.raises(VideoError):
        read_patiently(video, Failing(*[wrapped(of_ffmpeg(errno.EIO))] * 100))
    assert read_patiently(video, Failing(of_ffmpeg(errno.EIO))) == 7
    monkeypatch.setattr(patience, "_unreadable", lambda path: OSError(errno.EIO, "Input/output error"))
    with pytest.raises(StorageError):
        read_patiently(video, Failing(*[wrapped(of_ffmpeg(errno.EIO))] * 100))
    monkeypatch.setattr(patience, "_unreadable", lambda path: PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(VideoError):
        read_patiently(video, Failing(wrapped(of_ffmpeg(errno.EIO))))


TRIED: Counter[str] = Counter()


@dataclass(frozen=True)
class FailingClip(Clip):
    """A clip whose first reads in a process fail, as where other programs have all files open."""

    number: int = 0
    times: int = 0

    def read(self, *arguments, **options):
        TRIED[self.key] += 1
        if TRIED[self.key] <= self.times:
            raise OSError(self.number, os.strerror(self.number))
        return super().read(*arguments, **options)

    def __reduce__(self):
        return unpacked, tuple(getattr(self, field.name) for field in fields(self))


def unpacked(*values) -> FailingClip:
    """A clip in a worker process, which does not wait either."""
    patience.WAITS = (0.01,) * len(patience.WAITS)
    return FailingClip(*values)


def clips_of(video, count: int = 6, number: int = 0, times: int = 0) -> list[Clip]:
    TRIED.clear()
    return [FailingClip(f"clip{n}", str(video), (f"first {n}", f"second {n}"), None, None, None, number, times)
            for n in range(count)]  # fmt: skip


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_passing_error_changes_no_batch(video, monkeypatch, number):
    monkeypatch.setattr(patience, "WAITS", (0.01,) * 5)

    def take(workers, times):
        data = TrainingClips(clips_of(video, number=number, times=times), 3, TrainTransform(16), 5)
        return list(batches(data, 2, 0, 1, 0, 6, workers))

    expected = take(0, 0)
    for workers in (0, 1):
        found = take(workers, 2)
        assert workers or min(TRIED.values()) > 2
        assert all(torch.equal(a.frames, b.frames) for a, b in zip(found, expected, strict=True))
        assert [batch.captions for batch in found] == [batch.captions for batch in expected]
        assert not any(batch.failed for batch in found)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_stays_stops_training_evaluation_and_shards_in_one_line(video, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(patience, "WAITS", (0.01,) * 2)
    clips = clips_of(video, number=errno.ESTALE, times=1000)
    with pytest.raises(StorageError, match=os.strerror(errno.ESTALE)) as error:
        list(batches(TrainingClips(clips, 3, TrainTransform(16), 5), 2, 0, 1, 0, 6, workers))
    assert "Traceback" not in str(error.value)
    with pytest.raises(StorageError):
        ClipFrames(clips, Look(3), ImageSettings(16), 2)[0]
    with pytest.raises(StorageError, match="not skipped"):
        write_shards(clips, tmp_path / "out", 3, workers=workers)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize(
    "error", [MemoryError("4.47 GiB"), OverflowError("odd"), RuntimeError("odd"), IndexError("odd")]
)
def test_whatever_a_file_provokes_leaves_out_that_file_alone(video, tmp_path, monkeypatch, error):
    read = Clip.read

    def failing(self, *arguments, **options):
        if self.key == "clip3":
            raise error
        return read(self, *arguments, **options)

    monkeypatch.setattr(Clip, "read", failing)
    clips = clips_of(video)
    failed = [f for b in batches(TrainingClips(clips, 3, TrainTransform(16), 5), 2, 0, 1, 0, 3, 0) for f in b.failed]
    assert {key for key, _ in failed} == {"clip3"}
    decoded = ClipFrames(clips, Look(3), ImageSettings(16), 6)[0]
    assert decoded.places == [0, 1, 2, 4, 5] and [place for place, _ in decoded.failed] == [3]
    assert set(write_shards(clips, tmp_path / "out", 3).reasons) == {"clip3"}


def test_all_files_being_open_for_a_moment_leaves_no_clip_out(video, monkeypatch):
    """The limit itself, not a stand-in for it: it is reached, and let go of while the reader waits."""
    held = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for path in (video, Member(str(video), 0, video.stat().st_size, "clip.mp4")):
        read = Clip("clip", path if isinstance(path, Member) else str(path)).read
        monkeypatch.setattr(patience.time, "sleep", lambda seconds: [os.close(held.pop()) for _ in range(8) if held])
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            while True:
                try:
                    held.append(os.open(os.devnull, os.O_RDONLY))
                except OSError:
                    break
            assert read_patiently(str(video), read, 3).total == 8
        finally:
            for number in held:
                os.close(number)
            held.clear()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tuning_waits_for_videos_and_stills(video, tmp_path, monkeypatch):
    from bt_adapter.tune import batches as module

    still = tmp_path / "still.png"
    Image.new("RGB", (20, 20)).save(still)
    for name, original, source in (
        ("read_video", module.read_video, Source(str(video), "video")),
        ("read_image", read_image, Source(str(still), "image")),
    ):
        attempts = Failing(OSError(errno.EMFILE, "Too many open files"), MemoryError("no room"))
        monkeypatch.setattr(module, name, lambda *a, o=original, f=attempts, **k: (f(), o(*a, **k))[1])
        assert VisualReader(16, 2)(source).shape[-2:] == (16, 16) and attempts.calls == 3
        monkeypatch.setattr(module, name, original)


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.ENOTCONN])
def test_a_file_of_which_the_system_cannot_tell_is_not_taken_for_missing(video, monkeypatch, number):
    """A reader that asks whether a file is there hears "no" where the mount does not answer."""
    stat, failing = os.stat, [OSError(number, os.strerror(number)) for _ in range(2)]

    def refused(path, **options):
        if failing and str(path) == str(video):
            raise failing.pop()
        return stat(path, **options)

    monkeypatch.setattr(os, "stat", refused)
    clip = Clip("clip", str(video))
    assert read_patiently(str(video), clip.read, 3).total == 8 and not failing
