"""Adapters that tuning writes are a PEFT folder of the whole chat model; models that PEFT wrapped take a branch."""

from __future__ import annotations

import json

import chat_models as families
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_attach import make_branch
from torch import nn
from tuning import make_tokenizer, make_video_chat, recipe, write_data

from bt_adapter import tune
from bt_adapter.chat.attach import attach, attached_branch, detach
from bt_adapter.chat.engine import VideoChat
from bt_adapter.errors import CheckpointError
from bt_adapter.tune.run import tune as run_tuning


def video_chat(name: str) -> VideoChat:
    if name == "llava":
        return make_video_chat()
    torch.manual_seed(0)
    model = families.make_chat(name)
    return VideoChat(attach(model, families.make_branch(model)), make_tokenizer())


def tuned(folder, chat: VideoChat, **changes):
    """The folder of a run of three steps in which adapters alone learn."""
    attached_branch(chat.model).save_pretrained(folder / "branch")
    data = write_data(folder / "clips", 4)
    changes = {"learn": ("lora",), "steps": 3, "lr": 0.05, "branch": str(folder / "branch")} | changes
    return run_tuning(recipe(data=str(data), out=folder / "run", **changes), chat)


def inputs(chat: VideoChat) -> dict:
    video = chat.prepare(torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.manual_seed(3)))
    ids = torch.tensor([[1, *[chat.family.image_token_id] * chat.family.video_length, 2, 3, 4]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": video}


@torch.no_grad()
def logits(chat: VideoChat, model=None) -> torch.Tensor:
    return (chat.model if model is None else model)(**inputs(chat)).logits


@pytest.mark.parametrize("name", ["llava", "vipllava", "llava_next", "blip-2"])
@pytest.mark.parametrize("layers", ["all-linear", "q_proj,v_proj"])
def test_peft_loads_what_tuning_wrote(name, layers, tmp_path):
    folder = tuned(tmp_path, video_chat(name), target_modules=layers)
    plain = video_chat(name)
    before = logits(plain)
    ours = logits(tune.load(folder, model=video_chat(name)))
    theirs = PeftModel.from_pretrained(plain.model, folder / "lora")
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(logits(plain, theirs), ours, rtol=1e-4, atol=1e-5)
    assert attached_branch(theirs) is attached_branch(plain.model)
    config = json.loads((folder / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "no/such/tiny/chat" and config["inference_mode"]
    adapted = {n for n, m in plain.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {n for n in adapted if n.startswith(plain_prefix(plain))} and adapted
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(logits(plain, merged), ours, rtol=1e-4, atol=1e-5)


def plain_prefix(chat: VideoChat) -> str:
    return {"blip-2": "language_model."}.get(chat.family.name, "model.language_model.")


def test_adapters_of_another_model_are_refused(tmp_path):
    folder = tuned(tmp_path, make_video_chat())
    file = folder / "lora/adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = ["model.language_model.layers.7.self_attn.q_proj"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not fit the chat model"):
        tune.load(folder, model=make_video_chat())


def test_what_learns_still_learns_after_adapters_were_loaded(tmp_path):
    folder = tuned(tmp_path, make_video_chat())
    chat, before = make_video_chat(), {n: p.requires_grad for n, p in make_video_chat().model.named_parameters()}
    tune.load(folder, model=chat)
    assert {n: p.requires_grad for n, p in chat.model.named_parameters()} == before


def test_a_peft_model_takes_a_branch_and_trains():
    plain = make_video_chat()
    base = detach(plain.model)
    torch.manual_seed(1)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=r"model\.language_model\..*q_proj"))
    assert attach(wrapped, make_branch(base)) is wrapped
    chat = VideoChat(wrapped, make_tokenizer())
    first = logits(chat)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    assert (logits(chat) - first).abs().max() > 1e-3
    wrapped(**inputs(chat)).logits.sum().backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_A" in n)
    assert chat.ask(chat.encode(torch.zeros(4, 3, 24, 24, dtype=torch.uint8)), "how ?", 3).tokens <= 3
    assert detach(wrapped) is wrapped
