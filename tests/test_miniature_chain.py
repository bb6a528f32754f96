"""The chain of the small world: its commands, their order, what is checked before them, and what answers mean."""

import json
import subprocess
import sys

import pytest
import torch
from miniature import chain, probes, scores
from miniature.chain import ChainError, Plan, Runner, check_stills_only
from miniature.world import of_kind
from safetensors.torch import load_file, save_file

from bt_adapter.commands import cli
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.tune.recipe import TuneRecipe


class Machine:
    """Starts stages that write their output at once and are found ended at the second look."""

    def __init__(self, plan, failing=""):
        self.plan, self.failing, self.order, self.at_once = plan, failing, [], []
        self.running = set()

    def __call__(self, words, log, threads):
        machine = self
        (stage,) = [one for one in self.plan.stages.values() if one.words(self.plan.work) == words]
        assert all(self.plan.stages[need].done.exists() for need in stage.needs)
        self.order.append(stage.name)
        self.running.add(stage.name)
        self.at_once.append((set(self.running), threads))

        class Child:
            looks, code = 0, int(stage.name == self.failing)

            def poll(self):
                self.looks += 1
                if self.looks < 2:
                    return None
                machine.running.discard(stage.name)
                if not self.code and not stage.done.exists():
                    machine.write(stage)
                return self.code

            def terminate(self):
                machine.running.discard(stage.name)

            def wait(self):
                return 143

        return Child()

    def write(self, stage):
        stage.done.parent.mkdir(parents=True, exist_ok=True)
        about = {"files": 4, "frames": {"1": 4}}
        if stage.done.name == "tuned.json":
            words = stage.words(self.plan.work)
            value = {option: words[words.index(option) + 1] for option in ("--model", "--data")}
            about = {"model": value["--model"], "recipe": {"data": value["--data"]}, "parts": ["projector", "lora"]}
        if stage.name.startswith("data/stills"):
            record = {"image": "0.png", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}]}
            (stage.done.parent / "stills.jsonl").write_text(json.dumps(record) + "\n")
        stage.done.write_text(json.dumps(about))


@pytest.fixture
def made(tmp_path):
    plan = Plan(tmp_path / "work", [0, 1])
    machine = Machine(plan)
    Runner(plan, 2, 2, machine).run(plan.chosen([]))
    return plan, machine


def test_every_command_line_is_one_that_the_product_takes(tmp_path):
    commands = [
        stage.words(tmp_path)[3:] for stage in Plan(tmp_path, [0]).stages.values() if "bt-adapter" in stage.command
    ]
    assert len(commands) == 22
    for words in commands:
        parsed = cli.parse(words)
        if isinstance(parsed, Recipe | TuneRecipe):
            parsed.check(1)


def test_stages_run_in_order_two_at_a_time_and_once(made, capsys):
    plan, machine = made
    assert sorted(machine.order) == sorted(plan.stages)
    assert max(len(running) for running, _ in machine.at_once) == 2
    assert all(threads == (2 if running == {"clip"} else 1) for running, threads in machine.at_once)
    assert not any("clip" in running and len(running) > 1 for running, _ in machine.at_once)
    again = Machine(plan)
    Runner(plan, 2, 2, again).run(plan.chosen([]))
    assert again.order == []
    lines = Runner(plan, 2, 2).records()
    assert len(lines) == len(plan.stages) and all(
        line["finished"] and str(plan.work) not in line["command"] for line in lines
    )


def test_a_stage_that_fails_ends_the_chain_and_is_run_again(tmp_path):
    plan = Plan(tmp_path, [0])
    with pytest.raises(ChainError, match="seed0/branch ended with 1; see .*seed0-branch.log"):
        Runner(plan, 2, 2, Machine(plan, failing="seed0/branch")).run(plan.chosen([]))
    again = Machine(plan)
    Runner(plan, 2, 1, again).run(plan.chosen([]))
    assert "seed0/branch" in again.order and "clip" not in again.order


def test_what_another_command_made_is_not_taken_for_this_one(made, tmp_path):
    plan, _ = made
    quick = Plan(plan.work, [0, 1], quick=True)
    with pytest.raises(ChainError, match="was made by another command or recipe.*data/pretrain|data/pretrain was made"):
        Runner(quick, 2, 2, Machine(quick)).run(quick.chosen([]))
    plan.stages["seed1/image"].done.touch()
    with pytest.raises(ChainError, match="is older than .*seed1/image"):
        Runner(plan, 2, 2, Machine(plan)).run(plan.chosen([]))


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
    plan, _ = made
    tuned = plan.work / "seed0/image/tuned"
    assert check_stills_only(tuned)["image"]["frames"] == {"1": 4}
    for path in (plan.work / file, plan.work / file.replace("clip/", "fresh/")):
        path.write_text(path.read_text().replace(old, new, 1))
    plan.stages["seed0/untuned"].done.unlink()
    machine = Machine(plan)
    with pytest.raises(ChainError, match=message):
        Runner(plan, 2, 2, machine).run([plan.stages["seed0/untuned"]])
    assert machine.order == [] or "older" in message


def test_figures_of_answers(tmp_path):
    told = {
        "0000a": "It is moving left.",
        "0000b": "It is moving left.",
        "0001a": "It is growing.",
        "0001b": "It is moving up.",
    }
    right = {"0000a": "moving left", "0000b": "moving right", "0001a": "moving down", "0001b": "moving up"}
    rows = [{"id": f"motion/{k}", "type": "motion", "answer": f"It is {right[k]}.", "pred": told[k]} for k in told]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    (tmp_path / "scores.json").write_text('{"answered": 4, "records": 4}')
    answers = scores.read_answers(tmp_path)["motion"]
    assert scores.figures("motion", answers) == {"n": 4, "right": 0.5, "pair": 0.6667, "pair_n": 3, "both": 0.0}
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


def test_installed_weights_are_halves_without_paths(tmp_path, monkeypatch):
    work, weights = tmp_path / "work", tmp_path / "package" / "weights"
    for part in ("clip", "seed0/branch/branch", "seed0/image/tuned", "seed0/tuned/tuned", "seed0/control/tuned"):
        (work / part).mkdir(parents=True)
        save_file({"w": torch.ones(2)}, work / part / "model.safetensors")
        about = {
            "model": str(work / "seed0/image/tuned"),
            "clip": str(work / "clip"),
            "data": str(work / "data/x.jsonl"),
        }
        (work / part / "tuned.json").write_text(json.dumps(about | {"branch": str(work / "seed0/branch/branch")}))
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/miniature.json").write_text('{"headline": {"columns": []}, "more": 1}')
    monkeypatch.setattr(chain, "ROOT", tmp_path)
    chain.install(work, 0, weights)
    assert sorted(path.name for path in weights.iterdir()) == ["branch", "clip", "control", "image", "tuned"]
    assert load_file(weights / "tuned/model.safetensors")["w"].dtype == torch.float16
    about = json.loads((weights / "control/tuned.json").read_text())
    assert about == {"model": "mini:image", "clip": "mini", "data": "data/x.jsonl", "branch": None}
    assert json.loads((tmp_path / "package/results.json").read_text()) == {"headline": {"columns": []}}


@pytest.mark.full
def test_a_quick_run_of_everything(tmp_path):
    command = [sys.executable, chain.ROOT / chain.HERE / "chain.py", tmp_path, "--quick", "--seeds", "0"]
    subprocess.run(command, check=True)
    found = json.loads((tmp_path / "miniature.json").read_text())
    assert set(found["fed"]["clip"]["frames"]) == {"1"} and len(found["ablations"]) == 5
    assert [len(row) for row in found["headline"]["rows"]] == [len(found["headline"]["columns"])] * 5
