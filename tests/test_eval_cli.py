"""``bt-adapter eval`` from files to its result, on the small stack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import reference_cases
import torch
import torch.nn.functional as F
from miniature.items import ITEMS
from pretraining import write_clips
from safetensors.torch import save_file
from test_cli import run

from bt_adapter import load_reference_checkpoint
from bt_adapter.data import preprocess, read_video
from bt_adapter.data.annotations import class_names
from bt_adapter.data.image_settings import ImageSettings
from bt_adapter.errors import CommandError
from bt_adapter.eval.stack import load_stack
from bt_adapter.towers.text import load_clip

BROKEN = (3, 6)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Ten mini clips, two of them broken; the manifest."""
    return write_clips(tmp_path_factory.mktemp("clips"), 10, BROKEN)


@pytest.fixture
def evaluate(capsys, tmp_path, data):
    """Run a retrieval and return its result, the table and the notes."""

    def call(*arguments: str, manifest: Path = data) -> tuple[dict, str, str]:
        out = tmp_path / "result.json"
        common = ("--data", str(manifest), "--out", str(out), "--cache", str(tmp_path / "features"), "--workers", "0")
        common = (*common, "--overwrite")
        code, table, notes = run(capsys, "eval", "retrieval", *common, "--batch-size", "3", *arguments)
        assert code == 0, notes
        return json.loads(out.read_text()), table, notes

    return call


def good_clips(data: Path) -> list[tuple[Path, str]]:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    return [(data.parent / row["video"], row["caption"]) for n, row in enumerate(rows) if n not in BROKEN]


def expected_ranks(video: torch.Tensor, texts: list[str]) -> list[float]:
    """Of the right video for each caption, by a loop."""
    _, encoder = load_clip("mini")
    scores = F.normalize(encoder(texts), dim=-1) @ F.normalize(video, dim=-1).T
    return [1 + float((row > row[number]).sum()) for number, row in enumerate(scores)]


def frames(paths: list[Path], count: int = 8, size: int = 48) -> torch.Tensor:
    return torch.stack([preprocess(read_video(path, count, repeat=True).frames, size) for path in paths])


def test_retrieval(evaluate, data):
    result, table, notes = evaluate("--dual-softmax")
    paths, texts = zip(*good_clips(data), strict=True)
    stack = load_stack("mini", None)
    with torch.no_grad():
        places = expected_ranks(stack.model(frames(paths)).video_embeds, list(texts))
    assert result["text_to_video"]["mean_rank"] == pytest.approx(sum(places) / len(places))
    assert result["text_to_video"]["r1"] == pytest.approx(sum(p <= 1 for p in places) / len(places))
    assert result["clips"] == result["captions"] == result["computed"] == 8
    assert result["fingerprint"] == stack.fingerprint and result["torch"] == torch.__version__
    assert result["frames"] == 8 and result["sampling"] == "middle" and result["clips_per_second"] > 0
    assert result["dual_softmax"]["temperature"] == 0.01 and result["dual_softmax"]["text_to_video"]["queries"] == 8
    for number in BROKEN:
        name = f"clip{number:03d}.mp4"
        assert "cannot be read as a video" in result["skipped"][name] and name in notes
    assert len(result["skipped"]) == 2 and "2 skipped" in notes
    assert f"{100 * result['text_to_video']['r1']:.1f}" in table and "dual softmax" in table


def test_a_second_run_uses_what_is_stored(evaluate, monkeypatch):
    first, _, _ = evaluate()
    monkeypatch.setattr(ImageSettings, "crop", lambda *arguments: pytest.fail("decoded again"))
    second, _, _ = evaluate()
    assert second["computed"] == 0 and second["clips_per_second"] is None and "dual_softmax" not in second
    for name in ("text_to_video", "video_to_text", "skipped", "fingerprint"):
        assert first[name] == second[name]


def test_a_result_of_other_settings_is_not_overwritten(capsys, tmp_path, data):
    out = tmp_path / "retrieval [1].json"
    common = ["eval", "retrieval", "--data", str(data), "--out", str(out), "--cache", str(tmp_path / "features")]
    common += ["--workers", "0", "--dtype", "float32"]
    assert run(capsys, *common)[0] == 0
    before = json.loads(out.read_text())
    assert before["dtype"] == before["precision"] == "float32" and before["dual_softmax_temperature"] is None
    for arguments, told in (
        (("--frames", "4"), "frames 8, now 4"),
        (("--no-branch",), "branch_used True, now False"),
        (("--dtype", "bfloat16"), "precision 'float32', now 'bfloat16'"),
        (("--dual-softmax",), "dual_softmax_temperature None, now 0.01"),
        (("--views", "2", "--frames", "4", "--sampling", "reference"), "views 1, now 2"),
    ):
        code, table, notes = run(capsys, *common, *arguments)
        assert code == 2 and table == "" and told in notes and "pass --overwrite" in notes and str(out) in notes
        assert json.loads(out.read_text()) == before
    assert run(capsys, *common)[0] == 0 and json.loads(out.read_text())["computed"] == 0  # the same may
    assert run(capsys, *common, "--frames", "4", "--overwrite")[0] == 0
    assert json.loads(out.read_text())["frames"] == 4
    for content in ("no JSON", "[1]", '{"mine": 1}'):
        out.write_text(content)
        code, _, notes = run(capsys, *common)
        assert code == 2 and "holds no result of this command" in notes and out.read_text() == content
    code, _, notes = run(capsys, *common, "--out", str(tmp_path))
    assert code == 2 and "is a folder" in notes


def test_no_branch_is_the_frame_mean(evaluate, data):
    with_branch, _, _ = evaluate()
    result, _, _ = evaluate("--no-branch")
    paths, texts = zip(*good_clips(data), strict=True)
    clip, _ = load_clip("mini")
    with torch.no_grad():
        means = clip.get_image_features(frames(paths).flatten(0, 1)).pooler_output.unflatten(0, (-1, 8)).mean(1)
    places = expected_ranks(means, list(texts))
    assert result["text_to_video"]["mean_rank"] == pytest.approx(sum(places) / len(places))
    assert result["branch"] is None and not result["branch_used"] and result["computed"] == 8
    assert result["fingerprint"] != with_branch["fingerprint"]


def test_half_precision_and_views_are_evaluations_of_their_own(evaluate):
    exact, _, _ = evaluate("--dtype", "float32")  # the default is bfloat16 on some CPUs
    half, _, _ = evaluate("--dtype", "bfloat16")
    views, _, _ = evaluate("--views", "2", "--sampling", "reference", "--frames", "4")
    assert half["computed"] == views["computed"] == 8 and views["views"] == 2
    assert half["text_to_video"]["mean_rank"] == pytest.approx(exact["text_to_video"]["mean_rank"], abs=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[reference_cases.Case, Path, Path]:
    """A golden case, its weights as a file, and a CLIP of its shape with random weights and the mini tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("published")
    case = reference_cases.load("clip_pretrain_unmasked")
    save_file(case.weights, folder / "model.safetensors")
    tokenizer = load_clip("mini")[1].tokenizer
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
        "max_position_embeddings": 12, "projection_dim": 24, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=case.vision_config, projection_dim=24))
    clip.save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return case, folder / "model.safetensors", folder / "clip"


def test_a_published_checkpoint_brings_tower_branch_and_text(evaluate, published, data):
    case, file, clip = published
    stack = load_stack(str(clip), str(file))
    model = load_reference_checkpoint(case.weights, case.vision_config)
    paths, texts = zip(*good_clips(data), strict=True)
    pixels = frames(paths, 4, 16)
    with torch.no_grad():
        assert torch.equal(stack.model(pixels).video_embeds, model(pixels).video_embeds)
    projection = case.weights["text_backbone.text_projection.weight"]
    assert torch.equal(stack.text.projection.weight, projection)
    last = stack.text.text_model(**stack.text.tokenizer(list(texts), return_tensors="pt", padding=True)).pooler_output
    torch.testing.assert_close(stack.text(list(texts)), last @ projection.T)
    result, _, _ = evaluate("--clip", str(clip), "--branch", str(file), "--frames", "4")
    assert result["clips"] == 8 and result["fingerprint"] == stack.fingerprint and result["branch"] == str(file)


def eva_text(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The published text tower in torch's own layers, with one head; tokens [n, length] are read at the last."""
    own = {name.removeprefix("text_backbone."): t for name, t in weights.items() if name.startswith("text_backbone.")}
    x = own["token_embedding.weight"][tokens] + own["positional_embedding"][: tokens.shape[1]]
    for number in range(2):
        layer = torch.nn.TransformerEncoderLayer(16, 1, 64, 0.0, "gelu", batch_first=True, norm_first=True)
        names = (("attn.", "self_attn."), ("ln_", "norm"), ("mlp.c_fc.", "linear1."), ("mlp.c_proj.", "linear2."))
        state = {}
        for name, tensor in own.items():
            if name.startswith(f"transformer.resblocks.{number}."):
                name = name.removeprefix(f"transformer.resblocks.{number}.")
                for theirs, torchs in names:
                    name = name.replace(theirs, torchs)
                state[name] = tensor
        layer.load_state_dict(state)
        mask = torch.nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = layer(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x[:, -1], (16,), own["ln_final.weight"], own["ln_final.bias"])
    return x @ own["text_projection"]


def test_an_eva_checkpoint_brings_its_own_text_tower(evaluate, tmp_path):
    case = reference_cases.Case("eva_unmasked")
    file = tmp_path / "eva.pth"
    torch.save({"state_dict": case.weights}, file)
    stack = load_stack("mini", str(file))
    caption = "a red sneaker moving left"
    tokens = stack.text.tokenizer([caption], return_tensors="pt")["input_ids"]
    torch.testing.assert_close(stack.text([caption]), eva_text(case.weights, tokens))
    result, _, _ = evaluate("--branch", str(file), "--frames", "4")
    assert result["clips"] == 8 and result["fingerprint"] == stack.fingerprint
    del case.weights["text_backbone.ln_final.bias"]
    torch.save(case.weights, file)
    with pytest.raises(CommandError, match="missing: text_model.final_layer_norm.bias"):
        load_stack("mini", str(file))


def test_a_published_checkpoint_of_another_clip(capsys, data, published):
    case, file, _ = published
    code, _, err = run(capsys, "eval", "retrieval", "--data", str(data), "--branch", str(file))
    assert code == 2 and len(err.strip().splitlines()) == 1 and "--clip mini: vision_config has" in err


def test_recognition(capsys, tmp_path, data):
    rows = good_clips(data)
    item_of = {path.name: next(item for item in ITEMS if f" {item} " in f" {text} ") for path, text in rows}
    names = sorted(set(item_of.values()))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{n} {_camel(name)}\n" for n, name in enumerate(names, 1)))
    lines = [f"{_camel(item)}/{name}\n" for name, item in item_of.items()]
    (lists / "testlist01.txt").write_text("".join(lines) + f"{_camel(names[0])}/gone.avi\n")
    for path, _ in rows:
        target = tmp_path / "videos" / _camel(item_of[path.name])
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    templates = tmp_path / "templates.txt"
    templates.write_text("a {}\na photo of a {}\n")
    out = tmp_path / "result.json"
    code, table, notes = run(
        capsys, "eval", "recognition", "--layout", "ucf101", "--data", str(lists), "--videos", str(tmp_path / "videos"),
        "--templates", str(templates), "--out", str(out), "--workers", "0", "--no-cache", "--frames", "8",
    )  # fmt: skip
    assert code == 0, notes
    result = json.loads(out.read_text())
    stack = load_stack("mini", None)
    with torch.no_grad():
        video = F.normalize(stack.model(frames([path for path, _ in rows])).video_embeds, dim=-1)
    read = class_names("ucf101", lists)
    text = sum(F.normalize(stack.text([f"{t} {name}" for name in read]), dim=-1) for t in ("a", "a photo of a"))
    right = torch.tensor([names.index(item_of[path.name]) for path, _ in rows])
    hits = (video @ F.normalize(text, dim=-1).T).argmax(1) == right
    assert result["top1"] == pytest.approx(hits.float().mean().item()) and result["classes"] == len(names)
    means = [hits[right == number].float().mean().item() for number in range(len(names))]
    assert result["mean_class_accuracy"] == pytest.approx(sum(means) / len(means))
    assert result["templates"] == ["a {}", "a photo of a {}"] and "top-1" in table
    assert "gone" in notes and len(result["skipped"]) == 1


def _camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.replace("-", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere.csv"), "there is no such file or folder"),
        (("--frames", "0"), "--frames must be 1 or more"),
        (("--views", "-1"), "--views must be 1 or more"),
        (("--workers", "-1"), "--workers must be 0 or more"),
        (("--temperature", "0"), "--temperature must be above 0"),
        (("--videos", "nowhere"), "there is no such folder"),
        (("--clip", str(Path(__file__).parent)), "found in directory"),
        (("--branch", "nowhere.pth"), "no checkpoint at nowhere.pth"),
        (("--layout", "msrvtt"), "is not JSON"),
        (("--device", "cuda:99" if not torch.cuda.is_available() else "nodevice"), "--device"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(capsys, data, tmp_path, arguments, message):
    common = ("--data", str(data), "--out", str(tmp_path / "r.json"), "--cache", str(tmp_path / "f"), "--workers", "0")
    code, out, err = run(capsys, "eval", "retrieval", *common, *arguments)
    assert code == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(tmp_path.iterdir())


def test_nothing_but_broken_videos(capsys, tmp_path):
    manifest = write_clips(tmp_path, 2, (0, 1))
    common = ("--data", str(manifest), "--out", str(tmp_path / "r.json"), "--no-cache", "--workers", "0")
    code, _, err = run(capsys, "eval", "retrieval", *common)
    assert code == 2 and "none of 2 clips can be used" in err and "clip000.mp4" in err


def test_an_unknown_layout_exits_2(capsys, data):
    with pytest.raises(SystemExit) as exit:
        run(capsys, "eval", "retrieval", "--data", str(data), "--layout", "nowhere")
    assert exit.value.code == 2 and "msrvtt" in capsys.readouterr().err
