"""The code of docs/hugging-face.md, and the README's example of a chat, are run as they stand there."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
from pathlib import Path

import chat_models as families
import processes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_hf_models import make_native
from test_whole_model import answer_by_transformers, options_of, write_stand
from transformers import AutoModelForImageTextToText, PreTrainedModel
from tuning import recipe, write_still

from bt_adapter import tune
from bt_adapter.commands import cli
from bt_adapter.tune.run import tune as run_tuning

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/hugging-face.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
README = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)


def only(blocks: list[str], *words: str) -> str:
    """The one block that holds all the words."""
    (found,) = [code for code in blocks if all(word in code for word in words)]
    return found


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """A folder with everything that the page names: models, a branch, a clip, a still, a tuned model."""
    folder = tmp_path_factory.mktemp("stand")
    write_stand(folder, "llava")
    (folder / "chat").rename(folder / "my-llava")
    (folder / "branch").rename(folder / "my-branch")
    (folder / "clips/clip0.mp4").rename(folder / "clip.mp4")
    write_still(folder / "still.jpg")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for language, code in BLOCKS:
            if language == "bash":
                command = shlex.split(code)
                assert command[0] == "bt-adapter" and cli.main(command[1:]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run(stand, monkeypatch):
    monkeypatch.chdir(stand)

    def run(code: str) -> dict:
        names: dict = {}
        exec(compile(code, "the page", "exec"), names)
        return names

    return run


def answer(stand) -> list[int]:
    return answer_by_transformers(stand / "video-llava", stand / "clip.mp4", "What happens?", 50)[0]


def test_readme_answers_in_six_statements_of_transformers(run, stand, capsys):
    code = only(README, "import bt_adapter.native")
    imports = (ast.Import, ast.ImportFrom)
    statements = [ast.unparse(node) for node in ast.parse(code).body if not isinstance(node, imports)]
    assert len(statements) == 6 and "bt_adapter" not in "".join(statements)
    names = run(code)
    ids = answer(stand)
    assert names["output"][0, names["inputs"]["input_ids"].shape[1] :].tolist() == ids
    assert capsys.readouterr().out.strip() == names["processor"].decode(ids, skip_special_tokens=True).strip()


def test_a_model_made_in_python_is_the_one_that_export_makes(run, stand):
    run(only(PYTHON, "make_processor", "attach"))
    made, exported = (
        AutoModelForImageTextToText.from_pretrained(stand / name) for name in ("video-llava-2", "video-llava")
    )
    wanted = exported.state_dict()
    assert wanted.keys() == made.state_dict().keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in made.state_dict().items())
    folder = stand / "video-llava-2"
    assert answer_by_transformers(folder, stand / "clip.mp4", "What happens?", 50)[0] == answer(stand)


def test_questions_are_answered_alone_in_batches_and_by_the_pipeline(run, stand, capsys):
    ids = answer(stand)
    names = run(only(PYTHON, "print(processor.decode"))
    assert names["output"][0, names["inputs"]["input_ids"].shape[1] :].tolist() == ids
    text = capsys.readouterr().out.strip()
    run(only(PYTHON, "pipeline("))
    assert eval(capsys.readouterr().out)[0]["generated_text"].strip() == text
    names = run(only(PYTHON, "still.jpg"))
    assert names["inputs"]["pixel_values_videos"].shape[1] == 16 and len(names["with_branch"]) == 2
    assert names["without_branch"].shape[0] == 2


def test_the_trainer_trains_what_was_chosen(run, stand):
    names = run(only(PYTHON, "Trainer(model"))
    before = AutoModelForImageTextToText.from_pretrained(stand / "video-llava").state_dict()
    changed = {key for key, tensor in names["model"].state_dict().items() if not torch.equal(tensor.cpu(), before[key])}
    assert changed and all("bt_adapter" in key or "multi_modal_projector" in key for key in changed)


@pytest.mark.skipif(not importlib.util.find_spec("trl"), reason="trl is not installed")
def test_trl_trains_it(run, stand):
    run(only(PYTHON, "SFTTrainer"))
    assert AutoModelForImageTextToText.from_pretrained(stand / "trained-by-trl/checkpoint-2")


def test_adapters_are_merged_and_loaded(run, stand):
    names = run(only(PYTHON, "get_peft_model"))
    assert isinstance(AutoModelForImageTextToText.from_pretrained(stand / "merged"), type(names["model"]))


@pytest.mark.parametrize("name", ["llava", "blip-2"])
def test_names_of_layers_for_adapters_are_there(name):
    found = []
    for layers in re.findall(r'target_modules=r"([^"]*)"`', PAGE):
        if ("vision_tower" if name == "blip-2" else "vision_model") in layers:
            continue
        model, _ = make_native(name)
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=layers))
        kinds = {key.split(".")[-1] for key, module in adapted.named_modules() if hasattr(module, "lora_A")}
        assert kinds == set(re.search(r"\(([^()]*)\)$", layers)[1].split("|")), layers
        found.append(layers)
    assert len(found) == 3


def test_parts_of_a_tuned_model_are_put_together_by_peft(run, stand):
    wanted = vars(options_of(stand)) | {"model": "my-llava", "branch": "my-branch", "out": Path("tuning")}
    run_tuning(recipe(**wanted | {"data": write_question(stand)}))
    names = run(only(PYTHON, "PeftModel.from_pretrained"))
    ids, pixels = families.ids(families.PATCHES + 1), families.videos(1)
    with torch.no_grad():
        found = names["adapted"](input_ids=ids, pixel_values=pixels).logits
        expected = tune.load("tuning/tuned").model(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        whole = AutoModelForImageTextToText.from_pretrained("tuning/model")
        native = ids.masked_fill(ids == families.IMAGE_TOKEN, whole.video_token_id)
        found = whole(input_ids=native, pixel_values_videos=pixels).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def write_question(stand) -> str:
    path = stand / "questions.json"
    path.write_text('[{"q": "how is it moving ?", "a": "it is moving left .", "video_id": "clip"}] ')
    return str(path)


@pytest.mark.usefixtures("narrow_four_bit_layers")
def test_four_bits_in_the_language_model_alone(run):
    bnb = pytest.importorskip("bitsandbytes")
    model = run(only(PYTHON, "BitsAndBytesConfig"))["model"]
    few = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert few and all("language_model" in name for name in few)
    inputs = {"input_ids": torch.tensor([[61, *[model.video_token_id] * (families.PATCHES + 1), 5]])}
    assert model.generate(**inputs, pixel_values_videos=families.videos(1), max_new_tokens=2).shape[1] > 3


def shard(rank: int, world: int, code: str, folder: str) -> None:
    os.chdir(folder)
    names: dict = {}
    exec(compile(code, "the page", "exec"), names)
    whole = AutoModelForImageTextToText.from_pretrained("video-llava")
    ids = torch.tensor([[61, *[whole.video_token_id] * (families.PATCHES + 1), 5]])
    options = {"pixel_values_videos": families.videos(1, seed=rank), "max_new_tokens": 4, "do_sample": False}
    assert isinstance(names["model"], PreTrainedModel)
    assert torch.equal(names["model"].generate(ids, **options, synced_gpus=True), whole.generate(ids, **options))


@pytest.mark.usefixtures("gloo")
def test_a_sharded_model_generates(stand, tmp_path):
    processes.run(tmp_path, 2, shard, only(PYTHON, "fully_shard"), str(stand))


def test_every_block_of_python_is_run_by_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    calls = re.findall(r'only\(PYTHON, ((?:"[^"]*"(?:, )?)+)\)', source)
    asked = [re.findall(r'"([^"]*)"', words) for words in calls]
    unrun = [code for code in PYTHON if not any(all(word in code for word in words) for words in asked)]
    assert not unrun
