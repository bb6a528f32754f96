"""Models of other packages on the ops of bt_kernels: results and gradients of the models as they are."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from op_cases import seeded
from torch import Tensor, nn

import bt_kernels


def scattered(module: nn.Module, deviation: float = 0.05) -> nn.Module:
    """``module`` with every parameter drawn around where it started: a zero start would hide errors."""
    generator = seeded(0)
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * deviation)
    return module


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def results(run, leaves: list[Tensor]) -> list[Tensor]:
    """The result of ``run()`` and the gradients of a weighted sum of it."""
    out = run()
    loss = (out * normal(*out.shape, dtype=out.dtype, seed=2)).sum()
    return [out.detach(), *torch.autograd.grad(loss, leaves)]


def assert_all_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Each within ``tolerance`` of the largest value of what is expected.

    A key bias has the gradient 0, so what is expected is rounding alone: hence a floor beside the largest of all.
    """
    floor = 1e-14 * max(tensor.abs().max().item() for tensor in expected)
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        error, largest = (one - other).abs().max().item(), other.abs().max().item()
        assert error <= tolerance * largest + floor, f"tensor {number}: error {error} of {largest}"


class TestTimesformer:
    @pytest.fixture(autouse=True)
    def _needs_transformers(self):
        pytest.importorskip("transformers.models.timesformer", reason="transformers is not installed")

    def model(self, dtype: torch.dtype = torch.float64, kind: str = "TimesformerModel", **settings) -> nn.Module:
        import transformers

        sizes = dict(
            image_size=24, patch_size=8, num_frames=3, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        config = transformers.TimesformerConfig(**{**sizes, **settings})
        torch.manual_seed(0)
        return scattered(getattr(transformers, kind)(config)).to(dtype).eval()

    def compare(self, model: nn.Module, pixels: Tensor, tolerance: float, seed: int = 0) -> None:
        """The model as it is and on the kernels, in its present mode and under one seed."""
        from bt_kernels.integrations import timesformer

        pixels.requires_grad_()
        leaves = [pixels, *model.parameters()]

        def run() -> Tensor:
            torch.manual_seed(seed)
            return model(pixels)[0]

        expected = results(run, leaves)
        assert timesformer.use(model) is model
        got = results(run, leaves)
        assert timesformer.restore(model) is model
        assert_all_close(got, expected, tolerance)
        assert torch.equal(run(), expected[0])

    @pytest.mark.parametrize("kind", ["TimesformerModel", "TimesformerForVideoClassification"])
    def test_same_in_float64(self, kind):
        self.compare(self.model(kind=kind), normal(2, 3, 3, 24, 24, dtype=torch.float64), 1e-11)

    def test_same_at_true_shape(self):
        """One layer of timesformer-base: width 768, 12 heads, 8 frames of 14 x 14 patches."""
        model = self.model(
            torch.float32, image_size=224, patch_size=16, num_frames=8, hidden_size=768, num_hidden_layers=1,
            num_attention_heads=12, intermediate_size=3072,
        )  # fmt: skip
        self.compare(model, normal(1, 8, 3, 224, 224), 1e-5)

    def test_same_without_qkv_bias(self):
        self.compare(self.model(qkv_bias=False), normal(1, 3, 3, 24, 24, dtype=torch.float64), 1e-11)

    def test_same_residuals_drop(self):
        """Stochastic depth in training: under one seed the same residuals, CLS's mean over dropped frames included."""
        model = self.model().train()
        from transformers.models.timesformer.modeling_timesformer import TimesformerDropPath

        for layer in model.encoder.layer:
            layer.drop_path = TimesformerDropPath(0.5).train()
        for seed in range(4):
            self.compare(model, normal(2, 3, 3, 24, 24, dtype=torch.float64), 1e-11, seed)

    def test_gradient_checkpointing(self):
        from bt_kernels.integrations import timesformer

        model = self.model().train()
        pixels = normal(2, 3, 3, 24, 24, dtype=torch.float64)
        leaves = list(model.parameters())
        expected = results(lambda: model(pixels)[0], leaves)
        timesformer.use(model)
        for layer in model.encoder.layer:  # what the model's own switch sets
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
        assert_all_close(results(lambda: model(pixels)[0], leaves), expected, 1e-11)

    def test_nothing_else_changes(self):
        from bt_kernels.integrations import timesformer

        model = self.model()
        pixels = normal(1, 3, 3, 24, 24, dtype=torch.float64)
        names, expected = list(model.state_dict()), model(pixels)[0]
        timesformer.use(timesformer.use(model))
        assert list(model.state_dict()) == names
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert {type(layer).__name__ for layer in other.encoder.layer} == {"KernelTimesformerLayer"}
            torch.testing.assert_close(other(pixels)[0], expected)
        assert len(model(pixels, output_hidden_states=True).hidden_states) == 4

    def test_the_ops_run(self, monkeypatch):
        """A forced backend that cannot run is seen: the attentions do go through the ops."""
        from bt_kernels.integrations import timesformer

        model, pixels = self.model(), normal(1, 3, 3, 24, 24, dtype=torch.float64)
        monkeypatch.setenv("BT_KERNELS_BACKEND", "cuda")
        model(pixels)
        timesformer.use(model)
        with pytest.raises(bt_kernels.BackendUnavailable):
            model(pixels)

    def test_compiles_whole_layer(self):
        from bt_kernels.integrations import timesformer

        layer = timesformer.use(self.model()).encoder.layer[0]
        tokens = normal(2, 28, 16, dtype=torch.float64)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens)[0], layer(tokens)[0])
        torch.compiler.reset()

    def test_adapters_inside_stay(self):
        """LoRA on the projections: they are called as modules."""
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=2, target_modules=["qkv", "attention.output.dense"], init_lora_weights=False)
        self.compare(
            peft.get_peft_model(self.model(), config).requires_grad_(True),
            normal(1, 3, 3, 24, 24, dtype=torch.float64),
            1e-11,
        )

    @pytest.mark.parametrize("attention_type", ["space_only", "joint_space_time"])
    def test_refuses_other_attention(self, attention_type):
        from bt_kernels.integrations import timesformer

        model = self.model(attention_type=attention_type)
        with pytest.raises(ValueError, match=f"divided_space_time.*{attention_type}"):
            timesformer.use(model)
        assert {type(layer).__name__ for layer in model.encoder.layer} == {"TimesformerLayer"}

    def test_refuses_other_models(self):
        from bt_kernels.integrations import timesformer

        with pytest.raises(ValueError, match="model.*Linear holds no TimesformerLayer"):
            timesformer.use(nn.Linear(2, 2))
        with pytest.raises(TypeError, match="model.*str"):
            timesformer.use("facebook/timesformer-base-finetuned-k400")

    @pytest.mark.parametrize("setting", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
    def test_dropout(self, setting):
        """Without effect in evaluation, refused in training."""
        from bt_kernels.integrations import timesformer

        pixels = normal(1, 3, 3, 24, 24, dtype=torch.float64)
        model = self.model(**{setting: 0.1})
        self.compare(model, pixels, 1e-11)
        timesformer.use(model).train()
        with pytest.raises(ValueError, match=f"{setting} must be 0 in training.*0.1"):
            model(pixels)

    def test_refuses_attention_probabilities(self):
        from bt_kernels.integrations import timesformer

        model = timesformer.use(self.model())
        with pytest.raises(ValueError, match="output_attentions.*restore"):
            model(normal(1, 3, 3, 24, 24, dtype=torch.float64), output_attentions=True)

    def test_refuses_parts_of_frames(self):
        from bt_kernels.integrations import timesformer

        layer = timesformer.use(self.model()).encoder.layer[0]
        with pytest.raises(ValueError, match=r"hidden_states.*num_frames = 3.*\[1, 27, 16\]"):
            layer(normal(1, 27, 16, dtype=torch.float64))


class TestBlockIsATimesformerLayer:
    def test_same_with_its_weights(self):
        """bt_kernels.nn's block with a TimeSformer layer's weights, name by name."""
        modeling = pytest.importorskip(
            "transformers.models.timesformer.modeling_timesformer", reason="transformers is not installed"
        )
        from transformers import TimesformerConfig

        config = TimesformerConfig(
            image_size=24, patch_size=8, num_frames=3, hidden_size=16, num_attention_heads=2, intermediate_size=64
        )
        layer = scattered(modeling.TimesformerLayer(config, 0)).double()
        block = bt_kernels_block(16, 2)
        names = {
            "temporal_layernorm": "temporal_norm",
            "temporal_attention.attention.qkv": "temporal_attention.qkv",
            "temporal_attention.output.dense": "temporal_attention.out",
            "temporal_dense": "temporal_fc",
            "layernorm_before": "spatial_norm",
            "attention.attention.qkv": "spatial_attention.qkv",
            "attention.output.dense": "spatial_attention.out",
            "layernorm_after": "mlp_norm",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
        }
        state = {f"{names[key.rsplit('.', 1)[0]]}.{key.rsplit('.', 1)[1]}": t for key, t in layer.state_dict().items()}
        block.load_state_dict(state)
        tokens = normal(2, 28, 16, dtype=torch.float64)
        torch.testing.assert_close(block(tokens, frames=3), layer(tokens)[0], rtol=1e-11, atol=1e-11)


def bt_kernels_block(dim: int, heads: int) -> nn.Module:
    from bt_kernels.nn import DividedSpaceTimeBlock

    return DividedSpaceTimeBlock(dim, heads, dtype=torch.float64)


class TestDiffusers:
    @pytest.fixture(autouse=True)
    def _needs_diffusers(self):
        pytest.importorskip("diffusers", reason="diffusers is not installed")

    def attention(self, dtype: torch.dtype = torch.float64, **settings):
        from diffusers.models.attention_processor import Attention

        torch.manual_seed(0)
        sizes = {"query_dim": 12, "heads": 3, "dim_head": 4}
        return scattered(Attention(**{**sizes, **settings})).to(dtype)

    def motion(self, channels: int, heads: int, dtype: torch.dtype, **settings):
        from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D

        torch.manual_seed(0)
        module = AnimateDiffTransformer3D(
            num_attention_heads=heads, attention_head_dim=channels // heads, in_channels=channels, norm_num_groups=4,
            positional_embeddings="sinusoidal", num_positional_embeddings=32, **settings,
        )  # fmt: skip
        return scattered(module).to(dtype)

    def compare(self, model: nn.Module, run, inputs: Tensor, tolerance: float, count: int) -> None:
        """``run()`` with diffusers' processors and with ours, on ``count`` attentions."""
        from bt_kernels.integrations import diffusers as ours

        leaves = [inputs.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
        before = {name: type(p) for name, p in processors(model).items()}
        expected = results(run, leaves)
        assert ours.use(model) is model
        changed = [p for p in processors(model).values() if isinstance(p, ours.TemporalAttnProcessor)]
        assert len(changed) == count
        got = results(run, leaves)
        assert_all_close(got, expected, tolerance)
        assert ours.restore(model) is model
        assert {name: type(p) for name, p in processors(model).items()} == before
        assert torch.equal(run().detach(), expected[0])

    def test_same_motion_module_at_true_shape(self):
        """AnimateDiff's first block: 320 channels, 8 heads, 16 frames; both self-attentions."""
        module = self.motion(320, 8, torch.float32)
        x = normal(16, 320, 6, 5)
        self.compare(module, lambda: module(x, num_frames=16), x, 1e-5, count=2)

    def test_same_in_float64(self):
        module = self.motion(16, 2, torch.float64, num_layers=2, attention_bias=True)
        x = normal(2 * 3, 16, 2, 3, dtype=torch.float64)
        self.compare(module, lambda: module(x, num_frames=3), x, 1e-11, count=4)

    def test_same_unet(self):
        """A whole motion UNet: 6 motion modules of 2 attentions; spatial and cross-attention stay as they were."""
        from diffusers import UNetMotionModel

        torch.manual_seed(0)
        unet = UNetMotionModel(
            block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), num_attention_heads=2, sample_size=8,
            motion_num_attention_heads=2,
        )  # fmt: skip
        unet = scattered(unet, 0.02).double()
        x, text = normal(1, 4, 3, 8, 8, dtype=torch.float64), normal(3, 4, 8, dtype=torch.float64)
        motion = sum("motion_modules" in name for name in processors(unet))
        assert 0 < motion < len(processors(unet))
        self.compare(unet, lambda: unet(x, torch.tensor([7]), text).sample, x, 1e-10, count=motion)

    def test_motion_adapter(self):
        from diffusers import MotionAdapter

        from bt_kernels.integrations import diffusers as ours

        adapter = MotionAdapter(block_out_channels=(8, 16), motion_norm_num_groups=4, motion_num_attention_heads=2)
        names = list(adapter.state_dict())
        ours.use(adapter)
        assert {type(p) for p in processors(adapter).values()} == {ours.TemporalAttnProcessor}
        assert list(adapter.state_dict()) == names

    def test_same_stable_video_diffusion_block(self):
        """Its first attention is over frames; the second, cross-attention, stays as it was."""
        from diffusers.models.attention import TemporalBasicTransformerBlock

        torch.manual_seed(0)
        block = scattered(TemporalBasicTransformerBlock(16, 16, 2, 8, cross_attention_dim=6)).double()
        x, context = normal(2 * 3, 5, 16, dtype=torch.float64), normal(2 * 5, 1, 6, dtype=torch.float64)
        self.compare(block, lambda: block(x, 3, context), x, 1e-11, count=1)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"bias": True}, {"residual_connection": True, "rescale_output_factor": 2.0}, {"out_bias": False}],
        ids=["plain", "bias", "residual", "no_out_bias"],
    )
    def test_same_attention(self, settings):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn = self.attention(**settings)
        x = normal(10, 5, 12, dtype=torch.float64).requires_grad_()
        leaves = [x, *attn.parameters()]
        expected = results(lambda: attn(x), leaves)
        attn.set_processor(TemporalAttnProcessor())
        assert_all_close(results(lambda: attn(x), leaves), expected, 1e-11)

    def test_strided_states(self):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn, x = self.attention(), normal(5, 10, 12, dtype=torch.float64).transpose(0, 1)
        expected = attn(x)
        attn.set_processor(TemporalAttnProcessor())
        torch.testing.assert_close(attn(x), expected)

    def test_more_sequences_than_a_grid_has_blocks(self):
        """70,000 sequences of 2 frames: past the 65,535 that SDPA takes on CUDA. And none at all."""
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn = self.attention(torch.float32, query_dim=4, heads=2, dim_head=2)
        x = normal(70_000, 2, 4).requires_grad_()
        expected = results(lambda: attn(x), [x])
        attn.set_processor(TemporalAttnProcessor())
        assert_all_close(results(lambda: attn(x), [x]), expected, 1e-5)
        assert attn(x[:0]).shape == (0, 2, 4)

    def test_qkv_is_a_view(self, monkeypatch):
        """The op reads the projection's own memory, and writes what the output projection reads."""
        from bt_kernels.integrations import diffusers as ours

        pointers = []
        linear, attend = torch.nn.functional.linear, ours.temporal_attention

        def watched_linear(x, *rest):
            pointers.append(x.data_ptr())
            out = linear(x, *rest)
            pointers.append(out.data_ptr())
            return out

        def watched_attention(qkv, visible):
            pointers.append(qkv.data_ptr())
            out = attend(qkv, visible)
            pointers.append(out.data_ptr())
            return out

        monkeypatch.setattr(torch.nn.functional, "linear", watched_linear)
        monkeypatch.setattr(ours, "temporal_attention", watched_attention)
        attn = self.attention()
        attn.set_processor(ours.TemporalAttnProcessor())
        attn(normal(10, 5, 12, dtype=torch.float64))
        _, product, read, written, projected, _ = pointers
        assert product == read and written == projected

    def test_fused_projections(self):
        """to_qkv is used where diffusers would use it, and to_q again once it is unfused, in any order of calls."""
        from diffusers.models.attention_processor import FusedAttnProcessor2_0

        from bt_kernels.integrations import diffusers as ours

        module = self.motion(16, 2, torch.float64)
        x = normal(3, 16, 2, 3, dtype=torch.float64)
        block = module.transformer_blocks[0]
        for attn in (block.attn1, block.attn2):
            attn.fuse_projections()
            attn.to_q.weight.data.mul_(2)  # tells the fused copy from the original
            attn.set_processor(FusedAttnProcessor2_0())
        fused = module(x, num_frames=3)
        ours.use(module)
        torch.testing.assert_close(module(x, num_frames=3), fused)
        ours.restore(module)
        for attn in (block.attn1, block.attn2):
            attn.set_processor(ours.TemporalAttnProcessor())
        unfused = module(x, num_frames=3)
        assert not torch.allclose(unfused, fused)
        ours.restore(module)
        torch.testing.assert_close(module(x, num_frames=3), unfused)

    def test_lora_counts(self):
        """An adapter on the projections is applied, not passed over."""
        peft = pytest.importorskip("peft", reason="peft is not installed")
        module = self.motion(16, 2, torch.float64)
        x = normal(3, 16, 2, 3, dtype=torch.float64)
        plain = module(x, num_frames=3)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0"], init_lora_weights=False)
        adapted = peft.inject_adapter_in_model(config, module).double()
        assert not torch.allclose(adapted(x, num_frames=3), plain)
        self.compare(adapted, lambda: adapted(x, num_frames=3), x, 1e-11, count=2)

    def test_hooks_count(self):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn, x = self.attention(), normal(4, 3, 12, dtype=torch.float64)
        attn.to_k.register_forward_hook(lambda module, args, out: 2 * out)
        expected = attn(x)
        attn.set_processor(TemporalAttnProcessor())
        torch.testing.assert_close(attn(x), expected)

    def test_dropout_behind_the_projection(self):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn, x = self.attention(dropout=0.5).train(), normal(4, 3, 12, dtype=torch.float64)
        torch.manual_seed(0)
        expected = attn(x)
        attn.set_processor(TemporalAttnProcessor())
        torch.manual_seed(0)
        torch.testing.assert_close(attn(x), expected)

    def test_copies_and_pickles(self):
        from bt_kernels.integrations import diffusers as ours

        module = ours.use(self.motion(16, 2, torch.float64))
        x = normal(3, 16, 2, 3, dtype=torch.float64)
        expected = module(x, num_frames=3)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert {type(p) for p in processors(other).values()} == {ours.TemporalAttnProcessor}
            assert torch.equal(other(x, num_frames=3), expected)
        assert "previous=AttnProcessor2_0" in repr(module.transformer_blocks[0].attn1.processor)

    def test_autocast_and_half(self):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        attn, x = self.attention(torch.float32), normal(10, 5, 12)
        expected = attn(x)
        attn.set_processor(TemporalAttnProcessor())
        with torch.autocast("cpu", torch.bfloat16):
            assert attn(x).dtype == torch.bfloat16
            assert_all_close([attn(x).float()], [expected], 0.03)
        assert_all_close([attn.half()(x.half()).float()], [expected], 0.01)

    def test_compiles_whole(self):
        from bt_kernels.integrations.diffusers import use

        module = use(self.motion(16, 2, torch.float32))
        x = normal(3, 16, 2, 3)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, num_frames=3), module(x, num_frames=3))
        attn = module.transformer_blocks[0].attn1
        compiled = torch.compile(attn, fullgraph=True, backend="aot_eager", dynamic=True)
        for pixels in (5, 7, 11, 1):
            torch.testing.assert_close(compiled(x := normal(pixels, 4, 16)), attn(x))
        torch.compiler.reset()

    def test_refuses_what_it_does_not_compute(self):
        from bt_kernels.integrations.diffusers import TemporalAttnProcessor

        x = normal(4, 3, 12, dtype=torch.float64)
        attn = self.attention()
        attn.set_processor(TemporalAttnProcessor())
        with pytest.raises(ValueError, match="encoder_hidden_states must be None"):
            attn(x, encoder_hidden_states=x)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            attn(x, attention_mask=torch.zeros(4, 1, 3))
        with pytest.raises(ValueError, match=r"hidden_states.*\[4, 12, 3, 3\]"):
            attn(normal(4, 12, 3, 3, dtype=torch.float64))
        attn.set_processor(TemporalAttnProcessor(fused=True))
        with pytest.raises(ValueError, match="attn.*fuse_projections"):
            attn(x)
        for settings, words in (
            ({"cross_attention_dim": 12}, "cross-attention"),
            ({"qk_norm": "layer_norm"}, "normalises queries"),
            ({"kv_heads": 1}, "fewer key heads"),
            ({"scale_qk": False}, "does not scale"),
            ({"norm_num_groups": 4}, "group or spatial norm"),
        ):
            attn = self.attention(**settings)
            attn.set_processor(TemporalAttnProcessor())
            with pytest.raises(ValueError, match=f"attn must be plain self-attention.*{words}"):
                attn(x)

    def test_use_refuses(self):
        """Models without motion modules, and processors that may compute something else; nothing is changed then."""
        from bt_kernels.integrations import diffusers as ours

        with pytest.raises(ValueError, match="model.*Linear holds none"):
            ours.use(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"model.*pipe\.unet.*str"):
            ours.use("a pipeline")

        class Special:
            def __call__(self, attn, hidden_states, **rest):
                return hidden_states

        module = self.motion(16, 2, torch.float64)
        module.transformer_blocks[0].attn2.set_processor(Special())
        with pytest.raises(ValueError, match="transformer_blocks.0.attn2 has the processor Special"):
            ours.use(module)
        assert not any(isinstance(p, ours.TemporalAttnProcessor) for p in processors(module).values())


def processors(model: nn.Module) -> dict:
    """Every attention processor in ``model``, by the name of its layer."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
