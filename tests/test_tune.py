"""Tuning: what learns and nothing else, the same numbers however a run is cut up, stopped, killed and gone on with."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import chat_models as families
import processes
import pytest
import torch
import torch.nn.functional as F
from test_attach import make_branch
from torch import nn
from tuning import ANSWERS, losses, make_tokenizer, make_video_chat, recipe, write_data, write_still

from bt_adapter import tune
from bt_adapter.chat.attach import attach, attached_branch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.commands import cli
from bt_adapter.data import read_video
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.training.loop import Stopped
from bt_adapter.tune import run
from bt_adapter.tune.batches import Order, Steps, VisualReader
from bt_adapter.tune.conversations import read_conversations
from bt_adapter.tune.features import FeatureStore
from bt_adapter.tune.loss import answer_loss
from bt_adapter.tune.parts import Learned
from bt_adapter.tune.recipe import TuneRecipe
from bt_adapter.tune.run import Run
from bt_adapter.tune.run import tune as run_tuning
from bt_adapter.tune.step import Tuning
from bt_adapter.tune.tokens import IGNORED, Tokens, make_examples

EVERY = ("projector", "branch", "lora")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Videos, a still, text alone, and two turns: of different lengths."""
    folder = tmp_path_factory.mktemp("mixed")
    rows = json.loads(write_data(folder, 3).read_text())
    write_still(folder / "still.jpg")
    said = [("human", "<image> what colour ?"), ("gpt", "red"), ("human", "and ?"), ("gpt", "it is still .")]
    rows.append({"image": "still.jpg", "conversations": [{"from": who, "value": text} for who, text in said]})
    said = [("human", "how is it ?"), ("gpt", "the clip shows a red clip and a blue clip .")]
    rows.append({"id": "text", "conversations": [{"from": who, "value": text} for who, text in said]})
    path = folder / "mixed.json"
    path.write_text(json.dumps(rows))
    return path


def parts_of(chat, path, parts=1, batch=8):
    examples, _ = make_examples(Tokens(chat.model, chat.processor), read_conversations(path)[0], 200, False)
    order = Order([example.length for example in examples], batch, 0)
    step = Steps(examples, order, VisualReader(24, 4), 0, 1, parts)[0]
    assert not step.failed
    return step.parts


def learn(chat, path, parts=1, **changes) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of one step over all of a file's conversations, in float64."""
    wanted = recipe(learn=EVERY, **changes)
    torch.manual_seed(0)
    chat.model.double()
    learned = Learned(chat.model, wanted)
    for name, p in learned.named_parameters():
        if "lora_B" in name:  # zero at the start, and then nothing reaches A
            nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    tuning, total = Tuning(chat, wanted), 0.0
    for part in parts_of(chat, path, parts):
        torch.manual_seed(1)
        loss = tuning.loss(part)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad for name, p in learned.named_parameters() if p.requires_grad}


def no_drops(chat):
    branch = attached_branch(chat.model).branch
    branch.config = replace(branch.config, drop_path=0.0)
    return chat


def many_drops(chat):
    branch = attached_branch(chat.model).branch
    branch.config = replace(branch.config, drop_path=0.5)
    return chat


def test_loss_is_that_of_the_chat_model_itself(mixed):
    """One conversation at a time through transformers' own forward, with its own logits."""
    chat = no_drops(make_video_chat())
    found, _ = learn(chat, mixed)
    expected = 0.0
    for part in parts_of(chat, mixed, parts=8):
        (example,) = part.examples
        ids, targets = example.expand()
        inputs = {"input_ids": ids[None]}
        if part.visuals:
            frames = part.visuals[0] if part.visuals[0].ndim == 4 else part.visuals[0][None]
            pixels = chat.prepare(frames)
            inputs["pixel_values"] = pixels if example.sources[0].kind == "video" else pixels[0]
        with torch.no_grad():
            logits = chat.model(**inputs).logits[0]
        expected += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["llava_next", "vipllava", "blip-2"])
def test_loss_is_that_of_other_families_too(data, name):
    model = families.make_chat(name)
    chat = VideoChat(attach(model, families.make_branch(model)), make_tokenizer())
    chat.model.double()
    tuning = Tuning(chat, recipe())
    (part,) = parts_of(chat, data)
    ids, targets, mask = part.padded(0)
    with torch.no_grad():
        videos = torch.cat([chat.prepare(frames) for frames in part.visuals])
        logits = chat.model(input_ids=ids, attention_mask=mask.long(), pixel_values=videos).logits
        expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        assert float(tuning.loss(part)) == pytest.approx(float(expected), rel=1e-9)


def test_families_whose_tokens_depend_on_the_question_are_refused(data):
    model = families.make_chat("instructblip")
    chat = VideoChat(attach(model, families.make_branch(model)), make_tokenizer(), None, make_tokenizer())
    with pytest.raises(CommandError, match="depend on the question"):
        Tuning(chat, recipe())


def blip2_chat():
    """With an OPT that drops out in training mode, as published ones do."""
    text = families.opt_config()
    text.dropout = text.attention_dropout = text.layerdrop = 0.5
    model = families.make_chat("blip-2", text=text).double()  # before parts of its tower are shared as views
    return VideoChat(attach(model, families.make_branch(model)), make_tokenizer())


@pytest.mark.parametrize(
    ("make", "parts", "changes"),
    [
        (make_video_chat, 1, {"packing": True}),
        (make_video_chat, 3, {}),
        (make_video_chat, 2, {"packing": True, "head_chunk": 3}),
        (make_video_chat, 1, {"gradient_checkpointing": True, "recompute": "layer"}),
        (blip2_chat, 2, {"packing": True}),
        (blip2_chat, 1, {"gradient_checkpointing": True}),
    ],
)
def test_however_a_step_is_cut_up_it_learns_the_same(mixed, make, parts, changes):
    expected, wanted = learn(many_drops(make()), mixed)
    found, grads = learn(many_drops(make()), mixed, parts, **changes)
    assert found == pytest.approx(expected, rel=1e-9)
    assert wanted.keys() == grads.keys() and len(wanted) > 20
    for name, gradient in wanted.items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-7, atol=1e-10, msg=name)
        assert gradient.abs().sum() > 0 or "lora" in name, name


def test_packing_is_refused_where_conversations_would_see_one_another():
    chat = blip2_chat()
    chat.family.language_model.set_attn_implementation("eager")  # which adds the mask instead of choosing by it
    with pytest.raises(CommandError, match="--packing: in OPTModel conversations of one row attend to one another"):
        Tuning(chat, recipe(packing=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_drops_out_of_a_frozen_language_model(checkpointing):
    """But from its adapters; and layers run again in backward where that is asked for."""
    for rate in (0.0, 0.5):
        chat = blip2_chat()
        wanted = recipe(learn=("lora",), gradient_checkpointing=checkpointing, lora_dropout=rate)
        learned = Learned(chat.model, wanted)
        for name, p in learned.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p)
        runs: list[int] = []
        model = chat.family.language_model
        inner = next(m for n, m in model.named_modules() if n.endswith("fc1"))
        inner.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        rows = torch.randn(1, 5, families.WIDTH, dtype=torch.float64)
        first, second = (model(inputs_embeds=rows, use_cache=False).last_hidden_state for _ in range(2))
        assert torch.equal(first, second) == (rate == 0)
        first.sum().backward()
        assert len(runs) == 2 + checkpointing


def test_gradient_of_the_lean_loss_is_the_plain_one():
    torch.manual_seed(0)
    head = nn.Linear(12, 50).double()
    hidden, targets = torch.randn(37, 12, dtype=torch.float64, requires_grad=True), torch.randint(50, (37,))
    F.cross_entropy(head(hidden), targets, reduction="sum").backward()
    expected = [hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    hidden.grad = head.weight.grad = head.bias.grad = None
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        loss = answer_loss(hidden, targets, head, chunk=8)
    assert max(kept) < 8 * 50  # not even one chunk's logits
    loss.backward()
    assert float(loss) == pytest.approx(float(F.cross_entropy(head(hidden), targets, reduction="sum")), rel=1e-12)
    for found, wanted in zip([hidden.grad, head.weight.grad, head.bias.grad], expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert float(answer_loss(hidden[:0], targets[:0], head)) == 0


@pytest.mark.parametrize(("chunk", "runs"), [(37, 1), (36, 4)])  # in two pieces each runs once more in backward
def test_logits_are_made_again_only_where_they_exceed_a_chunk(chunk, runs):
    head, seen = nn.Linear(12, 50), []
    head.register_forward_hook(lambda *call: seen.append(len(call[1][0])))
    hidden = torch.randn(37, 12, requires_grad=True)
    answer_loss(hidden, torch.randint(50, (37,)), head, chunk).backward()
    assert len(seen) == runs and max(seen) <= chunk and sum(seen) == 37 * max(1, runs // 2)


def test_the_log_has_the_learning_rate_of_each_part(data, tmp_path):
    changes = {"learn": EVERY, "lr": 1e-5, "lr_projector": 4e-3, "lr_lora": 2e-3, "steps": 2, "warmup": 0.0}
    run_tuning(recipe(data=str(data), out=tmp_path, save_model=False, **changes), make_video_chat())
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert {name: row[name] for name in row if name.startswith("lr")} == {
        "lr_projector": 4e-3, "lr_branch": 1e-5, "lr_lora": 2e-3
    }  # fmt: skip


@pytest.mark.parametrize("parts", [("projector",), ("branch",), ("lora",), ("projector", "lora"), EVERY])
def test_exactly_what_is_asked_for_learns(data, tmp_path, parts):
    chat, untouched = make_video_chat(), make_video_chat()
    before = {name: p.detach().clone() for name, p in chat.model.named_parameters()}
    out = run_tuning(recipe(data=str(data), out=tmp_path, learn=parts, steps=2, save_model=False), chat)
    after = {name.replace(".base_layer", ""): p for name, p in chat.model.named_parameters()}
    changed = {name for name, p in after.items() if name not in before or not torch.equal(p, before[name])}
    kinds = {"projector": "multi_modal_projector", "branch": "bt_adapter", "lora": "lora_"}
    assert all(any(kinds[part] in name for part in parts) for name in changed)
    for part in parts:
        assert any(kinds[part] in name for name in changed)
    reached = {f"model.bt_adapter.{n}" for n, p in attached_branch(untouched.model).branch.named_parameters()}
    never = ("temporal.2", "spatial.2", "output_gate", "alignment")
    reached = {name for name in reached if not any(word in name for word in never)}
    if "branch" in parts:
        assert reached <= changed | {"model.bt_adapter.time"} and "model.bt_adapter.merge_gate" in changed
    assert {path.name for path in out.iterdir()} == {"tuned.json"} | {
        {"projector": "projector.safetensors"}.get(part, part) for part in parts
    }


def test_it_overfits_and_the_tuned_folder_answers(data, tmp_path):
    chat = make_video_chat()
    wanted = recipe(data=str(data), out=tmp_path, learn=EVERY, steps=60, warmup=0.1)
    folder = run_tuning(wanted, chat)
    rows = losses(tmp_path)
    assert rows[-1][1] < 0.1 < 1 < rows[0][1]
    with pytest.raises(FileNotFoundError, match=r"(?s)was tuned from the chat model no/such/tiny/chat.*Give model="):
        tune.load(folder)
    for source in (folder, tmp_path / "checkpoints/00000060"):
        again = tune.load(source, model=make_video_chat())
        assert not any("lora_" in name for name, _ in again.model.named_parameters())
        for number, answer in enumerate(ANSWERS):
            tokens = again.encode(read_video(data.parent / f"clip{number}.mp4", 4))
            assert again.ask(tokens, "how is it moving ?", 12).text == answer


def test_loading_says_what_is_missing(data, tmp_path):
    folder = run_tuning(recipe(data=str(data), out=tmp_path, learn=("projector",), steps=1), make_video_chat())
    about = json.loads((folder / "tuned.json").read_text())
    assert (
        about["model"] == "no/such/tiny/chat"
        and about["parts"] == ["projector"]
        and about["branch"]["source"] == "no/such/tiny/branch"
    )
    chat = make_video_chat()
    attached_branch(chat.model).save_pretrained(tmp_path / "branch")
    assert tune.load(folder, model=chat, branch=tmp_path / "branch") is chat
    other = make_video_chat()
    torch.manual_seed(5)
    attach(other.model, make_branch(other.model))
    attached_branch(other.model).save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="tuned with another branch: the length of"):
        tune.load(folder, model=make_video_chat(), branch=tmp_path / "other")
    chained = recipe(data=str(data), out=tmp_path / "next", learn=("branch",), steps=1, model=str(folder))
    second = run_tuning(chained, tune.load(folder, model=make_video_chat(), branch=tmp_path / "branch"))
    assert json.loads((second / "tuned.json").read_text())["model"] == str(folder.resolve())
    (folder / "projector.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks projector.safetensors"):
        tune.load(folder, model=make_video_chat())
    with pytest.raises(FileNotFoundError, match="no tuned.json"):
        tune.load(tmp_path / "branch")
    assert tune.is_tuned(folder) and not tune.is_tuned(tmp_path)


def test_features_on_disk_learn_what_decoding_learns(data, mixed, tmp_path):
    for path, changes in ((data, {}), (mixed, {"accumulate": 2})):
        base = recipe(data=str(path), steps=4, learn=("projector",), **changes)
        name = path.stem
        run_tuning(replace(base, out=tmp_path / f"{name}-fly"), make_video_chat())
        stored = replace(base, out=tmp_path / f"{name}-disk", features=tmp_path / f"{name}-features")
        run_tuning(stored, make_video_chat())
        for fly, disk in zip(losses(tmp_path / f"{name}-fly"), losses(stored.out), strict=True):
            assert disk == pytest.approx(fly, rel=2e-3)  # float16 has 11 bits
        assert losses(tmp_path / f"{name}-fly") != losses(stored.out)


def test_a_signal_stops_it_while_features_are_stored(data, tmp_path, monkeypatch):
    write = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", lambda *args: (write(*args), signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(Stopped, match="while features were stored"):
        run_tuning(recipe(data=str(data), out=tmp_path, steps=1, features=tmp_path / "f"), make_video_chat())
    assert len(list((tmp_path / "f").glob("*.safetensors"))) == 1


def test_it_learns_the_same_whatever_the_workers(data, tmp_path):
    for workers in (0, 2):
        run_tuning(recipe(data=str(data), out=tmp_path / str(workers), steps=2, workers=workers), make_video_chat())
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_killed_at_random_moments_it_ends_as_if_never_killed(data, tmp_path):
    script = Path(__file__).parent / "tune_killed.py"
    command = [sys.executable, str(script), str(data), str(tmp_path), "3", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 1
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for file in ("projector.safetensors", "branch/model.safetensors", "lora/adapter_model.safetensors"):
        assert (tmp_path / "killed/tuned" / file).read_bytes() == (tmp_path / "whole/tuned" / file).read_bytes()
    assert len(list((tmp_path / "killed/checkpoints").iterdir())) == 2


def test_stopped_and_gone_on_with_is_bit_equal(data, tmp_path, monkeypatch):
    whole = recipe(data=str(data), out=tmp_path / "whole", learn=EVERY, steps=6, lora_dropout=0.3, batch_size=3)
    run_tuning(whole, make_video_chat())
    split, step = replace(whole, out=tmp_path / "split"), Run._step

    def until_two(self, number, batch):
        self.asked = number == 2
        return step(self, number, batch)

    monkeypatch.setattr(Run, "_step", until_two)
    with pytest.raises(Stopped, match="after step 2 of 6"):
        run_tuning(split, make_video_chat())
    monkeypatch.undo()
    with pytest.raises(CommandError, match="another recipe: --seed 1 against 0"):
        run_tuning(replace(split, seed=1), make_video_chat())
    other = Path(shutil.copytree(data.parent, tmp_path / "other")) / "data.json"
    other.write_text(other.read_text().replace("left", "right"))
    step_file = next((split.out / "checkpoints").iterdir()) / "state.json"
    stored = step_file.read_text()
    step_file.write_text(stored.replace(str(data), str(other)))
    with pytest.raises(CommandError, match="is not what the run .* began with: 4 usable"):
        run_tuning(replace(split, data=str(other)), make_video_chat())
    state = json.loads(stored)  # as a run stored it when its options had other names
    former = {now: before for before, now in TuneRecipe.renamed.items()}
    state["recipe"] = {former.get(name, name): value for name, value in state["recipe"].items()} | {
        "other_tower": False
    }
    assert "rank" in state["recipe"] and "lora_r" not in state["recipe"]
    step_file.write_text(json.dumps(state))
    run_tuning(split, make_video_chat())
    assert losses(split.out) == losses(whole.out)


def tune_part(rank: int, world: int, wanted: TuneRecipe) -> None:
    if rank == 0:  # comes last to the features, when the others could have written theirs
        store = run.store_features
        run.store_features = lambda *arguments: (time.sleep(1), store(*arguments))[1]
    run_tuning(wanted, many_drops(make_video_chat()))


@pytest.mark.usefixtures("gloo")
def test_two_processes_learn_what_one_learns(mixed, tmp_path):
    wanted = recipe(
        data=str(mixed), out=tmp_path / "one", learn=EVERY, steps=5, batch_size=3, features=tmp_path / "features-one"
    )
    run_tuning(wanted, many_drops(make_video_chat()))
    both = replace(wanted, out=tmp_path / "two", features=tmp_path / "features-two")
    processes.run(tmp_path / "logs", 2, tune_part, both)
    for one, two in zip(losses(wanted.out), losses(both.out), strict=True):
        assert two == pytest.approx(one, rel=1e-3)


def test_broken_videos_are_named_and_too_many_end_the_run(tmp_path, capsys):
    data = write_data(tmp_path / "few", 8, broken=(5,))
    run_tuning(recipe(data=str(data), out=tmp_path / "run", steps=4, max_skipped=0.5), make_video_chat())
    said = " ".join(capsys.readouterr().err.split())
    assert "1 skipped" in said and "clip5" in said
    rows = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == 1 and min(row["answer_tokens"] for row in rows) == 3 * 6
    with pytest.raises(CommandError, match=r"(?s)1 of .* cannot be used.*clip5"):
        run_tuning(recipe(data=str(data), out=tmp_path / "none", steps=4, max_skipped=0.0), make_video_chat())
    rows = json.loads(data.read_text()) + [{"q": "how ?", "a": "left", "video_id": f"gone{n}"} for n in range(30)]
    data.write_text(json.dumps(rows))
    with pytest.raises(CommandError, match=r"(?s)30 of 38 .* cannot be used.*there is no"):
        run_tuning(recipe(data=str(data), out=tmp_path / "gone", steps=4), make_video_chat())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_half_precision_trains_float32_parts_as_float32_does(data, tmp_path, name):
    """Stopped and gone on with; the losses are those of float32 but for the rounding of the products."""
    dtype = getattr(torch, name)
    wanted = recipe(data=str(data), learn=EVERY, steps=8, packing=True, lr=1e-3, out=tmp_path / "wide")
    run_tuning(wanted, many_drops(make_video_chat()))
    half = replace(wanted, dtype=name, out=tmp_path / "half")
    for last in (5, 8):
        chat = many_drops(make_video_chat())
        chat.model.to(dtype)
        with stopped_after(last):
            run_tuning(half, chat)
    assert {p.dtype for p in chat.model.parameters() if p.requires_grad} == {torch.float32}
    assert chat.model.lm_head.weight.dtype == dtype
    found, expected = losses(half.out), losses(wanted.out)
    assert [row[0] for row in found] == list(range(1, 9))
    for row, exact in zip(found, expected, strict=True):
        assert row[1] == pytest.approx(exact[1], rel=0.03), (found, expected)
    assert found != expected
    about = json.loads((half.out / "tuned/tuned.json").read_text())
    assert about["precision"]["dtype"] == name and about["precision"]["chosen"] == "as asked for"
    state = json.loads((half.out / "checkpoints/00000008/state.json").read_text())
    assert bool(state["scaler"]) == (name == "float16")


@contextmanager
def stopped_after(last: int):
    """Within it a run is asked to stop in that step, and may."""
    step = Run._step

    def watched(self, number, batch):
        self.asked = number >= last
        return step(self, number, batch)

    with pytest.MonkeyPatch.context() as patch, suppress(Stopped):
        patch.setattr(Run, "_step", watched)
        yield


def test_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cli.tune, "run", lambda recipe: seen.append(recipe) or 0)
    (tmp_path / "r.yaml").write_text("data: a.json\nlearn: [lora, branch]\nlr-lora: 1e-4\nframes: 8\n")
    assert cli.main(["tune", "--config", str(tmp_path / "r.yaml"), "--frames", "16", "--features", "f"]) == 0
    assert seen[0] == TuneRecipe(data="a.json", learn=("lora", "branch"), lr_lora=1e-4, frames=16, features=Path("f"))
    assert seen[0].rate_of("lora") == 1e-4 and seen[0].rate_of("branch") == 2e-5
    assert cli.main(["tune", "--data", "a.json", "--learn", "projector", "lora"]) == 0
    assert seen[1].learn == ("projector", "lora")
    monkeypatch.undo()
    assert cli.main(["tune", "--data", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
