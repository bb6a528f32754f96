"""Tuning beside a frozen language model of 4 or 8 bits: QLoRA."""

from __future__ import annotations

import json

import pytest
import torch
from chat_models import make_branch, make_chat
from test_chat import make_tokenizer
from tuning import losses, recipe, write_clips

from bt_adapter import tune
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.quantize import is_quantized
from bt_adapter.commands import cli
from bt_adapter.errors import CommandError
from bt_adapter.tune.run import tune as run_tuning


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """Folders of a LLaVA and its branch, and questions about clips."""
    folder = tmp_path_factory.mktemp("stand")
    chat = make_chat("llava")
    make_branch(chat).save_pretrained(folder / "branch")
    chat.save_pretrained(folder / "chat")
    make_tokenizer().save_pretrained(folder / "chat")
    write_clips(folder, 4)
    rows = [{"q": "how is it ?", "a": "it is left", "video_id": f"clip{number}"} for number in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.usefixtures("narrow_four_bit_layers")
def test_adapters_and_projector_learn_beside_few_bits(stand, tmp_path, kind):
    bnb = pytest.importorskip("bitsandbytes")
    wanted = recipe(
        data=str(stand / "data.json"), out=tmp_path / "run", model=str(stand / "chat"), branch=str(stand / "branch"),
        learn=("projector", "branch", "lora"), steps=14, lr=1e-2, quantize=kind,
    )  # fmt: skip
    folder = run_tuning(wanted)
    rows = losses(wanted.out)
    assert rows[-1][1] < 0.9 * rows[0][1] and all(norm > 0 for _, _, norm in rows)
    loaded = VideoChat.load(folder, quantize=kind)
    kinds = {type(m.base_layer) for n, m in loaded.model.named_modules() if hasattr(m, "lora_A")}
    assert kinds == {bnb.nn.Linear4bit if kind == "nf4" else bnb.nn.Linear8bitLt} and is_quantized(loaded.model)
    frames = torch.zeros(4, 3, 24, 24, dtype=torch.uint8)
    assert loaded.ask(loaded.encode(frames), "how is it ?", 4).tokens <= 4
    whole = VideoChat.load(folder)  # the adapters merged into full weights
    assert not is_quantized(whole.model) and whole.ask(whole.encode(frames), "how is it ?", 4).tokens <= 4
    assert json.loads((folder / "tuned.json").read_text())["recipe"]["quantize"] == kind
    with pytest.raises(CommandError, match="another recipe: --quantize None against"):
        run_tuning(recipe(**vars(wanted) | {"quantize": None}))
    assert tune.is_tuned(folder)


def test_what_cannot_be_quantized_is_said(stand, tmp_path, capsys):
    arguments = ["--data", str(stand / "data.json"), "--out", str(tmp_path / "run"), "--quantize", "nf4"]
    assert cli.main(["tune", *arguments]) == 2
    assert "--quantize is for models of a folder or the hub" in capsys.readouterr().err
    chat = VideoChat.load(stand / "chat", stand / "branch")
    with pytest.raises(CommandError, match="--quantize nf4: the chat model that was handed over is not quantized"):
        run_tuning(recipe(data=str(stand / "data.json"), out=tmp_path / "run", quantize="nf4"), chat)
