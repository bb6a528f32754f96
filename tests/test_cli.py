"""The command line: errors are one line, answers are streamed."""

import subprocess
import sys

import pytest
import torch
from test_chat import mini_is_there

import bt_adapter
from bt_adapter.commands import cli
from bt_adapter.data import write_video


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A white square that moves right over ten frames."""
    frames = torch.zeros(10, 3, 96, 96, dtype=torch.uint8)
    for t in range(10):
        frames[t, :, 36:60, 6 * t : 6 * t + 24] = 255
    path = tmp_path_factory.mktemp("clips") / "square.mp4"
    write_video(path, frames, fps=5)
    return path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.mp4", None, "no such file"),
        ("empty.mp4", b"", "empty"),
        ("text.mp4", b"this is no video, it only has the name of one\n" * 40, "text.mp4"),
    ],
)
def test_bad_files_are_one_line_and_exit_2(capsys, tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    code, out, err = run(capsys, "chat", "--video", str(path), "How is it moving?")
    assert code == 2 and out == ""
    assert message in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("bt-adapter: ")


def test_bad_arguments_are_one_line_and_exit_2(capsys, clip, tmp_path):
    for arguments, message in (
        (("--frames", "0"), "--frames"),
        (("--max-new-tokens", "-1"), "--max-new-tokens"),
        (("--model", str(tmp_path)), "--branch"),
        (("--device", "cuda:99" if not torch.cuda.is_available() else "nodevice"), "--device"),
    ):
        code, out, err = run(capsys, "chat", "--video", str(clip), *arguments, "How?")
        assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err
    assert run(capsys, "chat", "--video", str(clip), " ")[0] == 2
    assert run(capsys, "chat", "--video", str(tmp_path), "How?")[0] == 2


def test_unknown_commands_exit_2(capsys):
    for arguments in ((), ("dance",), ("mini", "clip"), ("chat", "--video")):
        with pytest.raises(SystemExit) as exit:
            cli.main(list(arguments))
        assert exit.value.code == 2
        assert "Traceback" not in capsys.readouterr().err


def test_faults_of_the_program_are_not_hidden(monkeypatch, clip):
    def broken(command):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.chat, "run", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["chat", "--video", str(clip), "How?"])


def test_nothing_heavy_is_imported_before_the_arguments_are_read():
    heavy = "('torch', 'av', 'transformers')"
    told = f"import sys, bt_adapter.commands.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", told], capture_output=True, text=True).stdout.strip() == "[]"


def test_help_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "bt_adapter.commands", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and all(name in done.stdout for name in ("chat", "demo", "tune"))


@pytest.mark.parametrize("command", ["pretrain", "tune", "answer", "eval qa", "eval retrieval"])
def test_help_groups_the_options(command, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command.split(), "--help"])
    told = capsys.readouterr().out
    titles = ("data", "model", "optimisation", "run") if command in ("pretrain", "tune") else ("data", "model", "run")
    places = [told.index(f" {title} options ") for title in titles]
    assert exit.value.code == 0 and places == sorted(places)
    assert ("--config FILE" in told) == (command in ("pretrain", "tune"))


def test_version(capsys):
    assert run(capsys, "--version")[:2] == (0, f"bt-adapter {bt_adapter.__version__}\n")


def test_chat_end_to_end_on_the_small_stack(capsys, clip):
    if reason := mini_is_there():
        pytest.skip(reason)
    code, out, err = run(capsys, "chat", "--video", str(clip), "How is it moving?", "--max-new-tokens", "12")
    assert code == 0 and out.strip()
    for part in ("8 of 10 frames", "load", "decode", "encode", "first token", "tokens/s", "peak memory"):
        assert part in " ".join(err.split())
    code, without, _ = run(capsys, "chat", "--video", str(clip), "How is it moving?", "--no-branch")
    assert code == 0 and without.strip()


def test_chat_about_fewer_frames_than_asked(capsys, tmp_path):
    path = tmp_path / "one.mp4"
    write_video(path, torch.full((1, 3, 64, 64), 90, dtype=torch.uint8))
    code, _, err = run(capsys, "chat", "--video", str(path), "--no-repeat", "What is it?")
    assert code == 2 and "8 frames were asked for, but there are only 1; ask for fewer (--frames 1), or" in " ".join(
        err.split()
    )
    assert "(--repeat)" in err and "repeat=True" not in err
    if reason := mini_is_there():
        pytest.skip(reason)
    code, out, err = run(capsys, "chat", "--video", str(path), "What is it?", "--repeat")
    assert code == 0 and out.strip() and "8 of 1 frames" in " ".join(err.split())
