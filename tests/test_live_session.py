"""Questions about live streams: sessions used from several threads, and the command ``bt-adapter live``."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch
from chat_models import make_chat as make_family_chat
from live_streams import streaming, transport_stream
from test_answer import make_engine

from bt_adapter.chat import session as terminal
from bt_adapter.chat.attach import attach
from bt_adapter.chat.conversation import ContextError
from bt_adapter.chat.engine import VideoChat
from bt_adapter.commands import cli
from bt_adapter.data import write_video
from bt_adapter.errors import CommandError
from bt_adapter.live import run
from bt_adapter.live import session as sessions
from bt_adapter.live.session import LiveSession, SessionClosed
from bt_adapter.live.settings import LiveChat

QUESTION = "left or right ?"


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    chat = make_engine()
    chat.branch.trained_steps = 4
    return chat


@pytest.fixture
def clock(monkeypatch):
    """The session's clock, which stands still until ``clock.now`` is set."""
    clock = SimpleNamespace(now=100.0, perf_counter=time.perf_counter, monotonic=lambda: clock.now)
    monkeypatch.setattr(sessions, "time", clock)
    return clock


def frames(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 20, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("branch", [True, False])
def test_answers_are_those_about_the_last_frames(chat, branch):
    clip = frames(7)
    with LiveSession(chat, branch=branch) as session:
        for number, frame in enumerate(clip):
            session.push(frame, number / 2)
        live = session.ask(QUESTION, 6)
        again = session.ask(QUESTION, 6)
    expected = chat.ask(chat.encode(clip[3:], branch=branch), QUESTION, 6)
    assert live.reply.text == again.reply.text == expected.text
    assert (live.view.frames, live.view.span) == (4, (1.5, 3.0))
    assert live.reply.prompt == expected.prompt


def test_frames_arrive_while_an_answer_is_generated(chat, clock):
    clip = frames(12)
    session = LiveSession(chat, idle=20)
    for number, frame in enumerate(clip[:6]):
        session.push(frame, number)
    expected = session.ask(QUESTION, 6)
    begun, go_on, replies = threading.Event(), threading.Event(), []

    def wait(_: str) -> None:
        begun.set()
        assert go_on.wait(10)

    asker = threading.Thread(target=lambda: replies.append(session.ask(QUESTION, 6, wait)))
    asker.start()
    assert begun.wait(10)
    clock.now += 30
    assert not session.closed  # it is not idle
    for number, frame in enumerate(clip[6:], 6):
        session.push(frame, number)
    go_on.set()
    asker.join()
    assert replies[0].reply.text == expected.reply.text
    assert replies[0].view.span == (2, 5)
    assert session.ask(QUESTION, 2).view.span == (8, 11)


def test_many_threads_push_and_ask(chat):
    clip, errors = frames(40), []
    lock = threading.Lock()
    pair = [LiveSession(chat, window, model_lock=lock) for window in ("sliding", "whole")]
    expected = {}
    for session in pair:
        for frame in clip:
            session.push(frame, 0.0)
        expected[session] = session.ask(QUESTION, 4).reply.text

    def use(session: LiveSession) -> None:
        try:
            for _ in range(3):
                assert session.ask(QUESTION, 4).reply.text == expected[session]
        except BaseException as error:
            errors.append(error)

    def push(session: LiveSession) -> None:
        try:
            for frame in clip[:5]:
                session.push(frame, 0.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=(session,)) for session in pair for _ in range(2)]
    other = LiveSession(chat, model_lock=lock)
    threads += [threading.Thread(target=push, args=(other,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert other._video.kept == 15


def test_idle_and_closed_sessions(chat, clock):
    session = LiveSession(chat, idle=15)
    size = session.nbytes
    assert session.push(frames(1)[0])
    assert session.nbytes == size > 0
    for _ in range(3):
        clock.now += 10
        session.push(frames(1)[0])  # used, so not idle
    assert not session.closed
    assert session._video.span == (0.0, 30.0)  # seconds since it was made
    clock.now += 16
    with pytest.raises(SessionClosed, match="begin another one"):
        session.ask(QUESTION)
    assert session.closed
    assert session.nbytes == 0
    other = LiveSession(chat)
    clock.now += 1e6
    with pytest.raises(ValueError, match="no frame was pushed yet"):
        other.ask(QUESTION)
    other.close()
    with pytest.raises(SessionClosed):
        other.push(frames(1)[0])


def test_closing_waits_for_no_frame(chat, monkeypatch):
    session, begun, go_on, kept = LiveSession(chat, idle=15), threading.Event(), threading.Event(), []
    run_tower = chat.branch.tower.run

    def wait(*arguments):
        begun.set()
        assert go_on.wait(20)
        return run_tower(*arguments)

    monkeypatch.setattr(chat.branch.tower, "run", wait)
    pusher = threading.Thread(target=lambda: kept.append(session.push(frames(1)[0])))
    pusher.start()
    assert begun.wait(20)
    assert not session.closed
    assert session.nbytes > 0
    session.close()
    assert session.closed
    assert pusher.is_alive()
    go_on.set()
    pusher.join()
    assert kept == [True]  # the call in progress was finished
    with pytest.raises(SessionClosed):
        session.push(frames(1)[0])


def test_a_question_that_does_not_fit_leaves_the_session_usable():
    chat = make_engine(context=64)
    session = LiveSession(chat)
    session.push(frames(1)[0], 0)
    with pytest.raises(ContextError):
        session.ask(QUESTION, 100)
    assert session.ask(QUESTION, 2).reply.tokens == 2
    assert session._asking == 0


def test_models_and_arguments_that_are_refused(chat):
    for idle in (0, "soon", float("nan")):
        with pytest.raises(ValueError, match=f"idle must be a number above 0, but is {idle!r}"):
            LiveSession(chat, idle=idle)
    with pytest.raises(ValueError, match="window must be"):
        LiveSession(chat, "last")
    vip = make_family_chat("vipllava")
    with pytest.raises(ValueError, match="several layers of its tower"):
        LiveSession(VideoChat(attach(vip, None), chat.tokenizer))


def run_command(chat, monkeypatch, capsys, *words: str) -> tuple[int, list[str], str]:
    monkeypatch.setattr(run, "load", lambda command: chat)
    code = cli.main(["live", *words, "--dtype", "float32", "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_command_answers_about_a_file_at_its_own_pace(chat, monkeypatch, capsys, tmp_path):
    write_video(tmp_path / "clip.mp4", frames(30).repeat(1, 1, 2, 2), fps=25)
    begin = time.monotonic()
    code, out, err = run_command(
        chat, monkeypatch, capsys, str(tmp_path / "clip.mp4"), QUESTION, "--every", "500ms", "--fps", "12.5",
        "--window", "whole",
    )  # fmt: skip
    assert time.monotonic() - begin > 1.0
    assert code == 0
    times = [float(line.partition(" s: ")[0]) for line in out]
    assert times[0] >= 0.48
    assert times == sorted(times)
    assert times[-1] >= 1.0  # once more at the end
    assert "of 30 · " in err
    assert "0 clock jumps" in err
    assert f"{len(out)} answers" in err


def test_command_reads_a_stream_until_it_has_its_answers(chat, monkeypatch, capsys):
    given, make_source = [], run.LiveSource
    monkeypatch.setattr(run, "LiveSource", lambda *options: given.append(options[-1]) or make_source(*options))
    with streaming(transport_stream(1500)) as streamer:  # a minute, as a busy machine answers slowly
        code, out, err = run_command(
            chat,
            monkeypatch,
            capsys,
            streamer.url,
            QUESTION,
            "--every",
            "0.4",
            "--answers",
            "2",
            "--fps",
            "10",
            "--pace",
        )
    assert code == 0
    assert len(out) == 2
    assert "frames from" in err
    assert "source lost 0 times" in err
    assert given == [True]


def test_command_refuses(monkeypatch, capsys, chat, tmp_path):
    def said(*words: str) -> str:
        code, out, err = run_command(chat, monkeypatch, capsys, *words)
        assert code == 2
        assert out == []
        return err

    assert "no such file" in said(str(tmp_path / "none.mp4"), QUESTION)
    assert "its scheme is 'gopher'" in said("gopher://host", QUESTION)
    assert "--every must be a time above 0, such as 2s or 500ms, got 2 days" in said("a.mp4", "x", "--every", "2 days")
    assert "--every must be a time above 0" in said("a.mp4", "x", "--every", "0s")
    assert "--source-option must be NAME=VALUE, got size" in said("a.mp4", "x", "--source-option", "size")
    assert "--fps must be" in said("a.mp4", "x", "--fps", "0")
    assert "the question is empty" in said("a.mp4", " ")
    assert "--model llava needs --branch" in said("a.mp4", "x", "--model", "llava")


def test_durations_and_options():
    for text, seconds in (("2", 2.0), ("2s", 2.0), ("500ms", 0.5), (".5 s", 0.5), ("1.5m", 90.0), ("1h", 3600.0)):
        assert LiveChat(source="a", question="b", every=text).period == seconds
    for text in ("", "s", "-1", "1d", "inf", "nan"):
        with pytest.raises(CommandError, match="--every"):
            _ = LiveChat(source="a", question="b", every=text).period
    options = LiveChat(source="a", question="b", source_option=("video_size=640x480", "a=b=c")).options
    assert options == {"video_size": "640x480", "a": "b=c"}
    command = LiveChat(source="a", question="b", model="m", branch="n", long="published", no_branch=True)
    assert (command.chat_model.model, command.chat_model.branch) == ("m", "n")
    assert terminal.sampling_of(command.chat_model).long == "published"
    assert terminal.sampling_of(command.chat_model).branch is False
