"""The pipeline of the README by its commands: pretrain beside a CLIP, evaluate, tune a LLaVA on that CLIP, chat."""

import json

import pretraining
import torch
import tuning
from chat_models import text_config
from transformers import CLIPModel, CLIPVisionModel, LlavaConfig, LlavaForConditionalGeneration

from bt_adapter.commands.cli import main
from bt_adapter.towers.text import load_clip


def write_clip(folder, size: int):
    """The mini CLIP, in half precision, with a position table for pictures of ``size`` pixels."""
    clip, text = load_clip("mini")
    embeddings = clip.vision_model.embeddings
    patches = (size // 8) ** 2
    config = clip.config
    config.vision_config.image_size = size
    state = clip.state_dict()
    name = next(n for n in state if n.endswith("vision_model.embeddings.position_embedding.weight"))
    state[name] = torch.cat([state[name], state[name][1:].repeat(patches // 36, 1)])[: 1 + patches]
    assert embeddings.patch_size == 8
    other = CLIPModel(config)
    other.load_state_dict(state, strict=False)
    other.half().save_pretrained(folder)
    text.tokenizer.save_pretrained(folder)


def write_llava(folder, clip) -> None:
    """A LLaVA whose tower is the CLIP's, and a random small language model."""
    torch.manual_seed(0)
    tower = CLIPVisionModel.from_pretrained(clip, dtype=torch.float32)
    config = LlavaConfig(vision_config=tower.config, text_config=text_config(), image_token_index=tuning.IMAGE_TOKEN)
    chat = LlavaForConditionalGeneration(config)
    chat.model.vision_tower.load_state_dict(tower.state_dict())
    chat.save_pretrained(folder)
    tuning.make_tokenizer().save_pretrained(folder)


def test_the_readmes_pipeline_beside_clips_of_two_resolutions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "clip-48", 48)
    write_clip(tmp_path / "clip-96", 96)
    for size in (48, 96):
        write_llava(tmp_path / f"llava-{size}", tmp_path / f"clip-{size}")
    captions = pretraining.write_clips(tmp_path / "videos", 4)
    tuning.write_data(tmp_path / "talk", 2)
    few = ["--steps", "1", "--frames", "4", "--workers", "0", "--device", "cpu", "--dtype", "float32"]
    learn = ["pretrain", "--data", str(captions), "--batch-size", "4", "--depth", "2", *few]
    assert main(learn) == 2 and "--clip is missing" in capsys.readouterr().err
    assert main([*learn, "--clip", "clip-48"]) == 0
    found = ["eval", "retrieval", "--data", str(captions), "--branch", "pretrained/branch", "--workers", "0"]
    assert main([*found, "--device", "cpu", "--dtype", "float32"]) == 0  # beside the CLIP that the branch names
    result = json.loads((tmp_path / "retrieval.json").read_text())
    assert result["clip"] == "clip-48" and result["precision"] == "float32"
    tune = ["tune", "--data", "talk/data.json", "--branch", "pretrained/branch", "--batch-size", "2", *few]
    (tmp_path / "llava-96" / "model.safetensors").unlink()  # told from the configurations, not from weights
    capsys.readouterr()
    assert main([*tune, "--model", "llava-96"]) == 2
    error = capsys.readouterr().err
    assert "48 px" in error and "96 px" in error and "--no-require-same-tower" in error
    assert main([*tune, "--model", "llava-48", "--out", "tuned"]) == 0
    ask = ["chat", "--video", "talk/clip0.mp4", "--model", "tuned/tuned", "how is it moving ?", "--max-new-tokens", "2"]
    assert main([*ask, "--frames", "4"]) == 0
