"""Lists answered by several processes, killed and gone on with by another number of them; videos decoded ahead."""

import errno
import json
import os
import signal
import threading
import time
from pathlib import Path

import processes
import pytest
import torch
from test_answer import chat, folder, make_engine, run_all  # noqa: F401 (fixtures)

from bt_adapter.chat import ahead, answer
from bt_adapter.chat.questions import Question
from bt_adapter.chat.watch import Sampling, watch
from bt_adapter.commands import cli
from bt_adapter.data import VideoError, patience
from bt_adapter.data.patience import StorageError
from bt_adapter.data.stream import FrameStream
from bt_adapter.files import Rows

OPTIONS = ("--frames", "4", "--max-new-tokens", "6", "--batch-size", "2", "--device", "cpu", "--dtype", "float32")


def work(rank: int, world: int, arguments: tuple[str, ...], kill: tuple[int, int] | None) -> None:
    """The command in one of several processes; kill: the process of that rank dies at its write of that number."""
    answer.load = lambda command: make_engine()  # type: ignore[assignment]
    real, written = Rows._write, []

    def write(self, data):
        written.append(data)
        if kill == (rank, len(written)):
            real(self, data[: len(data) // 2])
            time.sleep(1.0)  # the others go on meanwhile
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, data)

    Rows._write = write  # type: ignore[method-assign]
    code = cli.main(list(arguments))
    assert code == 0, code


def read(path: Path) -> dict[str, str]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in found}) == len(found)  # nothing is there twice
    return {row["id"]: row["prediction"] for row in found}


@pytest.fixture(scope="module")
def expected(chat, folder):  # noqa: F811
    run_all(chat, folder, folder / "alone.jsonl")
    return read(folder / "alone.jsonl")


def command(folder: Path, out: Path) -> tuple[str, ...]:  # noqa: F811
    return ("answer", str(folder / "questions.jsonl"), "--videos", str(folder), "--out", str(out), *OPTIONS)


def test_two_processes_answer_as_one(folder, expected, tmp_path):  # noqa: F811
    out = tmp_path / "answers [1].jsonl"
    processes.run(tmp_path / "run", 2, work, command(folder, out), None)
    assert read(out) == expected and sorted(p.name for p in tmp_path.glob("ans*")) == [
        out.name,
        out.name + ".about.json",
    ]
    first, second = ((tmp_path / "run" / f"rank{rank}.log").read_text() for rank in range(2))
    assert "7 of 10 questions answered" in first and "q7 (broken.mp4)" in first and "q5 (none.mp4)" in first
    assert "answered" not in second and "skipped" not in second


@pytest.mark.parametrize(("kill", "worlds"), [((1, 1), (1,)), ((1, 2), (3,)), ((0, 1), (2,))])
def test_a_killed_run_goes_on_with_another_number_of_processes(folder, expected, tmp_path, kill, worlds):  # noqa: F811
    out = tmp_path / "answers.jsonl"
    with pytest.raises(AssertionError, match="ended with"):
        processes.run(tmp_path / "killed", 2, work, command(folder, out), kill)
    left = [path for path in tmp_path.glob("answers.jsonl*") if not path.name.endswith(".about.json")]
    kept = sum(path.read_bytes().count(b"\n") for path in left)
    for number, world in enumerate(worlds):
        processes.run(tmp_path / f"again{number}", world, work, command(folder, out), None)
    assert read(out) == expected and kept < len(expected)
    assert not list(tmp_path.glob("answers.jsonl.part*"))
    if kept:
        assert f"resuming after {kept} of 10 answers" in (tmp_path / "again0" / "rank0.log").read_text()


def test_parts_made_otherwise_are_refused_by_every_process(folder, tmp_path):  # noqa: F811
    out = tmp_path / "answers.jsonl"
    with Rows(tmp_path / "answers.jsonl.part1", {"model": "another"}) as part:
        part.append([{"id": "1", "video": "a.mp4", "question": "how ?", "prediction": "left"}])
    with pytest.raises(AssertionError, match="part1 was made with"):
        processes.run(tmp_path / "run", 2, work, command(folder, out), None)
    assert (tmp_path / "answers.jsonl.part1").read_bytes().count(b"\n") == 1


def test_a_benchmark_is_answered_by_two_processes_and_scored_by_one(folder, tmp_path):  # noqa: F811
    asked = [{"video_name": name, "Q": "how ?", "A": "left"} for name in ("a", "b", "c", "broken")]
    (tmp_path / "generic_qa.json").write_text(json.dumps(asked))
    arguments = ("eval", "qa", "--data", str(tmp_path / "generic_qa.json"), "--videos", str(folder))
    processes.run(tmp_path / "run", 2, work, (*arguments, "--out", str(tmp_path / "qa"), *OPTIONS), None)
    scores = json.loads((tmp_path / "qa" / "scores.json").read_text())
    assert scores["answered"] == 3 and set(scores["skipped"]) == {"4 (broken)"}
    assert scores["made"]["dtype"] == "float32"
    assert len(json.loads((tmp_path / "qa" / "predictions.json").read_text())) == 3


# --- videos decoded ahead


def prepare(chunk):
    return chunk.float()


def test_what_is_decoded_ahead_is_what_watching_sees(chat, folder):  # noqa: F811
    sampling = Sampling(frames=4)
    with ahead.DecodedAhead(sampling.open, lambda chunk: chat.prepare(chunk)[0], 1) as decoded:
        seen = watch(chat, decoded.take(folder / "a.mp4"), sampling)
    plain = watch(chat, folder / "a.mp4", sampling)
    assert torch.equal(seen.tokens, plain.tokens)
    assert (seen.frames, seen.total, seen.name, seen.truncated) == (4, 9, plain.name, False)


def test_the_next_videos_are_decoded_while_one_is_watched(chat, folder, tmp_path, monkeypatch):  # noqa: F811
    begun = {name: threading.Event() for name in ("a.mp4", "b.mp4", "c.mp4")}
    real = Sampling.open

    def opened(self, path):
        begun[Path(path).name].set()
        return real(self, path)

    def watched(chat, video, sampling, room):  # waits, in the model's place, for the video after this one
        later = {"a.mp4": "b.mp4", "b.mp4": "c.mp4"}.get(video.path.name)
        assert later is None or begun[later].wait(20)
        return watch(chat, video, sampling, room=room)

    monkeypatch.setattr(Sampling, "open", opened)
    monkeypatch.setattr(answer, "watch", watched)
    asked = [Question(name, folder / name, "how ?") for name in begun]
    with Rows(tmp_path / "out.jsonl", {}) as file:
        answer.answer_all(chat, asked, file, Sampling(frames=4), 1, 4, workers=1)
        assert set(file.done) == set(begun)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decoding")]


class Slow:
    """Stands for an open video of many chunks."""

    path, total, truncated = "many.mp4", 50, False

    def __len__(self):
        return 50

    def __iter__(self):
        for number in range(50):
            yield torch.full((1, 3, 2, 2), number, dtype=torch.uint8)


def test_no_more_is_decoded_than_is_held(monkeypatch):
    monkeypatch.setattr(Sampling, "open", lambda self, path: Slow())
    counted = []
    video = ahead.DecodedVideo(Path("many.mp4"), Sampling().open, lambda chunk: counted.append(1) or chunk)
    assert len(video) == video.total == 50
    chunks = iter(video)
    for number in range(5):
        assert next(chunks)[0, 0, 0, 0] == number
        time.sleep(0.05)
        assert len(counted) <= number + 1 + 3
    video.close()
    video.thread.join(5)
    assert not video.thread.is_alive() and len(counted) < 15


def test_storage_that_fails_on_the_way_loses_and_repeats_no_frame(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    real, failures = FrameStream.__iter__, iter([OSError(errno.ESTALE, "stale"), OSError(errno.ESTALE, "stale")])

    def failing(self):
        for number, chunk in enumerate(real(self)):
            if number == 2 and (error := next(failures, None)) is not None:
                raise error
            yield chunk

    plain = torch.cat(list(FrameStream(folder / "a.mp4", chunk=2)))
    monkeypatch.setattr(FrameStream, "__iter__", failing)
    monkeypatch.setattr(Sampling, "open", lambda self, path: FrameStream(path, chunk=2))
    found = torch.cat(list(ahead.DecodedVideo(folder / "a.mp4", Sampling().open, prepare)))
    assert torch.equal(found, plain.float())


@pytest.mark.parametrize("error", [MemoryError("much"), RuntimeError("odd"), ZeroDivisionError("x"), IndexError("y")])
def test_whatever_a_file_provokes_leaves_out_that_file(chat, folder, tmp_path, monkeypatch, error):  # noqa: F811
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    real = Sampling.open

    def opened(self, path):
        if Path(path).name == "b.mp4":
            raise error
        return real(self, path)

    monkeypatch.setattr(Sampling, "open", opened)
    skipped, found = run_all(chat, folder, tmp_path / "out.jsonl")
    assert {row["video"] for row in found} == {"a.mp4", "a", "c", "c.mp4"}
    assert "b.mp4: " in skipped.reasons["q3 (b.mp4)"] and str(error) in skipped.reasons["q3 (b.mp4)"]


def test_storage_that_keeps_failing_stops_the_run_and_keeps_its_answers(chat, folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(patience, "WAITS", (0.0,))
    real = Sampling.open

    def opened(self, path):
        if Path(path).name == "b.mp4":
            raise OSError(errno.EMFILE, "too many open files")
        return real(self, path)

    monkeypatch.setattr(Sampling, "open", opened)
    with pytest.raises(StorageError, match="b.mp4: cannot be read"):
        run_all(chat, folder, tmp_path / "out.jsonl", batch=1)
    assert set(read(tmp_path / "out.jsonl")) == {"1", "q1"}


def test_an_error_is_told_to_who_asks_for_a_length(folder):  # noqa: F811
    video = ahead.DecodedVideo(folder / "broken.mp4", Sampling().open, prepare)
    with pytest.raises(VideoError, match="broken.mp4"):
        len(video)
