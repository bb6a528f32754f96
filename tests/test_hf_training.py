"""Video chat models under what people put around models: PEFT, Trainer, offloading, quantisation, sharding."""

from __future__ import annotations

from pathlib import Path

import accelerate
import processes
import pytest
import torch
import torch.distributed as dist
from chat_models import FAMILIES, question, videos
from peft import LoraConfig, PeftModel, get_peft_model
from test_hf_models import VIDEO_TOKEN, generated, make_native, name, prompts  # noqa: F401  name is a fixture
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, Trainer, TrainingArguments

from bt_adapter.chat.families import family_of

# Layers of each part by the names that people give PEFT.
BRANCH = r".*bt_adapter\.(temporal|spatial).*(fc|fc1|fc2|out_proj)"
TOWER = r".*(vision_tower|vision_model).*(q_proj|v_proj|qkv|fc1)"
LANGUAGE = r".*language_model.*(q_proj|v_proj)"


def loss_of(model, core=None, pixels=None) -> torch.Tensor:
    core = model if core is None else core
    tokens = prompts(core, 2)
    labels = tokens.masked_fill(tokens == VIDEO_TOKEN, -100)
    pixels = videos() if pixels is None else pixels
    return model(input_ids=tokens, pixel_values_videos=pixels, labels=labels, **question(core, 2)).loss


@pytest.mark.parametrize("layers", [BRANCH, TOWER, LANGUAGE])
def test_adapters_on_any_part_are_heeded_live_as_merged(name, layers, tmp_path):  # noqa: F811
    model, _ = make_native(name)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
    loss = loss_of(adapted, model)
    loss.backward()
    adapters = [parameter for key, parameter in adapted.named_parameters() if "lora_" in key]
    reached = [p for p in adapters if p.grad is not None and p.grad.abs().sum() > 0]
    # the last layers of the tower and of the branch are not run for video tokens
    assert len(reached) >= len(adapters) // 3, f"{len(reached)} of {len(adapters)} adapters get a gradient"
    with adapted.disable_adapter():
        off = loss_of(adapted, model)
    assert abs(loss - off) > 1e-6
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_native(name)[0], tmp_path)
    torch.testing.assert_close(loss_of(loaded, loaded.get_base_model()), loss, rtol=1e-5, atol=1e-6)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(loss_of(merged), loss, rtol=1e-4, atol=1e-5)


def test_a_branch_that_peft_saves_whole_is_the_one_that_runs(name):  # noqa: F811
    model, _ = make_native(name)
    config = LoraConfig(r=2, target_modules=LANGUAGE, modules_to_save=["bt_adapter"])
    adapted = get_peft_model(model, config)
    before = loss_of(adapted, model)
    before.backward()
    copies = [p for key, p in adapted.named_parameters() if "bt_adapter.modules_to_save" in key]
    assert sum(p.grad is not None for p in copies) > len(copies) // 2
    with torch.no_grad():
        for parameter in copies:
            parameter.add_(0.5)
    assert abs(loss_of(adapted, model) - before) > 1e-6


def test_hooks_on_the_branch_and_the_tower_are_called(name):  # noqa: F811
    model, _ = make_native(name)
    expected = loss_of(model)
    branch, tower = family_of(model).home.bt_adapter, family_of(model).vision_tower
    for module in (branch.temporal[0].fc, branch.spatial[0].norm1, tower.encoder.layers[0]):
        handle = module.register_forward_hook(lambda module, inputs, output: output * 1.5)
        assert abs(loss_of(model) - expected) > 1e-6, type(module).__name__
        handle.remove()
    torch.testing.assert_close(loss_of(model), expected)


def test_the_trainer_trains_it(name, tmp_path):  # noqa: F811
    model, _ = make_native(name)
    tokens, asked = prompts(model, 4), question(model, 4)
    rows = [
        {"input_ids": tokens[row], "labels": tokens[row], "pixel_values_videos": videos(1, seed=row)[0]}
        | {key: value[row] for key, value in asked.items()}
        for row in range(4)
    ]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        save_steps=4, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    before = family_of(model).home.bt_adapter.temporal[0].fc.weight.detach().clone()
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert not torch.equal(family_of(model).home.bt_adapter.temporal[0].fc.weight, before)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-4")
    torch.testing.assert_close(loss_of(again), loss_of(model.eval()))


def test_offloaded_weights_are_fetched(name):  # noqa: F811
    model, _ = make_native(name)
    expected = generated(model, prompts(model, 2), pixel_values_videos=videos())
    accelerate.cpu_offload(model, execution_device="cpu")
    found = generated(model, prompts(model, 2), pixel_values_videos=videos())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.usefixtures("narrow_four_bit_layers")
def test_quantised_layers_run(name, bits, tmp_path):  # noqa: F811
    model, _ = make_native(name)
    model.save_pretrained(tmp_path)
    options = {"load_in_8bit": True} if bits == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    everything = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    layer = family_of(everything).home.bt_adapter.temporal[0].fc
    assert type(layer) is not torch.nn.Linear
    with torch.no_grad():
        assert abs(loss_of(everything) - loss_of(model)) < 0.3
    generated(everything, prompts(model, 2), pixel_values_videos=videos())


def shard(rank: int, world: int, family: str, folder: str) -> None:
    model, _ = make_native(family)
    for module in reversed(list(model.modules())):  # as accelerate does, the inner ones first
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module)
    fully_shard(model)
    loss = loss_of(model, pixels=videos(2, seed=rank))
    loss.backward()
    dist.all_reduce(loss.detach())
    gradients = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save(gradients, Path(folder) / "gradients.pt")


@pytest.mark.usefixtures("gloo")
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_by_its_own_list_of_modules(family, tmp_path):
    model, _ = make_native(family)
    assert {"TemporalLayer", "SpatialLayer"} <= set(model._no_split_modules)
    processes.run(tmp_path, 2, shard, family, str(tmp_path))
    found = torch.load(tmp_path / "gradients.pt")
    (sum(loss_of(model, pixels=videos(2, seed=rank)) for rank in range(2)) / 2).backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
