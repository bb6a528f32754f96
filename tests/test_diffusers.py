"""Motion modules of diffusers on the ops of bt_kernels: results and gradients of the models as they are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from op_cases import assert_all_close, normal, results, scattered
from torch import Tensor, nn


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
