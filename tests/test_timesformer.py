"""TimeSformer of transformers on the ops of bt_kernels: results and gradients of the model as it is."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from op_cases import assert_all_close, normal, results, scattered
from torch import Tensor, nn

import bt_kernels


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
