"""Published LLaVA v1 files as Hugging Face's LLaVA, and the splice against the published code's numbers."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from reference_cases import load, relative_error
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel, CheckpointError, to_reference_state_dict
from bt_adapter.chat.attach import attach, attached_branch
from bt_adapter.chat.convert import run as module
from bt_adapter.chat.convert.run import Sources, convert, hugging_face_name, second_layer
from bt_adapter.chat.convert.vicuna import SYSTEM
from bt_adapter.chat.families import family_of
from bt_adapter.commands.cli import main
from bt_adapter.errors import CommandError

WIDTH, HEADS, VISION, VOCABULARY, ROWS = 16, 2, 32, 40, 43  # three rows more than words: [PAD], <im_start>, <im_end>
WORDS = ["<unk>", "<s>", "</s>", "USER", "ASSISTANT", ":", "what", "moves", "?", "it", "left", "."]
CLIP = {
    "hidden_size": VISION, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 24,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip


def published_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(ROWS, WIDTH)}
    for i in range(2):
        at = f"model.layers.{i}."
        for part in "qkvo":
            tensors[f"{at}self_attn.{part}_proj.weight"] = torch.randn(WIDTH, WIDTH) / 4
        tensors[f"{at}self_attn.rotary_emb.inv_freq"] = torch.zeros(WIDTH // HEADS // 2)
        for part, shape in {"gate": (24, WIDTH), "up": (24, WIDTH), "down": (WIDTH, 24)}.items():
            tensors[f"{at}mlp.{part}_proj.weight"] = torch.randn(shape) / 4
        for part in ("input", "post_attention"):
            tensors[f"{at}{part}_layernorm.weight"] = 1 + torch.randn(WIDTH) / 4
    tensors["model.norm.weight"] = 1 + torch.randn(WIDTH) / 4
    tensors["model.mm_projector.weight"] = torch.randn(WIDTH, VISION) / 4
    tensors["model.mm_projector.bias"] = torch.randn(WIDTH)
    tensors["lm_head.weight"] = torch.randn(ROWS, WIDTH)
    return tensors


def llama(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """LLaMA written down: embeddings ``[S, W]`` to logits, of tensors under their published names."""

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * tensors[f"model.{name}.weight"]

    length, half = len(x), WIDTH // HEADS // 2
    angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(half) / half)

    def turn(x):
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    for i in range(2):
        w = {part: tensors[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkvo"}
        h = norm(x, f"layers.{i}.input_layernorm")
        q, k, v = ((h @ w[part].T).view(length, HEADS, -1).transpose(0, 1) for part in "qkv")
        score = turn(q) @ turn(k).transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        score = score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        x = x + (score.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w["o"].T
        h = norm(x, f"layers.{i}.post_attention_layernorm")
        gate, up, down = (tensors[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    return norm(x, "norm") @ tensors["lm_head.weight"].T


def write_published(folder: Path, tensors: dict[str, torch.Tensor], clip: Path, form: str = "bin") -> Path:
    folder.mkdir()
    names = list(tensors)
    parts = [{n: tensors[n] for n in names[: len(names) // 2]}, {n: tensors[n] for n in names[len(names) // 2 :]}]
    stem, ending = ("pytorch_model", "bin") if form == "bin" else ("model", "safetensors")
    weight_map = {}
    for i, part in enumerate(parts):
        file = f"{stem}-{i + 1:05}-of-00002.{ending}"
        torch.save(part, folder / file) if form == "bin" else save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = "pytorch_model.bin.index.json" if form == "bin" else "model.safetensors.index.json"
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {
        "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": HEADS, "vocab_size": ROWS, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "use_cache": False, "tie_word_embeddings": False, "mm_hidden_size": VISION, "mm_vision_tower": str(clip),
        "mm_vision_select_layer": -2, "use_mm_proj": True, "mm_use_im_start_end": True, "torch_dtype": "float16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    words = {word: i for i, word in enumerate(WORDS)} | {f"w{i}": i for i in range(len(WORDS), VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModel(CLIPVisionConfig(**CLIP)).save_pretrained(folder)
    return folder


def load_converted(folder: Path) -> LlavaForConditionalGeneration:
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_logits_are_those_of_the_published_files(tmp_path, clip, form):
    tensors = published_tensors()
    source = write_published(tmp_path / "llava", tensors, clip, form)
    steps = []
    out = convert(Sources(source), tmp_path / "out", lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert not (tmp_path / "out.converting").exists() and not (out / "sources.json").exists()
    model = load_converted(out)
    processor = AutoProcessor.from_pretrained(out)
    tokenizer = processor.tokenizer
    place = model.config.image_token_id
    assert tokenizer.convert_ids_to_tokens([place, 44, 45]) == ["<vid_patch>", "<vid_start>", "<vid_end>"]

    pixels = torch.randn(1, 3, 24, 24)
    ids = torch.tensor([[1, 3, 5, 41, *[place] * 9, 42, 6, 7, 8]])
    with torch.no_grad():
        found = model(input_ids=ids, pixel_values=pixels).logits[0, :, :ROWS]
        tower = CLIPVisionModel.from_pretrained(clip)
        patches = tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        x = tensors["model.embed_tokens.weight"][ids[0].clamp(max=ROWS - 1)]
        x[4:13] = F.linear(patches, tensors["model.mm_projector.weight"], tensors["model.mm_projector.bias"])
        expected = llama(tensors, x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_new_rows_start_as_what_is_known(tmp_path, clip):
    tensors = published_tensors()
    model = load_converted(convert(Sources(write_published(tmp_path / "llava", tensors, clip)), tmp_path / "out"))
    for table, rows in (
        (model.get_input_embeddings().weight, tensors["model.embed_tokens.weight"]),
        (model.lm_head.weight, tensors["lm_head.weight"]),
    ):
        assert torch.equal(table[:ROWS], rows) and len(table) == ROWS + 3
        torch.testing.assert_close(table[ROWS], rows.mean(0))  # <vid_patch>, which nothing reads
        assert torch.equal(table[ROWS + 1 :], rows[41:43])  # <vid_start>, <vid_end> as <im_start>, <im_end>


def test_prompt_is_vicuna_v1_1(tmp_path, clip):
    out = convert(Sources(write_published(tmp_path / "llava", published_tensors(), clip)), tmp_path / "out")
    tokenizer = AutoProcessor.from_pretrained(out).tokenizer

    def text(*messages):
        turns = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    video, image = {"type": "video"}, {"type": "image"}
    asked = [{"type": "text", "text": "what moves ?"}, video]
    seen = "<vid_start><vid_patch><vid_end>"
    assert text(("user", asked)) == f"{SYSTEM} USER: what moves ?\n{seen} ASSISTANT:"
    assert text(("user", asked), ("assistant", "it ."), ("user", "left ?")) == (
        f"{SYSTEM} USER: what moves ?\n{seen} ASSISTANT: it .</s>USER: left ? ASSISTANT:"
    )
    first = [image, {"type": "text", "text": "what ?"}]
    assert text(("system", "w20"), ("user", first)) == ("w20 USER: <im_start><vid_patch><im_end>\nwhat ? ASSISTANT:")


def test_processor_counts_the_models_tokens(tmp_path, clip):
    out = convert(Sources(write_published(tmp_path / "llava", published_tensors(), clip)), tmp_path / "out")
    model, processor = load_converted(out), AutoProcessor.from_pretrained(out)
    image = torch.randint(256, (3, 40, 32), dtype=torch.uint8)
    inputs = processor(images=image, text="<im_start><vid_patch><im_end> what", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 9
    assert model(**inputs).logits.shape[-1] == ROWS + 3


def test_half_precision_stays(tmp_path, clip):
    tensors = {name: t.half() for name, t in published_tensors().items()}
    out = convert(Sources(write_published(tmp_path / "llava", tensors, clip)), tmp_path / "out")
    assert {p.dtype for p in load_converted(out).parameters()} == {torch.float16}


def test_a_stopped_conversion_goes_on(tmp_path, clip, monkeypatch):
    source = write_published(tmp_path / "llava", published_tensors(), clip)
    whole = convert(Sources(source), tmp_path / "whole")
    read = []

    class Reader(module._Reader):
        def tensors(self, path):
            read.append(path.name)
            if len(read) == 2:
                raise KeyboardInterrupt
            return super().tensors(path)

    monkeypatch.setattr(module, "_Reader", Reader)
    with pytest.raises(KeyboardInterrupt):
        convert(Sources(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(Sources(source), tmp_path / "out")
    assert read == ["pytorch_model-00001-of-00002.bin", *["pytorch_model-00002-of-00002.bin"] * 2]
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
        assert oct(file.stat().st_mode) == oct((whole / "config.json").stat().st_mode)


def test_remains_of_another_source_are_not_used(tmp_path, clip):
    aside = tmp_path / "out.converting"
    aside.mkdir()
    (aside / "model-00001-of-00003.safetensors").write_bytes(b"of something else")
    (aside / "sources.json").write_text("{}")
    convert(Sources(write_published(tmp_path / "llava", published_tensors(), clip)), tmp_path / "out")
    load_converted(tmp_path / "out")


def test_a_difference_to_llama_is_added_up(tmp_path, clip):
    whole = published_tensors()
    base = {n: t[:VOCABULARY] if t.shape[0] == ROWS else t for n, t in published_tensors(1).items()}
    base = {n: t for n, t in base.items() if "mm_projector" not in n}
    delta = {}
    for name, tensor in whole.items():
        delta[name] = tensor.clone()
        if name in base:
            delta[name][: len(base[name])] -= base[name]
    source = write_published(tmp_path / "llava-delta", delta, clip)
    llama_folder = write_published(tmp_path / "llama", base, clip, "safetensors")
    with pytest.raises(CommandError, match="--base"):
        convert(Sources(source), tmp_path / "out")
    found = load_converted(convert(Sources(source, base=llama_folder), tmp_path / "out")).state_dict()
    for name, tensor in whole.items():
        if (theirs := hugging_face_name(name)) is not None:
            torch.testing.assert_close(found[theirs][: len(tensor)], tensor, rtol=1e-5, atol=1e-5)


def test_tuned_projector_and_branch(tmp_path, clip):
    """What instruction tuning writes: mm_projector.bin with the embeddings, btadapter_weight.bin of three layers."""
    tower = CLIPVisionModel.from_pretrained(clip)
    branch = BTAdapterVisionModel.from_clip(tower, BTAdapterConfig(depth=4)).eval()
    torch.nn.init.normal_(branch.branch.temporal[0].fc.weight)
    state = to_reference_state_dict(branch)
    names = [n for n in state if "btadapter" in n and ".3." not in n]
    torch.save({f"model.vision_tower.{n}": state[n] for n in names}, tmp_path / "btadapter_weight.bin")
    tuned = {
        "model.mm_projector.weight": torch.randn(WIDTH, VISION),
        "model.mm_projector.bias": torch.randn(WIDTH),
        "model.embed_tokens.weight": torch.randn(ROWS + 3, WIDTH),
    }
    torch.save(tuned, tmp_path / "mm_projector.bin")
    source = write_published(tmp_path / "llava", published_tensors(), clip)
    out = tmp_path / "out"
    sources = Sources(source, projector=tmp_path / "mm_projector.bin", branch=tmp_path / "btadapter_weight.bin")
    with pytest.warns(UserWarning, match="no gates"):
        convert(sources, out)
    model = load_converted(out)
    assert torch.equal(model.get_input_embeddings().weight, tuned["model.embed_tokens.weight"])
    projector = model.model.multi_modal_projector
    x = torch.randn(5, VISION)
    expected = F.linear(x, tuned["model.mm_projector.weight"], tuned["model.mm_projector.bias"])
    torch.testing.assert_close(projector(x), expected)
    attach(model, out / "branch")
    assert attached_branch(model).trained_steps == 50  # a file of the branch alone: tuned at 100 frames
    pixels = torch.randn(1, 4, 3, 24, 24)
    torch.testing.assert_close(attached_branch(model).video_tokens(pixels), branch.video_tokens(pixels))


def test_gates_of_a_tuned_branch_are_the_pretraining_files(tmp_path, clip, capsys):
    branch = BTAdapterVisionModel.from_clip(CLIPVisionModel.from_pretrained(clip), BTAdapterConfig(depth=4)).eval()
    with torch.no_grad():
        branch.branch.merge_gate.normal_(std=0.01)
        branch.branch.output_gate.normal_(std=1e-4)
    state = to_reference_state_dict(branch)
    torch.save({f"backbone.{n}": t for n, t in state.items()}, tmp_path / "pretrained.pth")
    torch.save({n: t for n, t in state.items() if "btadapter" in n and ".3." not in n}, tmp_path / "tuned.bin")
    source = write_published(tmp_path / "llava", published_tensors(), clip)
    command = ["convert", str(source), str(tmp_path / "out"), "--gates", str(tmp_path / "pretrained.pth")]
    assert main(command) == 2 and "--branch" in capsys.readouterr().err
    assert main([*command, "--branch", str(tmp_path / "tuned.bin")]) == 0
    model = attach(load_converted(tmp_path / "out"), tmp_path / "out" / "branch")
    assert torch.equal(attached_branch(model).branch.merge_gate, branch.branch.merge_gate)
    pixels = torch.randn(1, 4, 3, 24, 24)
    torch.testing.assert_close(attached_branch(model).video_tokens(pixels), branch.video_tokens(pixels))


def test_command(tmp_path, clip, capsys):
    source = write_published(tmp_path / "llava", published_tensors(), clip)
    assert main(["convert", str(source), str(tmp_path / "out"), "--clip", str(clip)]) == 0
    assert "model.safetensors.index.json" in capsys.readouterr().err
    load_converted(tmp_path / "out")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "new"), "--trained-frames", "8"]) == 2
    assert "--trained-frames must be above 0 and goes with --branch" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere"), str(tmp_path / "new")]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err
    for name in ("base", "projector", "branch", "gates"):
        assert main(["convert", str(source), str(tmp_path / "new"), f"--{name}", "nowhere"]) == 2
        assert f"--{name} nowhere: there is no such" in capsys.readouterr().err


def test_what_does_not_fit_is_named(tmp_path, clip):
    tensors = published_tensors()
    source = write_published(tmp_path / "strange", {**tensors, "model.qformer.weight": torch.zeros(1)}, clip)
    with pytest.raises(CheckpointError, match=r"model\.qformer\.weight"):
        convert(Sources(source), tmp_path / "out")
    short = {n: t for n, t in tensors.items() if n != "model.norm.weight"}
    with pytest.raises(CheckpointError, match=r"missing: model\.language_model\.norm\.weight"):
        convert(Sources(write_published(tmp_path / "short", short, clip)), tmp_path / "out")
    plain = {n: t for n, t in tensors.items() if "mm_projector" not in n}
    with pytest.raises(CheckpointError, match=r"no model\.mm_projector\.weight"):
        convert(Sources(write_published(tmp_path / "plain", plain, clip)), tmp_path / "out")
    source = write_published(tmp_path / "torn", tensors, clip)
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin, which is missing"):
        convert(Sources(source), tmp_path / "out")
    source = write_published(tmp_path / "llava", tensors, clip)
    for name, shape in (("mm_projector.weight", (WIDTH, VISION + 1)), ("mm_projector.bias", (WIDTH + 1,)),
                        ("embed_tokens.weight", (ROWS, WIDTH + 1))):  # fmt: skip
        torch.save({f"model.{name}": torch.zeros(shape)}, tmp_path / "wide.bin")
        with pytest.raises(
            CommandError, match=rf"--projector .*wide\.bin: model\.{name} has shape .*but the model's has"
        ):
            convert(Sources(source, projector=tmp_path / "wide.bin"), tmp_path / "out")
    torch.save({"model.mm_projector.weight": print}, tmp_path / "evil.bin")
    with pytest.raises(CheckpointError, match="weights_only=True"):
        convert(Sources(source, projector=tmp_path / "evil.bin"), tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        (source / "config.json").unlink()
        convert(Sources(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The published code's splice (golden numbers)

PROMPTS = ("startend", "nostartend", "mixed")  # two_videos: test_two_videos_keep_both


@pytest.fixture(scope="module")
def golden() -> LlavaForConditionalGeneration:
    """The golden weights in Hugging Face's LLaVA, by the names and the projector that a conversion gives them."""
    case = load("chat_splice")
    size = case.config
    text = LlamaConfig(
        vocab_size=size["vocab"], hidden_size=size["hidden"], intermediate_size=size["inter"],
        num_hidden_layers=size["layers"], num_attention_heads=size["heads"], rms_norm_eps=1e-6, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=size["mm_hidden"], intermediate_size=8, num_hidden_layers=1, num_attention_heads=16, image_size=8,
        patch_size=8,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=size["vid_patch"],
        projector_hidden_act="linear",
    )
    model = LlavaForConditionalGeneration(config).eval()
    state = {hugging_face_name(name): tensor for name, tensor in case.weights.items()}
    result = model.load_state_dict({**state, **second_layer(size["hidden"], torch.float32)}, strict=False)
    assert not result.unexpected_keys and all("vision_tower" in name for name in result.missing_keys)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    model.model.multi_modal_projector.linear_1.requires_grad_(True)
    return model


def run_golden(model, prompt: str, features: torch.Tensor, monkeypatch):
    """The model on a golden prompt, with features in the place of video tokens: our projection, its own splice."""
    case, family = load("chat_splice"), family_of(model)
    seen = {}

    def hear(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    monkeypatch.setattr(
        model.model,
        "get_image_features",
        lambda pixel_values, **_: BaseModelOutputWithPooling(pooler_output=list(family.project(pixel_values))),
    )
    handle = model.model.language_model.register_forward_pre_hook(hear, with_kwargs=True)
    inputs = {key: case[f"{prompt}.inputs.{key}"] for key in ("input_ids", "attention_mask", "labels")}
    model.zero_grad()
    output = model(pixel_values=features, **inputs)
    handle.remove()
    return seen["embeds"], output


def check_output(golden, prompt: str, embeds: torch.Tensor, output) -> None:
    """Embeddings after the splice, logits, loss and gradients against the published code's."""
    case = load("chat_splice")
    assert relative_error(embeds, case[f"{prompt}.outputs.inputs_embeds"]) <= 2e-5
    assert relative_error(output.logits, case[f"{prompt}.outputs.logits"]) <= 2e-5
    expected = case[f"{prompt}.losses.loss"]
    assert float((output.loss.detach() - expected).abs() / expected) <= 2e-5
    output.loss.backward()
    projector = golden.model.multi_modal_projector.linear_1
    gradients = {
        "model.embed_tokens.weight": golden.get_input_embeddings().weight.grad,
        "model.mm_projector.weight": projector.weight.grad,
        "model.mm_projector.bias": projector.bias.grad,
    }
    recorded = case.gradients(f"{prompt}.grads.")
    assert len(recorded) >= 2
    for name, gradient in recorded.items():
        assert relative_error(gradients[name], gradient) <= 1e-3, name


@pytest.mark.parametrize("prompt", PROMPTS)
def test_splice_is_the_published_codes(golden, prompt, monkeypatch):
    case = load("chat_splice")
    features = case[f"{prompt}.inputs.features"]
    ids = case[f"{prompt}.inputs.input_ids"]
    if prompt == "mixed":  # the published code spends a row's features even where the row has no video
        features = features[(ids == case.config["vid_patch"]).any(1)]
    embeds, output = run_golden(golden, prompt, features, monkeypatch)
    check_output(golden, prompt, embeds, output)


def test_two_videos_keep_both(golden, monkeypatch):
    """The published code keeps a prompt's last video alone: its numbers come back where the first is left out."""
    case = load("chat_splice")
    ids, features = case["two_videos.inputs.input_ids"], case["two_videos.inputs.features"]
    theirs = case["two_videos.outputs.inputs_embeds"]
    length = case.config["video_len"]
    embeds, output = run_golden(golden, "two_videos", features, monkeypatch)
    places = (ids[0] == case.config["vid_patch"]).nonzero().flatten()
    assert len(places) == 2 * length
    first, last = places[:length], places[length:]
    projected = family_of(golden).project(features).detach()
    assert relative_error(embeds[0, first], projected[0]) <= 2e-5
    assert relative_error(embeds[0, last], theirs[0, last]) <= 2e-5
    patch = case.weights["model.embed_tokens.weight"][case.config["vid_patch"]]
    assert torch.equal(theirs[0, first], patch.expand(length, -1))  # the video is not there

    golden.zero_grad()
    alone = golden.get_input_embeddings()(ids).clone()
    alone[0, last] = family_of(golden).project(features[1:])[0]
    told = {key: case[f"two_videos.inputs.{key}"] for key in ("attention_mask", "labels")}
    dropped = golden(inputs_embeds=alone, **told)
    check_output(golden, "two_videos", alone, dropped)
    assert relative_error(output.logits, dropped.logits.detach()) > 1e-2


def test_written_weights_are_whole(tmp_path, clip):
    out = convert(Sources(write_published(tmp_path / "llava", published_tensors(), clip)), tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    found = {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index == found
