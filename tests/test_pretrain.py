"""Pretraining: the same numbers however a run is split up, stopped, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from pretraining import losses, recipe, write_clips
from safetensors.torch import load_file
from small_models import video
from test_chat import mini_is_there
from video_files import numbered

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.data import write_video
from bt_adapter.data.skipped import Skipped, TooManySkipped
from bt_adapter.errors import CheckpointError, CommandError
from bt_adapter.eval.ranking import Retrieval
from bt_adapter.eval.retrieval import Quick
from bt_adapter.model.drop_path import draw_kept
from bt_adapter.pretrain.recipe import Recipe
from bt_adapter.pretrain.run import Run, pretrain, start_model, wrap
from bt_adapter.pretrain.saving import load_average
from bt_adapter.pretrain.step import Pretraining, backward, draw_depth, draw_visible
from bt_adapter.towers.text import load_clip
from bt_adapter.training.checkpoint import Checkpoints, save_moments
from bt_adapter.training.loop import Stopped, signals

pytestmark = pytest.mark.skipif(bool(mini_is_there()), reason=str(mini_is_there()))
CAPTIONS = [
    "a red sneaker moving left",
    "a blue bag growing",
    "the white shirt standing still",
    "a green coat moving up",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("clips"))


def gradients(rank: int, world: int, wanted: Recipe, folder: str, double: bool = True) -> None:
    """Losses and gradients of one step on this process's part of four clips; the first process writes them."""
    torch.manual_seed(0)
    clip, text = load_clip("mini")
    model = start_model(wanted, clip, None)
    with torch.no_grad():
        for number, p in enumerate(model.branch.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(number)) * 0.02)
    if double:
        model, text = model.double(), text.double()
    module = wrap(Pretraining(model.train(), wanted), wanted, torch.device("cpu"), world > 1)
    size = 4 // world
    mine = slice(rank * size, rank * size + size)
    frames = torch.randint(0, 256, (4, 4, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    visible = draw_visible(wanted, model.vision_config.patches, 1, rank, world, torch.device("cpu"))
    draws = draw_depth(model.config, wanted, visible, 1, rank, torch.device("cpu"))
    group = dist.group.WORLD if world > 1 else None
    parts = backward(module, frames[mine], visible, draws, text(CAPTIONS[mine]), wanted, group).double()
    if group is not None:
        dist.all_reduce(parts)
    grads = {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad)
        for name, p in model.branch.named_parameters()
    }
    if rank == 0:
        torch.save({"losses": parts / world, **grads}, Path(folder) / "found.pt")


def plain(folder: Path, **changes) -> dict[str, torch.Tensor]:
    folder.mkdir()
    gradients(0, 1, recipe(drop_path=0.5, **changes), str(folder))
    return torch.load(folder / "found.pt")


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=1e-6, atol=0)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-12, name
        assert name == "losses" or gradient.norm() > 0, name


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize(
    ("world", "sharding", "accumulate"),
    [(2, "ddp", 1), (4, "ddp", 1), (2, "fsdp2", 1), (4, "fsdp2", 1), (2, "ddp", 2), (2, "fsdp2", 2)],
)
def test_processes_compute_what_one_computes(world, sharding, accumulate, tmp_path):
    expected = plain(tmp_path / "one")
    wanted = recipe(drop_path=0.5, sharding=sharding, accumulate=accumulate)
    processes.run(tmp_path / "many", world, gradients, wanted, str(tmp_path))
    check(torch.load(tmp_path / "found.pt"), expected)


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4, "recompute": "layer"}, {"mask": "random"}])
def test_parts_compute_what_the_whole_computes(changes, tmp_path):
    base = {"mask": changes.get("mask", "tube")}
    check(plain(tmp_path / "parts", **{"accumulate": 2} | changes), plain(tmp_path / "whole", **base))


def test_what_drops_out_of_a_clip_is_its_own():
    """Its seed alone decides, whatever the batch, the number of clips, and what other layers draw."""
    config = BTAdapterConfig(depth=3, drop_path=0.5, drop_block=True)
    whole = draw_kept(config, 16, 4, [7, 8, 9])
    assert [list(kept.shape) for kept in whole] == [[3, 16], [3, 4], [3, 1]] * 2
    for number, seed in enumerate((7, 8, 9)):
        for mine, kept in zip(draw_kept(config, 16, 4, [seed]), whole, strict=True):
            assert torch.equal(mine[0], kept[number])
    assert not torch.equal(whole[0][0], whole[0][1])
    assert draw_kept(BTAdapterConfig(drop_path=0.0), 16, 4, [7]) == []
    many = draw_kept(config, 500, 500, range(20))
    for kept, rate in zip(many, (0.25, 0.25, None, 0.5, 0.5, None), strict=True):
        assert rate is None or abs(float((~kept).float().mean()) - rate) < 0.02


def test_the_same_layers_drop_out_in_both_passes_of_a_part(monkeypatch, tmp_path):
    seen = []
    forward = Pretraining.forward

    def watched(self, frames, visible, draws, align=True):
        out = forward(self, frames, visible, draws, align)
        seen.append(out[0].detach().clone())
        return out

    monkeypatch.setattr(Pretraining, "forward", watched)
    gradients(0, 1, recipe(drop_path=0.5, accumulate=2), str(tmp_path))
    assert len(seen) == 4
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-12, atol=0)
    torch.testing.assert_close(seen[1], seen[3], rtol=1e-12, atol=0)


def test_parts_keep_the_activations_of_one_part(monkeypatch):
    clip, text = load_clip("mini")
    sections: list[dict[int, int]] = []
    forward = Pretraining.forward
    monkeypatch.setattr(Pretraining, "forward", lambda *a, **k: sections.append({}) or forward(*a, **k))

    def pack(tensor):
        sections[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept = {}
    for accumulate in (1, 4):
        wanted = recipe(accumulate=accumulate, batch_size=8)
        module = Pretraining(start_model(wanted, clip, None).train(), wanted)
        weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
        visible = draw_visible(wanted, 36, 1, 0, 1, torch.device("cpu"))
        sections.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            frames = torch.zeros(8, 4, 3, 48, 48, dtype=torch.uint8)
            draws = draw_depth(module.model.config, wanted, visible, 1, 0, torch.device("cpu"))
            backward(module, frames, visible, draws, text(CAPTIONS * 2), wanted)
        assert len(sections) == (1 if accumulate == 1 else 8)
        kept[accumulate] = max(sum(n for key, n in s.items() if key not in weights) for s in sections)
    assert 0 < kept[4] < 0.3 * kept[1]


def test_a_run_ends_with_a_branch_that_loads_and_has_learned(tmp_path):
    out, manifest = tmp_path / "run", write_clips(tmp_path / "clips", 4)  # one batch: every step sees the same four
    crop = (0.9, 1.0)
    wanted = recipe(data=str(manifest), out=out, steps=12, ema=0.9, save_steps=5, keep_last=1, lr=3e-5, crop=crop)
    folder = pretrain(wanted)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["lr"] < rows[3]["lr"] and all(0 <= row["data_wait"] <= 1 for row in rows)
    assert sum(row["loss"] for row in rows[-3:]) < 0.5 * sum(row["loss"] for row in rows[:3])
    for name in (folder, out / "ema"):
        branch = BTAdapterVisionModel.from_pretrained(name, clip=load_clip("mini")[0])
        assert branch(video(4).new_zeros(1, 4, 3, 48, 48)).video_embeds.isfinite().all()
    state = json.loads((out / "checkpoints/00000012/state.json").read_text())
    left = {int(path.name) for path in (out / "checkpoints").iterdir()}
    assert left == {12, state["best"]["step"]}


def test_the_average_follows_the_branch_from_its_first_values_on(manifest, tmp_path):
    out = tmp_path / "run"
    pretrain(recipe(data=str(manifest), out=out, steps=2, save_steps=1, keep_last=2, ema=0.75, lr=1e-3))
    stored = {
        (step, part): load_file(out / f"checkpoints/{step:08d}/{part}/model.safetensors")
        for step in (1, 2)
        for part in ("branch", "ema")
    }
    moved = 0.0
    for name, average in stored[2, "ema"].items():
        before, now = stored[1, "ema"][name], stored[2, "branch"][name]
        torch.testing.assert_close(average, before + 0.25 * (now - before), rtol=1e-6, atol=1e-9)
        moved += float((before - stored[1, "branch"][name]).abs().max())
    assert moved > 0  # the average began before the first step


def test_the_best_checkpoint_is_that_of_the_best_retrieval(manifest, tmp_path, monkeypatch, capsys):
    shares = iter([0.25, 0.75, 0.5])

    def found(model, text, clips, frames, batch, workers):
        assert not model.training and len(clips) == 12
        way = Retrieval(next(shares), 1.0, 1.0, 1.0, 1.0, 12, 0)
        return Quick(way, way, {"lost": "is empty"}, [])

    monkeypatch.setattr("bt_adapter.eval.retrieval.quick", found)
    out = tmp_path / "run"
    pretrain(recipe(data=str(manifest), validation=str(manifest), out=out, steps=6, save_steps=2, keep_last=1))
    state = json.loads((out / "checkpoints/00000006/state.json").read_text())
    assert state["best"] == {"step": 4, "score": 0.75}
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["00000004", "00000006"]
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [(line["step"], line["video_to_text"]["r1"]) for line in lines] == [(2, 0.25), (4, 0.75), (6, 0.5)]
    assert "of the validation clips 1 skipped:\n  1: is empty: lost" in capsys.readouterr().err


@pytest.mark.usefixtures("gloo")
def test_sharded_processes_validate_what_one_validates(manifest, tmp_path):
    whole = recipe(data=str(manifest), validation=str(manifest), out=tmp_path / "one", steps=2, drop_path=0.0)
    pretrain(whole)
    processes.run(tmp_path / "a", 2, pretrain_quietly, replace(whole, out=tmp_path / "two", sharding="fsdp2"))
    one, two = ((tmp_path / name / "validation.jsonl").read_text() for name in ("one", "two"))
    assert json.loads(one) == json.loads(two)


def pretrain_quietly(rank: int, world: int, wanted: Recipe) -> None:
    pretrain(wanted)


def test_one_batch_order_whatever_the_workers(manifest, tmp_path):
    runs = [pretrain(recipe(data=str(manifest), out=tmp_path / str(n), steps=4, workers=n)).parent for n in (0, 2)]
    assert losses(runs[0]) == losses(runs[1])


def test_killed_at_random_moments_it_ends_as_if_never_killed(manifest, tmp_path):
    """Two kills; ``KILLS=20`` for what a release is held to."""
    kills = int(os.environ.get("KILLS", "2"))
    script = Path(__file__).parent / "killed.py"
    command = [sys.executable, str(script), str(manifest), str(tmp_path), str(kills), "11", str(8 * kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) == kills
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    for name in ("branch/model.safetensors", "ema/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_sigterm_saves_and_the_same_command_goes_on(manifest, tmp_path):
    arguments = ["--data", str(manifest), "--steps", "200", "--frames", "4", "--batch-size", "4", "--depth", "2"]
    arguments += ["--clip", "mini", "--workers", "0", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "bt_adapter.commands", "pretrain", *arguments]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and log.read_text().count("\n") >= 3):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 143 and "goes on from there" in said
    step = max(int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert losses(tmp_path / "run")[-1][0] == step
    longer = recipe(data=str(manifest), out=tmp_path / "run", steps=200)
    with pytest.raises(CommandError, match="another recipe: --"):
        pretrain(replace(longer, seed=1))


@pytest.mark.usefixtures("gloo")
def test_a_run_goes_on_with_another_number_of_processes(manifest, tmp_path):
    whole = recipe(data=str(manifest), out=tmp_path / "whole", steps=6, drop_path=0.5)
    pretrain(whole)
    split = replace(whole, out=tmp_path / "split", sharding="fsdp2", save_steps=3)
    processes.run(tmp_path / "a", 2, half, split, 3)
    assert [row[0] for row in losses(tmp_path / "split")] == [1, 2, 3]
    pretrain(split)
    for mine, theirs in zip(losses(tmp_path / "split"), losses(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4)


def half(rank: int, world: int, wanted: Recipe, until: int) -> None:
    """A run that is stopped after step ``until``, as by a signal."""
    from bt_adapter.pretrain import run as module

    step = module.Run._step

    def watched(self, number, batch):
        self.asked = number >= until
        return step(self, number, batch)

    module.Run._step = watched
    try:
        pretrain(wanted)
    except Stopped:
        return
    raise AssertionError("it went to its end")


def until(monkeypatch, last: int) -> None:
    """Runs are stopped after step ``last``, as by a signal."""
    step = Run._step

    def watched(self, number, batch):
        self.asked = number >= last
        return step(self, number, batch)

    monkeypatch.setattr(Run, "_step", watched)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_steps_and_goes_on(manifest, tmp_path, monkeypatch, precision):
    if precision == "float16" and not cpu_has_float16():
        pytest.skip("this torch has no products of float16 on a CPU")
    # at the default temperature of 0.01 these few clips are told apart with a loss near 0, which has no relative error
    wanted = recipe(data=str(manifest), out=tmp_path / "run", steps=3, dtype=precision, temperature=0.5)
    until(monkeypatch, 2)
    with pytest.raises(Stopped, match="after step 2 of 3"):
        pretrain(wanted)
    monkeypatch.undo()
    pretrain(wanted)
    pretrain(replace(wanted, out=tmp_path / "wide", dtype="float32"))
    rows, exact = losses(tmp_path / "run"), losses(tmp_path / "wide")
    assert [row[0] for row in rows] == [1, 2, 3]
    # cosines that half precision rounds, over a temperature of 0.5
    tolerance = {"bfloat16": 0.05, "float16": 0.01}[precision]
    for row, other in zip(rows, exact, strict=True):
        assert row[1:] == pytest.approx(other[1:], rel=tolerance)
    assert rows != exact
    if precision == "float16":
        state = json.loads((tmp_path / "run/checkpoints/00000003/state.json").read_text())
        assert 0 < state["scaler"]["scale"] <= 2**16


def cpu_has_float16() -> bool:
    try:
        with torch.autocast("cpu", torch.float16):
            x = torch.ones(2, 3, requires_grad=True)
            torch.nn.functional.linear(x, torch.ones(4, 3)).sum().backward()
    except RuntimeError:
        return False
    return True


def test_a_score_that_is_no_number_is_not_the_best(manifest, tmp_path, monkeypatch):
    scores = iter([float("nan"), 0.25, float("nan")])
    monkeypatch.setattr(Run, "_score", lambda self, step, loss: next(scores))
    pretrain(recipe(data=str(manifest), out=tmp_path / "run", steps=3, save_steps=1))
    state = json.loads((tmp_path / "run/checkpoints/00000003/state.json").read_text())
    assert state["best"] == {"step": 2, "score": 0.25}


def test_a_stop_writes_at_once_and_validates_nothing(manifest, tmp_path, monkeypatch):
    until(monkeypatch, 2)
    monkeypatch.setattr("bt_adapter.eval.retrieval.quick", None)
    with pytest.raises(Stopped):
        pretrain(recipe(data=str(manifest), validation=str(manifest), out=tmp_path / "run", steps=4))
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["00000002"]


def test_a_second_sigterm_is_one_more_request_and_a_second_sigint_the_end():
    asked = []
    with signals(lambda: asked.append(1)):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert len(asked) == 2 and signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGINT)
        assert len(asked) == 3 and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_damaged_checkpoint_is_passed_over_and_other_clips_are_refused(manifest, tmp_path, capsys):
    clips, out = tmp_path / "clips.jsonl", tmp_path / "run"
    clips.write_text(manifest.read_text())
    wanted = recipe(data=str(clips), videos=manifest.parent, out=out, steps=3, save_steps=1, keep_last=3, ema=0.9)
    pretrain(wanted)
    before, newest = losses(out), out / "checkpoints/00000003"
    weights = newest / "optimizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    pretrain(wanted)
    said = "".join(capsys.readouterr().err.split())  # lines break anywhere
    assert "00000003isdamaged" in said and "afterstep2of3" in said and losses(out) == before
    lines = clips.read_text().splitlines(keepends=True)
    clips.write_text("".join(reversed(lines)))
    with pytest.raises(CommandError, match="is not what the run .* began with: 12 usable clips now, 12 then"):
        pretrain(wanted)
    for file in (out / "checkpoints").rglob("state.json"):
        file.write_text("{")
    with pytest.raises(CheckpointError, match="no checkpoint in .* can be read"):
        pretrain(wanted)
    (newest / "ema/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="ema/model.safetensors"):
        load_average(newest / "ema", torch.nn.Identity())


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, replaced, synced = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), synced(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replaced"), replaced(a, b)))
    checkpoints = Checkpoints(tmp_path, 1)
    filled = []

    def fill(folder):
        filled.append(str(folder))
        for name in ("a", "b"):
            (folder / name).write_text("x")

    checkpoints.write({"step": 1}, fill)
    files = {f"{filled[0]}/{name}" for name in ("a", "b", "state.json")}
    assert {*done[: done.index("replaced")]} == {*filled, *files}
    assert done[-1] == str(checkpoints.folder)


def test_two_runs_do_not_share_a_folder(manifest, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    (out := tmp_path / "run").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(out / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(CommandError, match="--out .* is in use"):
            pretrain(recipe(data=str(manifest), out=out, steps=1))
        other.communicate(b"\n")
    pretrain(recipe(data=str(manifest), out=out, steps=1))


@pytest.mark.usefixtures("gloo")
def test_processes_refuse_alike(tmp_path):
    broken = write_clips(tmp_path / "broken", 12, broken=(0, 1, 2, 3))
    processes.run(tmp_path / "a", 2, refuse, recipe(data=str(broken), out=tmp_path / "run", steps=9, max_skipped=0.3))


def refuse(rank: int, world: int, wanted: Recipe) -> None:
    with pytest.raises(TooManySkipped, match=r"(?s)4 of 12 clips.*--max-skipped 0.3"):
        pretrain(wanted)
    data, out = Path(wanted.data), wanted.out
    fewer = data.with_name(f"{rank}.jsonl")
    fewer.write_text("".join(data.read_text().splitlines(keepends=True)[rank:]))
    with pytest.raises(CommandError, match=r"--data .* the same for all processes, .* \[12, 11\] usable clips"):
        pretrain(replace(wanted, data=str(fewer), out=out.with_name("other")))
    own = out.with_name(f"own{rank}")
    if rank:
        Checkpoints(own, 1).path(2).mkdir(parents=True)
        (Checkpoints(own, 1).path(2) / "state.json").write_text('{"step": 2}')
        save_moments({}, Checkpoints(own, 1).path(2) / "optimizer.safetensors")
    with pytest.raises(CommandError, match=r"--out .* one folder for all processes, .* \[0, 2\]"):
        pretrain(replace(wanted, out=own))


def test_chance_does_not_end_a_run_and_a_share_too_great_does_early():
    for seed in range(30):
        order = torch.randperm(200, generator=torch.Generator().manual_seed(seed)).tolist()
        skipped = Skipped()
        for seen, number in enumerate(order, 1):
            if number < 20:
                skipped.add(f"clip{number}", "is empty")
            skipped.check(seen, 0.1, total=200)
        skipped.add("clip20", "is empty")
        with pytest.raises(TooManySkipped, match="21 of 200 clips.*10 % allowed by --max-skipped 0.1;"):
            skipped.check(200, 0.1, total=200)
    many = Skipped()
    for number in range(30):
        many.add(f"clip{number}", "is empty")
    with pytest.raises(TooManySkipped, match="30 of 60 clips"):
        many.check(60, 0.1, total=10000)


def test_broken_clips_are_named_and_too_many_stop_the_run(tmp_path, capsys):
    manifest = write_clips(tmp_path / "clips", 12, broken=(3,))
    write_video(tmp_path / "whole.mkv", numbered(40), options={"crf": "30", "g": "8"})
    whole = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "clips/clip005.mp4").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "run"
    pretrain(recipe(data=str(manifest), out=out, steps=9, max_skipped=0.5))
    said = " ".join(capsys.readouterr().err.split())
    assert "1 skipped" in said and "clip003" in said and "1 used though damaged or truncated: clip005.mp4" in said
    state = json.loads((out / "checkpoints/00000009/state.json").read_text())
    assert "clip003" in json.dumps(state["skipped"]) and "clip005" in json.dumps(state["damaged"])
    many = write_clips(tmp_path / "many", 12, broken=tuple(range(6)))
    with pytest.raises(CommandError, match="clip00"):
        pretrain(recipe(data=str(many), out=tmp_path / "stopped", steps=60, max_skipped=0.1))
