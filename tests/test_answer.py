"""Chat line by line, and lists of questions answered in batches through kills and bad input."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from chat_models import make_branch as make_family_branch
from chat_models import make_chat as make_family_chat
from rich.console import Console
from test_attach import make_branch, make_chat
from test_chat import make_tokenizer

from bt_adapter.chat import answer, conversation, quantize, session, shares, watch
from bt_adapter.chat.attach import attach
from bt_adapter.chat.conversation import ContextError
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.questions import Question, read_questions
from bt_adapter.chat.settings import Answer
from bt_adapter.chat.watch import Sampling
from bt_adapter.commands import cli
from bt_adapter.data import write_video
from bt_adapter.data.finding import VisualFolder
from bt_adapter.data.workers import worker_context
from bt_adapter.errors import CommandError
from bt_adapter.files import Rows
from bt_adapter.model import video_tokens as streaming
from bt_adapter.training.processes import Processes

QUESTIONS = ["how ?", "w20 w21 w22 ?", "is it moving ?", "left or right ?"]


def make_engine(context: int = 2048) -> VideoChat:
    model = make_chat()
    model.config.text_config.max_position_embeddings = context
    return VideoChat(attach(model, make_branch(model)), make_tokenizer())


@pytest.fixture(scope="module")
def chat() -> VideoChat:
    return make_engine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips, a file that is no video, and a list of ten questions, two of them about it and one about none."""
    path = tmp_path_factory.mktemp("answer")
    generator = torch.Generator().manual_seed(3)
    for name in "abc":
        frames = torch.randint(256, (9, 3, 32, 32), generator=generator, dtype=torch.uint8)
        write_video(path / f"{name}.mp4", frames)
    (path / "broken.mp4").write_bytes(b"no video " * 30)
    names = ["a.mp4", "a", "broken.mp4", "b.mp4", "c.mp4", "none.mp4", "a.mp4", "broken.mp4", "c", "b.mp4"]
    with open(path / "questions.jsonl", "w") as file:
        for i, name in enumerate(names):
            row = {"video": name, "question": QUESTIONS[i % 4]} | ({"id": f"q{i}", "answer": "left"} if i % 2 else {})
            file.write(json.dumps(row) + "\n")
    return path


def run_all(chat, folder, out, batch=3):
    questions = read_questions(folder / "questions.jsonl", folder)
    with Rows(out, {"model": "tiny"}) as file:
        pending = [question for question in questions if question.id not in file.done]
        skipped = answer.answer_all(chat, pending, file, Sampling(frames=4), batch, 6)
    return skipped, [json.loads(line) for line in out.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(chat, folder):
    _, found = run_all(chat, folder, folder / "whole.jsonl")
    return found


def test_answers_are_those_of_single_questions(chat, folder, expected, tmp_path):
    skipped, found = run_all(chat, folder, tmp_path / "one.jsonl", batch=1)
    assert found == expected and [row["id"] for row in found] == ["1", "q1", "q3", "5", "7", "9", "q9"]
    assert found[1] == {"id": "q1", "video": "a", "question": QUESTIONS[1], "answer": "left",
                        "prediction": found[1]["prediction"]}  # fmt: skip
    for row in found:
        tokens = watch.watch(chat, VisualFolder(folder).find(row["video"], "video")[0], Sampling(frames=4)).tokens
        assert chat.ask(tokens[None], row["question"], 6).text == row["prediction"]
    assert len({row["prediction"] for row in found}) > 1
    assert set(skipped.reasons) == {"3 (broken.mp4)", "q5 (none.mp4)", "q7 (broken.mp4)"}
    assert "no such file" in skipped.reasons["q5 (none.mp4)"] and "cannot be read" in skipped.reasons["q7 (broken.mp4)"]


def answer_until_killed(folder, out, moment, batch):
    """Answer in this process, and kill it in the moment it writes that batch's rows: before, half way, or after."""
    written = []
    real = Rows._write

    def write(self, data):
        written.append(data)
        if len(written) == batch + 1:
            if moment != "before":
                real(self, data if moment == "after" else data[: len(data) - 20])
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, data)

    Rows._write = write
    run_all(make_engine(), folder, out)


@pytest.mark.parametrize("moment", ["before", "half", "after"])
@pytest.mark.parametrize("batch", [0, 1, 2])
def test_killed_while_writing(chat, folder, expected, tmp_path, moment, batch):
    out = tmp_path / "answers.jsonl"
    child = worker_context().Process(target=answer_until_killed, args=(folder, out, moment, batch))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    _, found = run_all(chat, folder, out)
    assert found == expected


def answer_one_by_one(folder, out, begin):
    """Answer in this process, after ``begin`` is set."""
    chat = make_engine()
    begin.set()
    run_all(chat, folder, out, batch=1)


def test_killed_at_random_moments(chat, folder, expected, tmp_path):
    out, draws, killed = tmp_path / "answers.jsonl", random.Random(5), 0
    for _ in range(8):
        begin = worker_context().Event()
        child = worker_context().Process(target=answer_one_by_one, args=(folder, out, begin))
        child.start()
        assert begin.wait(60)
        time.sleep(draws.uniform(0.002, 0.05))
        child.kill()
        child.join()
        if child.exitcode == 0:
            break
        killed += 1
    _, found = run_all(chat, folder, out, batch=1)
    assert found == expected and killed > 2


def test_rows_hold_any_text(tmp_path):
    """Half of a surrogate pair too, as a name that is not UTF-8 or an escape in a list of questions brings it."""
    said = {"id": "1", "video": "\ud83d\u7ea2 [x].mp4", "prediction": "\udce9 \\ud83d \u2028"}
    with Rows(tmp_path / "rows.jsonl", {}) as file:
        file.append([said])
    assert (tmp_path / "rows.jsonl").read_text(encoding="utf-8").count("\n") == 1
    with Rows(tmp_path / "rows.jsonl", {}) as file:
        assert file.done == {"1": said}


def test_rows_of_other_runs_are_refused(folder, tmp_path):
    out = tmp_path / "rows.jsonl"
    with Rows(out, {"model": "tiny", "frames": 4}) as file:
        file.append([{"id": "1"}])
        with pytest.raises(CommandError, match="being written by another run"):
            Rows(out, {"model": "tiny", "frames": 4})
    with pytest.raises(CommandError, match="made with frames 4, now 8"):
        Rows(out, {"model": "tiny", "frames": 8})
    out.write_text('{"id": "1"}\nno row\n')
    with pytest.raises(CommandError, match="line 2, is not a row"):
        Rows(out, {"model": "tiny", "frames": 4})
    (tmp_path / "foreign.jsonl").write_text('{"id": "1"}\n')
    with pytest.raises(CommandError, match="foreign.jsonl already exists"):
        Rows(tmp_path / "foreign.jsonl", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"video": "a", "question": "how ?"}\n{"video": "b", "question": "\xff"}\n', "line 2: not UTF-8"),
        (b'{"video": "a", "question": "how ?"}\n{"video": \n', "line 2: not JSON"),
        (b'{"video": "a"}\n', "line 1: expected an object with the texts video .or image. and question"),
        (b"[1]\n", "line 1: expected an object"),
        (b'\n{"video": "a", "question": "  "}\n', "line 2: the question is empty"),
        (
            b'{"id": 1, "video": "a", "question": "x"}\n{"id": "1", "video": "a", "question": "y"}\n',
            "'1' is used",
        ),
        (b"\n", "holds no question"),
    ],
)
def test_bad_question_lists(folder, tmp_path, content, message):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    with pytest.raises(CommandError, match=message):
        read_questions(path, folder)


def test_prompts_too_long_are_named_with_their_count(folder, tmp_path):
    small = make_engine(context=23)
    skipped, found = run_all(small, folder, tmp_path / "small.jsonl")
    assert {row["question"] for row in found} == {"how ?"} and len(found) + len(skipped) == 10
    too_long = [reason for reason in skipped.reasons.values() if "context" in reason]
    assert too_long and all("10 of them for videos" in reason and "context is 23" in reason for reason in too_long)


def test_the_command_resumes_and_reports(chat, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(answer, "load", lambda command: chat)
    out = tmp_path / "answers.jsonl"
    command = ["answer", str(folder / "questions.jsonl"), "--videos", str(folder), "--out", str(out)]
    command += ["--frames", "4", "--max-new-tokens", "6"]
    assert cli.main(command) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "7 of 10 questions answered" in told and "3 skipped" in told and "q7 (broken.mp4)" in told
    before = out.read_bytes()
    assert cli.main(command) == 0 and "resuming after 7 of 10 answers" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == before
    for change, message in (
        (("--frames", "5"), "made with frames 4, now 5"),
        (("--batch-size", "0"), "--batch-size"),
        (("--videos", "nowhere"), "no such file or folder"),
        (("--videos", str(folder / "b.mp4")), "was made with videos"),
        (("--windows", "0"), "--windows"),
        (("--quantize", "nf4"), "--quantize"),
    ):
        assert cli.main([*command, *change]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    other = tmp_path / "other.jsonl"
    other.write_text('{"video": "a.mp4", "question": "left ?"}\n')
    assert cli.main(["answer", str(other), *command[2:]]) == 2
    assert "is to 'how ?' about a.mp4, but the question now is" in " ".join(capsys.readouterr().err.split())
    other.write_text('{"video": "gone.mp4", "question": "left ?"}\n')
    assert cli.main(["answer", str(other), *command[2:4], "--out", str(tmp_path / "gone.jsonl")]) == 2
    assert "none of the 1 questions" in capsys.readouterr().err
    other.write_text('{"question": "left ?"}\n')  # one video for all
    assert cli.main(["answer", str(other), "--videos", str(folder / "b.mp4"), "--out", str(tmp_path / "b.jsonl")]) == 0


def test_answers_are_told_apart_by_all_that_made_them(folder):
    def made(**options):
        return answer.about(Answer(questions=folder, videos=folder, **options))

    videos = folder / "b.mp4"
    assert answer.about(Answer(questions=folder, videos=videos)) != made() == made()
    plain = made()
    changes = {"model": "m", "branch": "b", "frames": 9, "fps": 1.0, "windows": 2, "long": "interpolate",
               "no_branch": True, "dtype": "float16", "quantize": "nf4", "max_new_tokens": 5,
               "no_repeat": True, "require_same_tower": False}  # fmt: skip
    assert all(made(**{name: value}) != plain for name, value in changes.items())
    assert made(batch_size=3, device="cpu") == plain


@pytest.mark.parametrize("option", ["model", "branch"])
def test_answers_of_weights_written_anew_are_told_apart(folder, tmp_path, option):
    """Tuning on into the folder that a model was read from: its path is the same, its answers are not."""

    def made(path):
        return answer.about(Answer(questions=folder, videos=folder, **{option: str(path)}))

    file = tmp_path / "branch" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"before")
    before, alone = made(tmp_path), made(file)
    (tmp_path / "answers.jsonl").write_text("{}")
    assert made(tmp_path) == before
    os.utime(file, (1, 1))
    assert made(tmp_path) != before and made(file) != alone


def test_videos_of_one_name_in_two_folders_are_told_apart(chat, folder, tmp_path):
    for name in "xy":
        (tmp_path / name).mkdir()
        shutil.copy(folder / "a.mp4", tmp_path / name)
    (tmp_path / "questions.jsonl").write_text('{"video": "x/a.mp4", "question": "how ?"}\n')
    _, found = run_all(chat, tmp_path, tmp_path / "out.jsonl")
    assert found[0]["video"] == "x/a.mp4"
    asked = [Question("1", tmp_path / "y/a.mp4", "how ?", given="y/a.mp4")]
    command = Answer(questions=tmp_path, videos=tmp_path)
    out, alone = tmp_path / "out.jsonl", Processes("cpu")
    with shares.SharedRows(out, {"model": "tiny"}, alone) as file, pytest.raises(CommandError, match="y/a.mp4"):
        answer.answer_with(command, asked, file, 1, Console(quiet=True))


def test_what_a_model_cannot_watch_is_skipped(folder, tmp_path):
    """A model that reads several tower layers takes 128 frames, here 2 times 2; the rest of the list is answered."""
    model = make_family_chat("vipllava")
    branch = make_family_branch(model)
    branch.branch.config = dataclasses.replace(branch.config, max_frames=2)
    engine = VideoChat(attach(model, branch), make_tokenizer())
    generator = torch.Generator().manual_seed(3)
    for name, count in (("long", 6), ("short", 3)):
        frames = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
        write_video(tmp_path / f"{name}.mp4", frames, fps=1)
    asked = [Question(name, tmp_path / f"{name}.mp4", "how ?") for name in ("long", "short")]
    with Rows(tmp_path / "out.jsonl", {}) as file:
        skipped = answer.answer_all(engine, asked, file, Sampling(fps=1), 2, 4)
        assert set(file.done) == {"short"}
    assert "one window of at most 4 frames" in skipped.reasons["long (long.mp4)"]


def test_lines_end_at_line_ends_alone(folder, tmp_path):
    path = tmp_path / "questions.jsonl"
    asked = [{"video": "a", "question": f"how{space}is it ?"} for space in "\u2028\u0085\u2029"]
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in asked), encoding="utf-8")
    assert [question.text for question in read_questions(path, folder)] == [row["question"] for row in asked]


def test_answer_is_checked_before_anything_is_loaded(folder):
    for model in ("somewhere", str(folder)):
        with pytest.raises(CommandError, match="needs --branch"):
            Answer(questions=folder / "questions.jsonl", videos=folder, model=model).check()
    Answer(questions=folder / "questions.jsonl", videos=folder, model="owner/name").check()  # it may bring its own


# --- chat line by line


def talk(chat, monkeypatch, capsys, lines: str) -> tuple[list[str], str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    notes = io.StringIO()
    conversation = chat.converse()
    session.Session(
        chat, conversation, Sampling(frames=4), 6, Console(file=notes, width=200, highlight=False)
    ).converse()
    return [turn.question for turn in conversation.turns], capsys.readouterr().out + notes.getvalue()


def test_lines_are_questions_and_commands(chat, folder, monkeypatch, capsys):
    lines = f"/video {folder / 'a.mp4'}\nhow ?\n\nleft ?\n/dance\n/video nowhere.mp4\n/image {folder / 'a.mp4'}\n"
    turns, told = talk(chat, monkeypatch, capsys, lines + "w20 ?\n/help\n/quit\nright ?\n")
    assert turns == ["how ?", "left ?", "w20 ?"]
    for part in ("4 of 9 frames", "unknown command /dance", "nowhere.mp4: no such file", "cannot be read as an image",
                 "/reset", "prompt tokens run"):  # fmt: skip
        assert part in told
    assert told.count("4 of 9 frames") == 1  # told once, when it was watched
    turns, told = talk(chat, monkeypatch, capsys, f"/video {folder / 'a.mp4'}\nhow ?\n/reset\nhow <video> ?\nright ?")
    assert turns == ["right ?"] and "1 places <video>, but 0 videos" in told


def test_whatever_a_file_provokes_is_told_and_the_chat_goes_on(chat, folder, monkeypatch, capsys):
    real = Sampling.open

    def opened(self, path):
        if "b.mp4" in str(path):
            raise IndexError("odd file")
        return real(self, path)

    def watched(chat, stream, *arguments):
        if "c.mp4" in str(stream.path):
            raise MemoryError("4 GiB")
        return watch.watch(chat, stream, *arguments)

    monkeypatch.setattr(Sampling, "open", opened)
    monkeypatch.setattr(session, "watch", watched)
    lines = "".join(f"/video {folder / name}.mp4\n" for name in "bca") + "how ?\n"
    turns, told = talk(chat, monkeypatch, capsys, lines)
    assert turns == ["how ?"] and told.count("4 of 9 frames") == 1
    assert "b.mp4: cannot be read (IndexError: odd file)" in told
    assert "c.mp4: takes more memory than there is (4 GiB)" in told


def test_a_line_that_is_no_text_is_told_with_its_number(chat, folder, monkeypatch, capsys):
    lines = f"/video {folder / 'a.mp4'}\nhow ?\n".encode() + b"caf\xe9 ?\nleft ?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    notes = io.StringIO()
    conversation = chat.converse()
    session.Session(chat, conversation, Sampling(frames=4), 6, Console(file=notes, width=200)).converse()
    assert [turn.question for turn in conversation.turns] == ["how ?", "left ?"]
    assert "line 3 of the input: not utf-8" in notes.getvalue()


def test_videos_share_the_room_there_is(folder, monkeypatch):
    """A set of tokens for each window (here: for each frame), fewer where the context has no room for them."""
    engine = make_engine(context=512 + 20 + 41)  # text, an answer, and four sets of ten tokens

    def sets(videos, stills=0, compiled=False, longest=20):
        conversation = engine.converse(static=compiled)
        shown = session.Session(engine, conversation, Sampling(frames=4), longest, Console(quiet=True))
        path = folder / "a.mp4"
        picture = engine.encode_image(torch.zeros(3, 32, 32, dtype=torch.uint8))
        monkeypatch.setattr(session, "encode_image", lambda chat, name: watch.EncodedVisual("image", picture.tokens))
        shown.show([shown.sampling.open(path) for _ in range(videos)], [path] * stills)
        return [visual.sets for visual in conversation.visuals[:videos]], shown

    monkeypatch.setattr(streaming, "plan_windows", lambda frames, most, windows: [1] * frames)
    assert sets(2)[0] == [2, 2] and sets(1, stills=1)[0] == [3]
    assert sets(1, longest=40)[0] == [2]
    monkeypatch.setattr(conversation, "_MAX_STATIC", 512 + 20 + 15)
    assert sets(1, compiled=True)[0] == [1]
    found, shown = sets(1)
    assert found == [4]
    shown.ask("how ?")
    shown.show([shown.sampling.open(folder / "a.mp4")], ())  # of what is left beside what was said
    assert shown.conversation.visuals[-1].sets == 1
    with pytest.raises(ContextError, match=r"--compile keeps 547 of the model's context of 573.*--windows"):
        engine.converse(static=True).ask("how ?", 600)


def test_chat_commands_bad_input(folder, capsys):
    clip = str(folder / "a.mp4")
    for arguments, message in (
        (("how ?",), "nothing to ask about"),
        (("how ?", "--video", clip, "--fps", "0"), "--fps"),
        (("how ?", "--image", str(folder / "none.png")), f"--image {folder / 'none.png'}: there is no such file"),
        (("how ?", "--video", str(folder)), f"--video {folder}: is a folder"),
        (("how ?", "--video", clip, "--video", str(folder / "broken.mp4")), "broken.mp4"),
        (("how ?", "--video", clip, "--frames", "10", "--no-repeat"), "there are only 9"),
    ):
        assert cli.main(["chat", *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_unknown_models_and_places(chat, folder, tmp_path, monkeypatch, capsys):
    clip = str(folder / "a.mp4")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    assert cli.main(["chat", "--model", str(tmp_path / "bert"), "--branch", "b", "--video", clip, "how ?"]) == 2
    assert "of type 'bert', expected 'llava'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr(session, "load", lambda command: chat)
    for question, longest, message in (
        ("<video> <video> how ?", "8", "2 places <video>, but 1 videos"),
        ("how ?", "3000", "10 of them for videos and images, and 3000 are asked for the answer"),
    ):
        assert cli.main(["chat", "--video", clip, "--frames", "4", "--max-new-tokens", longest, question]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert cli.main(["chat", "--video", clip, "--video", clip, "--frames", "4", "<video> or <video> ?"]) == 0
    assert "4 of 9 frames · 4 of 9 frames" in " ".join(capsys.readouterr().err.split())


KEPT = ("model.vision_tower", "model.multi_modal_projector")


def test_quantized_models_name_the_missing_package(monkeypatch):
    monkeypatch.setattr(quantize, "_installed", lambda package: False)
    for kind, wanted in (("nf4", "bitsandbytes"), ("int8", "bitsandbytes or torchao")):
        with pytest.raises(quantize.QuantizeError, match=f"quantize {kind} needs {wanted}, which is not installed"):
            quantize.quantization(kind, KEPT)
    with pytest.raises(ValueError, match="quantize must be"):
        quantize.quantization("int3", KEPT)
    monkeypatch.setattr(quantize, "_installed", lambda package: package == "bitsandbytes")
    four, eight = quantize.quantization("nf4", KEPT), quantize.quantization("int8", KEPT)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4" and eight.load_in_8bit
    assert set(KEPT) <= set(four.llm_int8_skip_modules)


@pytest.mark.gpu
def test_compiled_decoding_answers_alike():
    engine = make_engine()
    engine.model.to("cuda")
    plain, compiled = engine.converse(), engine.converse(static=True)
    for each in (plain, compiled):
        each.add(watch.Visual("video", torch.randn(10, 40, generator=torch.Generator().manual_seed(0)).cuda()))
    for question in ("how ?", "left ?"):
        assert plain.ask(question, 8).text == compiled.ask(question, 8).text
