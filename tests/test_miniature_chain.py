"""The chain of the small world: its commands, their order, what is checked before them, and what answers mean."""

import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from miniature import chain, clip, probes, scores, stored, world
from miniature.chain import ChainError, Plan, Runner, check_stills_only
from miniature.items import load_items
from miniature.world import of_kind
from safetensors.torch import load_file, save_file

from bt_adapter.commands import cli
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.tune.recipe import TuneRecipe

TRAINING = ("pretrain", "tune")


class Machine:
    """Starts processes that copy a stage's output to its place."""

    def __init__(self, plan, failing=""):
        self.plan, self.failing, self.threads = plan, failing, {}
        self.runner = Runner(plan, 2, self.start)

    def start(self, words, log, threads):
        (stage,) = [one for one in self.plan.stages.values() if one.words(self.plan.work) == words]
        assert all(self.plan.stages[need].done.exists() for need in stage.needs)
        assert len(self.runner.running) < 2 and not (stage.name == "clip" and self.runner.running)
        self.threads[stage.name] = threads
        if stage.name == self.failing:
            return subprocess.Popen(["false"])
        aside = self.plan.work.with_name(stage.name.replace("/", "-"))
        write_output(self.plan, stage, aside / stage.name)
        (self.plan.work / stage.name).mkdir(parents=True, exist_ok=True)  # two cp may not make the same folder at once
        return subprocess.Popen(["cp", "-r", f"{aside}/.", self.plan.work])


def write_output(plan, stage, folder):
    """Write the files of a stage that the chain itself reads."""
    done = folder / stage.done.relative_to(plan.work / stage.name)
    done.parent.mkdir(parents=True, exist_ok=True)
    about = {"files": 4, "frames": {"1": 4}}
    if done.name == "tuned.json":
        words = stage.words(plan.work)
        value = {option: words[words.index(option) + 1] for option in ("--model", "--data")}
        about = {"model": value["--model"], "recipe": {"data": value["--data"]}, "parts": ["projector", "lora"]}
    if stage.name.startswith("data/stills"):
        record = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
        (folder / "stills.jsonl").write_text(json.dumps(record) + "\n")
    done.write_text(json.dumps(about))


@pytest.fixture
def made(tmp_path):
    plan = Plan(tmp_path / "work", [0, 1])
    for stage in plan.stages.values():
        write_output(plan, stage, plan.work / stage.name)
    return plan


def test_every_command_line_is_one_that_the_product_takes(tmp_path):
    commands = [
        stage.words(tmp_path)[3:] for stage in Plan(tmp_path, [0]).stages.values() if "bt-adapter" in stage.command
    ]
    assert len(commands) == 25
    for words in commands:
        parsed = cli.parse(words)
        if isinstance(parsed, Recipe | TuneRecipe):
            parsed.check(1)


def test_stages_run_in_order_two_at_a_time_and_once(tmp_path):
    plan = Plan(tmp_path / "work", [0])
    first, again = Machine(plan), Machine(plan)
    first.runner.run(plan.chosen([]))
    assert first.threads.keys() == plan.stages.keys()
    assert {name for name, threads in first.threads.items() if threads == 2} == {"clip"}
    again.runner.run(plan.chosen([]))
    lines = again.runner.records()
    assert not again.threads and len(lines) == len(plan.stages)
    assert all(line["finished"] and str(plan.work) not in line["command"] for line in lines)


def test_a_stage_that_fails_ends_the_chain_and_is_run_again(tmp_path):
    plan = Plan(tmp_path / "work", [0])
    with pytest.raises(ChainError, match="seed0/branch ended with 1; see .*seed0-branch.log"):
        Machine(plan, failing="seed0/branch").runner.run(plan.chosen([]))
    again = Machine(plan)
    again.runner.run(plan.chosen([]))
    assert "seed0/branch" in again.threads and "clip" not in again.threads


def test_a_killed_chain_leaves_no_stage_running(tmp_path, monkeypatch):
    plan, children = Plan(tmp_path, [0]), []
    runner = Runner(plan, 2, lambda *_: children.append(subprocess.Popen(["sleep", "60"])) or children[-1])
    before = signal.signal(signal.SIGALRM, lambda *_: sys.exit(143))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    with pytest.raises(SystemExit):
        runner.run(plan.chosen([]))
    signal.signal(signal.SIGALRM, before)
    assert [child.returncode for child in children] == [-signal.SIGTERM] * 2
    assert [line["finished"] for line in runner.records()] == [False] * 2


def test_what_another_command_made_is_not_taken_for_this_one(tmp_path):
    plan = Plan(tmp_path / "work", [0])
    Machine(plan).runner.run(plan.chosen(["data", "clip"]))
    quick = Machine(Plan(plan.work, [0], quick=True))
    with pytest.raises(ChainError, match="data/pretrain was made by another command or recipe.*--only pretrain'"):
        quick.runner.run(quick.plan.chosen([]))
    stored = Machine(Plan(plan.work, [0], use_stored=True))
    with pytest.raises(ChainError, match="clip was made by another command"):
        stored.runner.run(stored.plan.chosen(["clip"]))


def test_an_output_that_is_older_than_its_input_is_refused(made):
    made.stages["seed1/image"].done.touch()
    with pytest.raises(ChainError, match="is older than .*seed1/image"):
        Machine(made).runner.run(made.chosen([]))


def test_nothing_is_trained_for_the_stored_weights(tmp_path):
    plan = Plan(tmp_path, [0], use_stored=True)
    assert not [one for one in plan.stages.values() if "clip.py" in one.command or one.command.split()[1] in TRAINING]
    laid_out = [name for name, stage in plan.stages.items() if "stored.py" in stage.command]
    assert laid_out == ["clip", "seed0/branch", "seed0/image", "seed0/tuned", "seed0/control"]
    assert {"fresh", "data/stills"} <= plan.stages["seed0/image"].needs  # what it was fed is read from them


def test_stages_are_chosen_by_name(tmp_path):
    plan = Plan(tmp_path, [0, 1])
    names = [stage.name for stage in plan.chosen(["data", "clip", "fresh", "image"])]
    assert names[-4:] == ["seed0/image", "seed1/image", "ablations/one-exposure/image", "ablations/plain-stills/image"]
    with pytest.raises(ChainError, match="there is no imge; known: data/pretrain"):
        plan.chosen(["imge"])
    with pytest.raises(ChainError, match="seed0/image needs data/stills, fresh"):
        plan.chosen(["seed0/image"])


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("clip/about.json", '"1"', '"8"', "clip was fed files of several frames"),
        ("data/stills/about.json", '"1": 4', '"1": 3, "8": 1', "image was fed files of several frames"),
        ("data/stills/stills.jsonl", "<image>", "<video>", "line 1: it is no question about a still"),
        ("data/stills/stills.jsonl", '"image"', '"video"', "line 1: it is no question about a still"),
        ("seed0/image/tuned/tuned.json", '"lora"', '"branch"', "a branch was part of the image stage"),
    ],
)
def test_no_untuned_answer_after_anything_but_stills(made, file, old, new, message):
    assert check_stills_only(made.work / "seed0/image/tuned")["image"]["frames"] == {"1": 4}
    for path in (made.work / file, made.work / file.replace("clip/", "fresh/")):
        path.write_text(path.read_text().replace(old, new, 1))
    made.stages["seed0/untuned"].done.unlink()
    machine = Machine(made)
    with pytest.raises(ChainError, match=message):
        machine.runner.run([made.stages["seed0/untuned"]])
    assert not machine.threads


def test_a_step_of_clip_sees_single_images_alone(monkeypatch):
    for name in ("clips", "paired_clips"):
        monkeypatch.setattr(world, name, None)
    tokenizer, seen, embed = clip.make_tokenizer(), [], clip.image_embeddings
    monkeypatch.setattr(clip, "image_embeddings", lambda *given: seen.append(given[1].shape) or embed(*given))
    found = clip.losses(clip.make_clip(tokenizer), tokenizer, load_items(), 8, True, torch.Generator().manual_seed(0))
    assert seen == [(8, 3, 48, 48)] and found.isfinite().all()


def test_figures_of_answers(tmp_path):
    told = {"0000a": "moving left", "0000b": "moving left", "0001a": "growing", "0001b": "moving up"}
    right = {"0000a": "moving left", "0000b": "moving right", "0001a": "moving down", "0001b": "moving up"}
    rows = [
        {"id": f"motion/{k}", "type": "motion", "answer": f"It is {right[k]}.", "pred": f"It is {told[k]}."}
        for k in told
    ]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    (tmp_path / "scores.json").write_text('{"answered": 4, "records": 4}')
    found = scores.figures(scores.read_answers(tmp_path))
    assert found == {"motion": {"n": 4, "right": 0.5, "pair": 0.6667, "pair_n": 3, "both": 0.0}}
    (tmp_path / "scores.json").write_text('{"answered": 3, "records": 4}')
    with pytest.raises(ChainError, match="3 of 4 questions are answered"):
        scores.read_answers(tmp_path)


def test_mcnemar_is_exact():
    first, second = dict.fromkeys(range(12), True), {n: n < 2 for n in range(12)}
    assert scores.mcnemar(first, second) == {"first": 10, "second": 0, "p": 2 / 2**10}
    assert scores.mcnemar(first, first)["p"] == 1.0
    with pytest.raises(ChainError, match="the same questions"):
        scores.mcnemar(first, {0: True})


def test_choices_among_captions(tmp_path):
    captions = ["a red bag moving left", "a red bag moving right", "a blue bag moving left", "a red boot moving left"]
    matrix = torch.eye(4)
    matrix[2, 0] = 1.0  # a tie in colour
    matrix[0, 1] = 2.0  # the counterpart's caption is nearer
    lists = {"captions": json.dumps(captions), "clips": json.dumps(["k", "l", "m", "n"]), "settings": "{}"}
    order = torch.tensor([1, 0, 2, 3])  # clips in another order than captions
    save_file({"scores": matrix[:, order].contiguous(), "clip_of_caption": order}, tmp_path / "s.safetensors", lists)
    found = scores.caption_hits(tmp_path / "s.safetensors")
    assert found["motion"] == {"l": True, "k": False, "m": True, "n": True}
    assert found["colour"] == {"l": False, "k": True, "m": True, "n": True}
    assert scores.recall(tmp_path / "s.safetensors")["single events, video to text"]["r1"] == 0.5


def test_a_probe_reads_what_is_there_and_nothing_else():
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(400, 3, dtype=torch.int64)
    labels[:, 2] = torch.tensor(of_kind("motion"))[torch.arange(400) % 6]
    noise = torch.randn(400, 12, generator=generator)
    told = noise + 4 * torch.nn.functional.one_hot(labels[:, 2], 12)
    for x, least, most in ((told, 0.95, 1.0), (noise, 0.0, 0.3)):
        found = probes.read("motion", x[:300], labels[:300], x[300:], labels[300:])
        assert least <= found["right"] <= most


def test_installed_weights_are_halves_without_paths_and_come_back_to_their_places(tmp_path, monkeypatch):
    work, weights = tmp_path / "work", tmp_path / "package" / "weights"
    places = {"model": "seed0/image/tuned", "clip": "clip", "data": "data/x.jsonl"}
    for place in stored.PLACES.values():
        folder = work / place.format(0)
        folder.mkdir(parents=True)
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        about = {key: str(work / place) for key, place in places.items()}
        about["branch"] = {"source": str(work / "seed0/branch/branch")}
        (folder / "tuned.json").write_text(json.dumps(about))
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/miniature.json").write_text('{"headline": {"columns": []}, "more": 1}')
    monkeypatch.setattr(stored, "ROOT", tmp_path)
    stored.install(work, 0, weights)
    assert sorted(path.name for path in weights.iterdir()) == ["branch", "clip", "control", "image", "tuned"]
    assert load_file(weights / "tuned/model.safetensors")["w"].dtype == torch.float16
    short = json.loads((weights / "tuned/tuned.json").read_text())
    assert short == {"model": "mini:image", "clip": "mini", "data": "data/x.jsonl", "branch": {"source": None}}
    assert json.loads((tmp_path / "package/results.json").read_text()) == {"headline": {"columns": []}}
    before = (work / "seed0/tuned/tuned/tuned.json").read_text()
    shutil.rmtree(work)
    monkeypatch.setattr(stored, "weights_folder", lambda part: weights / part)
    stored.lay_out(work, "seed0/tuned")
    assert json.loads((work / "seed0/tuned/tuned/tuned.json").read_text()) == json.loads(before)


@pytest.mark.full
@pytest.mark.parametrize(("options", "ablations"), [(["--seeds", "0"], 7), (["--stored"], 0)], ids=["all", "stored"])
def test_a_quick_run_of_everything(tmp_path, options, ablations):
    subprocess.run([sys.executable, chain.ROOT / chain.HERE / "chain.py", tmp_path, "--quick", *options], check=True)
    found = json.loads((tmp_path / "miniature.json").read_text())
    assert set(found["fed"]["clip"]["frames"]) == {"1"} and len(found["ablations"]) == ablations
    assert ablations or found["answers"]["untuned"][0]["motion"]["pair"] > 0.6
    assert [len(row) for row in found["headline"]["rows"]] == [len(found["headline"]["columns"])] * 5
