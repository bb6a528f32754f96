"""What users wrote is shown as they wrote it, and an encoding that lacks a character ends no command."""

import ast
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from test_answer import chat, folder  # noqa: F401 (fixtures)

import bt_adapter
from bt_adapter import progress as terminal
from bt_adapter.chat import answer, session
from bt_adapter.chat.conversation import Conversation
from bt_adapter.chat.watch import Sampling
from bt_adapter.commands import cli
from bt_adapter.training.log import Log

NAMES = [
    "cats [official video].mp4",
    "[INST] x [",
    "[red]x",
    "[bold red]",
    "\\[red]",
    ":cat:.mp4",
    "{task.total}",
    "[@a=b]",
]
CLOSING = "[/INST] [/] [/red]"  # a closing tag without its opening one is an error of rich's markup
PACKAGE = Path(bt_adapter.__file__).parent


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def test_consoles_and_bars_are_made_in_one_place():
    makers = {"Console", "Progress", "TextColumn", "SpinnerColumn", "from_markup", "Panel", "Live"}
    found = {
        (name, ast.unparse(node))
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in makers
    }
    assert {name for name, _ in found} == {"progress.py"}, found


def test_a_status_is_a_text_of_our_own():
    """Rich reads a status as markup whatever the console is set to."""
    calls = [
        node
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "status"
    ]
    assert calls and all(isinstance(call.args[0], ast.Constant) for call in calls)


def test_files_are_written_in_utf_8():
    for name, tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "write_text":
                assert any(word.arg == "encoding" for word in node.keywords), (name, ast.unparse(node))


@pytest.mark.parametrize("name", [*NAMES, CLOSING, "a" * 200 + ".mp4"])
def test_names_are_shown_as_they_are(name, capsys):
    for made in (terminal.make_console(), Console(width=80)):
        made.file = io.StringIO()
        terminal.say(made, name, "yellow")
        assert made.file.getvalue() == name + "\n"
    shown = Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)
    with terminal.progress_bar(shown, name) as progress:
        progress(1, 2)
    assert name in shown.file.getvalue()
    terminal.print_table([name, name], [[name, name]])
    assert capsys.readouterr().out.count(name) == 4


@pytest.mark.parametrize("forced", [False, True])
def test_commands_show_names_as_they_are(chat, folder, tmp_path, monkeypatch, capsys, forced):  # noqa: F811
    """Of videos that are watched, of broken ones in the report, and of a list that goes on; on a terminal too."""
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(answer, "load", lambda command: chat)
    videos = tmp_path / "[red]videos"
    videos.mkdir()
    names = [*NAMES, CLOSING.replace("/", "\u2215"), "[\u2215INST] [b]x"]
    for name in names:
        (videos / name).write_bytes(b"no video " * 30)
    (videos / "good [x].mp4").write_bytes((folder / "a.mp4").read_bytes())
    asked = [{"video": name, "question": f"how [{CLOSING}] ?", "id": f"{CLOSING}{i}"} for i, name in enumerate(names)]
    asked.append({"video": "good [x].mp4", "question": "how ?", "id": "[b]"})
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")
    out = tmp_path / "answers [2].jsonl"
    command = ["answer", str(tmp_path / "questions.jsonl"), "--videos", str(videos), "--out", str(out)]
    command += ["--frames", "4", "--max-new-tokens", "4"]
    for _ in range(2):
        assert cli.main(command) == 0
        told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
        for i, name in enumerate(names):
            assert f"{CLOSING}{i} ({name})" in told
        assert f"1 of {len(names) + 1} questions answered: {out}" in told
    assert f"{out}: resuming after 1 of" in told


def test_chat_shows_names_as_they_are(chat, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    cut = tmp_path / "[red]cut [INST].mp4"
    data = (folder / "a.mp4").read_bytes()
    cut.write_bytes(data)
    notes = Console(file=io.StringIO(), force_terminal=True, width=300, color_system=None)  # markup is not off here
    monkeypatch.setattr(session, "watch", lambda *arguments: broken(cut))
    shown = session.Session(chat, chat.converse(), Sampling(frames=4), 4, notes)
    lines = f"/video {cut}\n/video {tmp_path}/none [b].mp4\n{CLOSING}\n/[red]\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    shown.converse()
    told = notes.file.getvalue()
    for part in (
        f"watching {cut.name}",
        f"{cut}: no [/x] here",
        "none [b].mp4: no such file",
        "command /[red]",
    ):
        assert part in told


def broken(path):
    raise bt_adapter.data.VideoError(f"{path}: no [/x] here")


def test_training_says_texts_as_they_are(tmp_path, capsys):
    log = Log(tmp_path, 0, 1, False)
    log.say(f"{CLOSING} :cat:")
    log.close()
    assert f"{CLOSING} :cat:" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252", "cp932"])
def test_answers_are_shown_in_any_encoding(chat, folder, monkeypatch, encoding):  # noqa: F811
    told = "It is r\u00e9d \u2013 \u7ea2\u8272 \U0001f600 \ud800."
    real = Conversation.ask

    def ask(self, question, longest, show):
        show(told)
        return real(self, question, longest, lambda text: None)

    monkeypatch.setattr(Conversation, "ask", ask)
    monkeypatch.setattr(session, "load", lambda command: chat)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert cli.main(["chat", "--video", str(folder / "a.mp4"), "--frames", "4", "--max-new-tokens", "4", "how ?"]) == 0
    sys.stdout.flush()
    assert written.getvalue() == told.encode(encoding, "replace") + b"\n"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["eval", "qa", "--help"], ["chat", "--video", "none \u7ea2.mp4", "?"]]
)
def test_any_encoding_as_a_program(arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "bt_adapter.commands", *arguments], env=environment, capture_output=True, timeout=120
    )
    assert done.returncode == (0 if "--help" in arguments else 2) and b"Traceback" not in done.stderr, done.stderr


def test_tables_are_shown_in_any_encoding(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    terminal.prepare_output()
    terminal.print_table(["\u88c1\u5224", "%"], [["r\u00e9d", "1.0"]])
    sys.stdout.flush()
    assert b"r?d" in written.getvalue() and b"1.0" in written.getvalue()


def test_a_stream_that_cannot_be_told_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    terminal.prepare_output()
    assert isinstance(sys.stdout, io.StringIO)


def test_a_closed_output_ends_no_command(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    terminal.prepare_output()
    with sys.stdout, sys.stderr:
        print("an answer", flush=True)
        terminal.make_console(stderr=True).print("a note")
