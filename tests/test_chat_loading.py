"""Chat models from folders: what is refused before weights are read, weights that are missing, 4 and 8 bits, settings
of generation and of processors, caches of sliding windows."""

import copy
import json
import shutil

import pytest
import torch
from chat_models import FAMILIES, SIZE, WIDTH, make_branch, make_chat
from safetensors.torch import load_file, save_file
from test_chat import make_tokenizer
from torch import nn
from transformers import CLIPImageProcessorPil, LlavaProcessor, MistralConfig, SiglipVisionConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from bt_adapter import to_reference_state_dict
from bt_adapter.chat import branch_files, caches
from bt_adapter.chat.attach import video_tokens
from bt_adapter.chat.conversation import Visual, answer_batch
from bt_adapter.chat.engine import VideoChat
from bt_adapter.chat.families import family_of
from bt_adapter.chat.loading import names_outside_language_model, read_skeleton
from bt_adapter.chat.prompts import Turn, conversation_ids
from bt_adapter.commands.cli import main
from bt_adapter.errors import CheckpointError


@pytest.fixture
def folders(tmp_path):
    """A LLaVA's folder with tokenizer and a branch's."""
    chat = make_chat("llava")
    make_branch(chat).save_pretrained(tmp_path / "branch")
    chat.save_pretrained(tmp_path / "chat")
    make_tokenizer().save_pretrained(tmp_path / "chat")
    return tmp_path / "chat", tmp_path / "branch"


def change(file, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_language_models_layers_are_quantized(name):
    family = family_of(make_chat(name))
    kept = names_outside_language_model(family)
    language = family.language_model
    inside = {id(module) for module in language.modules()} - {id(family.lm_head)}
    for path, module in family.chat.named_modules():
        if isinstance(module, nn.Linear):
            assert should_convert_module(path, kept) == (id(module) in inside), path
            assert should_convert_module(f"{path}.weight", kept) == (id(module) in inside), path


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.usefixtures("narrow_four_bit_layers")
def test_quantized_model_sees_as_the_whole_one(folders, kind):
    pytest.importorskip("bitsandbytes")
    chat, whole = VideoChat.load(*folders, quantize=kind), VideoChat.load(*folders)
    linear = {name: module for name, module in chat.model.named_modules() if hasattr(module, "in_features")}
    kinds = {name: type(module).__name__ for name, module in linear.items()}
    assert {kind for name, kind in kinds.items() if "language_model" in name} <= {"Linear8bitLt", "Linear4bit"}
    assert {kind for name, kind in kinds.items() if "language_model" not in name} == {"Linear"}
    pixels = torch.randn(1, 4, 3, SIZE, SIZE)
    assert torch.equal(video_tokens(chat.model, pixels), video_tokens(whole.model, pixels))
    assert chat.ask(chat.encode(torch.zeros(4, 3, 30, 30, dtype=torch.uint8)), "how ?", 3).tokens <= 3


@pytest.mark.parametrize("lacking", ["multi_modal_projector", "vision_tower", "layers.1.self_attn", "embed_tokens"])
def test_missing_weights_are_listed(folders, lacking, capsys, tmp_path):
    file = folders[0] / "model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if lacking not in n}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing.*{lacking}"):
        VideoChat.load(*folders)
    name = next(name for name in state if name.endswith("linear_1.bias"))
    save_file({**state, name: state[name][:-1]}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"wrong shape: .*linear_1.bias is \[39\], expected \[40\]"):
        VideoChat.load(*folders)


def test_a_pair_that_does_not_fit_is_refused_before_weights_are_read(folders, tmp_path):
    chat, branch = folders
    (chat / "model.safetensors").unlink()  # were it opened, the error would be another
    make_branch(make_chat("llava", hidden_size=48)).save_pretrained(tmp_path / "wide")
    make_branch(make_chat("llava", image_size=48)).save_pretrained(tmp_path / "large")
    make_branch(make_chat("blip-2")).save_pretrained(tmp_path / "eva")
    for folder in ("wide", "large", "eva"):
        (tmp_path / folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="hidden_size 48 against 32"):
        VideoChat.load(chat, tmp_path / "wide")
    with pytest.raises(ValueError, match=r"trained at 48 px.*takes 24 px.*--no-require-same-tower"):
        VideoChat.load(chat, tmp_path / "large")
    with pytest.raises(ValueError, match="EVA-CLIP"):
        VideoChat.load(chat, tmp_path / "eva")
    state = to_reference_state_dict(make_branch(make_chat("llava", hidden_size=48)))
    torch.save(state, tmp_path / "whole.pth")
    torch.save({n: t for n, t in state.items() if "btadapter" in n}, tmp_path / "alone.bin")
    for name in ("whole.pth", "alone.bin"):
        with pytest.raises(ValueError, match="hidden_size 48 against 32"):
            VideoChat.load(chat, tmp_path / name)
    with pytest.raises(OSError):
        VideoChat.load(chat, branch)  # a pair that fits goes on to the weights


def test_towers_that_are_no_clip_are_named(folders):
    change(folders[0] / "config.json", vision_config=SiglipVisionConfig(image_size=SIZE, patch_size=8).to_dict())
    with pytest.raises(ValueError, match="'siglip_vision_model', expected a CLIP"):
        read_skeleton(str(folders[0]))
    change(folders[0] / "config.json", model_type="qwen2_vl")
    with pytest.raises(ValueError, match="of type 'qwen2_vl', expected 'llava'"):
        read_skeleton(str(folders[0]))


def test_mistyped_branch_is_never_looked_for_on_the_hub(folders, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: asked.append(name))
    monkeypatch.chdir(tmp_path)
    command = ["chat", "--image", "a.png", "--model", "chat", "how ?", "--branch"]
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "runs").mkdir()
    (tmp_path / "branch").rename(tmp_path / "runs" / "branch")
    for name in ("runs/brnch", "./runs/brnch", str(tmp_path / "runs/brnch")):
        assert main([*command, name]) == 2
        error = capsys.readouterr().err
        assert "brnch is not there" in error and "did you mean" in error and "runs/branch" in error
    assert main([*command, "nowhere"]) == 2 and "no hub name" in capsys.readouterr().err
    assert not asked


def test_hub_names_of_branches(folders, tmp_path, monkeypatch):
    chat, branch = folders
    places = {"owner/branch": branch, "owner/file": tmp_path / "file", "owner/none": tmp_path / "none"}
    (tmp_path / "none").mkdir()
    (tmp_path / "file").mkdir()
    torch.save(to_reference_state_dict(make_branch(make_chat("llava"))), tmp_path / "file" / "bt.pth")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: str(places[name]))
    assert branch_files.locate_branch("owner/branch") == branch
    assert branch_files.locate_branch("owner/file") == tmp_path / "file" / "bt.pth"
    assert VideoChat.load(chat, "owner/branch").branch.config.depth == 3
    with pytest.raises(CheckpointError, match="neither a config.json nor one single file"):
        branch_files.locate_branch("owner/none")
    with pytest.raises(FileNotFoundError, match="owner/other is no folder or file here, nor found on the hub"):
        branch_files.locate_branch("owner/other")


def test_settings_of_generation_are_heeded_or_overridden(folders, monkeypatch):
    frames = torch.randint(256, (4, 3, 30, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def reply(chat: VideoChat, **settings) -> str:
        for name, value in settings.items():
            setattr(chat.model.generation_config, name, value)
        visual = Visual("video", chat.encode(frames)[0])
        ids = conversation_ids(chat.processor, [Turn("how ?", ("video",))], [len(visual.tokens)])
        (batch,) = answer_batch(chat.model, chat.tokenizer, [(ids, [visual])], 6)
        assert chat.ask(chat.encode(frames), "how ?", 6).text == batch
        return batch

    chat = VideoChat.load(*folders)
    before, plain = reply(chat), copy.deepcopy(chat.model.generation_config)
    for settings in (
        {"return_dict_in_generate": True}, {"cache_implementation": "static"}, {"num_beams": 3},
        {"do_sample": True, "temperature": 5.0}, {"output_scores": True, "return_dict_in_generate": True},
        {"prompt_lookup_num_tokens": 3}, {"guidance_scale": 2.0}, {"max_length": 5}, {"min_new_tokens": 30},
        {"use_cache": False}, {"num_return_sequences": 2, "num_beams": 2}, {"output_attentions": True},
    ):  # fmt: skip
        assert reply(chat, **settings) == before, settings
        chat.model.generation_config = copy.deepcopy(plain)
    told = []
    monkeypatch.setattr(chat.model, "generate", lambda **options: told.append(options) or torch.zeros(1, 1).long())
    chat.model.generation_config.stop_strings = ["left"]
    answer_batch(chat.model, chat.tokenizer, [([61, 5], [])], 6)
    assert told[0]["tokenizer"] is chat.tokenizer  # which transformers needs to find them


def test_settings_of_generation_that_transformers_refuses_to_read(folders, tmp_path):
    chat, branch = folders
    frames = torch.full((4, 3, 30, 30), 90, dtype=torch.uint8)

    def reply(**settings) -> str:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(chat, tmp_path / "copy")
        file = tmp_path / "copy" / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
        model = VideoChat.load(tmp_path / "copy", branch)
        return model.ask(model.encode(frames), "how ?", 6).text

    before = reply()
    assert reply(num_return_sequences=2) == before
    assert reply(compile_config={"mode": "default"}, num_return_sequences=3) == before
    assert reply(is_assistant=True) == before
    with pytest.raises(CheckpointError, match=r"generation_config.json is refused by transformers: .*max_new_tokens"):
        reply(max_new_tokens=-1)


def sliding(window: int) -> MistralConfig:
    return MistralConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, eos_token_id=63, pad_token_id=62, bos_token_id=61, max_position_embeddings=256,
        sliding_window=window,
    )  # fmt: skip


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("window", [16, 24, 64, 200])
def test_turns_beyond_a_sliding_window_are_those_of_a_fresh_answer(static, window):
    chat = make_chat("llava", text=sliding(window))
    with torch.no_grad():  # answers that depend on what came before
        chat.lm_head.weight.normal_()
        for name, parameter in chat.named_parameters():
            if "language_model.layers" in name and name.endswith("proj.weight"):
                parameter.normal_(0, 0.3)
    from bt_adapter.chat.attach import attach

    engine = VideoChat(attach(chat, make_branch(chat)), make_tokenizer())
    conversation = engine.converse(static)
    conversation.add(Visual("video", engine.encode(torch.full((4, 3, 30, 30), 90, dtype=torch.uint8))[0]))
    for question in ("how is it moving ?", "left right", "how", "is it w20 w21 w22 ?"):
        turns = [*conversation.turns, Turn(question, () if conversation.turns else ("video",))]
        found = conversation.ask(question, 8)
        lengths = [len(visual.tokens) for visual in conversation.visuals]
        ids = conversation_ids(engine.processor, turns, lengths)
        assert found.text == answer_batch(chat, engine.tokenizer, [(ids, conversation.visuals)], 8)[0]
    if window == 200 and not static:
        assert found.fed < found.prompt  # what can be kept is kept


def test_which_caches_can_be_cut():
    for limit in (None, 64):
        croppable = limit is None or "crop" in vars(caches.StaticLayer)  # transformers before 5.18 cannot
        assert caches.can_crop(caches.make_cache(make_chat("llava").config.get_text_config(), limit)) == croppable
    for cache in (caches.DynamicCache(config=sliding(8)), caches.StaticCache(config=sliding(8), max_cache_len=64)):
        keys = torch.zeros(1, 2, 5, 10)
        for layer in range(2):
            cache.update(keys, keys, layer)
        assert caches.can_crop(cache)
        for layer in range(2):
            cache.update(keys, keys, layer)
        assert not caches.can_crop(cache)


def test_frames_are_prepared_by_the_models_own_processor(folders):
    tokenizer = make_tokenizer("{{ messages[0].role }} <image>")
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3,
        image_std=[0.25] * 3, resample=2,
    )  # fmt: skip
    LlavaProcessor(images, tokenizer, patch_size=8, chat_template=tokenizer.chat_template).save_pretrained(folders[0])
    chat = VideoChat.load(*folders)
    frames = torch.randint(256, (2, 3, 60, 80), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = images(list(frames.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    assert (chat.prepare(frames)[0] - expected).abs().max() < 1.5 / 255 / 0.25  # one level of rounding
    assert chat.tokenizer.chat_template and chat.branch.images == chat.images


def test_a_processor_that_cannot_be_loaded_is_an_error(folders, monkeypatch):
    LlavaProcessor(CLIPImageProcessorPil(), make_tokenizer("<image>"), patch_size=8).save_pretrained(folders[0])

    def fail(name):
        raise ImportError("no Pillow")

    monkeypatch.setattr("bt_adapter.chat.loading.AutoProcessor.from_pretrained", fail)
    with pytest.raises(ImportError, match="Pillow"):
        VideoChat.load(*folders)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_the_dtype_asked_for_runs(folders, stored):
    chat = make_chat("llava").to(stored)
    chat.save_pretrained(folders[0])
    for dtype in (torch.float32, torch.bfloat16, None):
        loaded = VideoChat.load(*folders, dtype=dtype)
        assert {p.dtype for p in loaded.model.parameters()} == {dtype or stored}
