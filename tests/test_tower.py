"""How the frozen tower runs: in chunks over one state, in other precisions, compiled, as CUDA graphs."""

import copy
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from small_models import EVA, SIZES, make, shake, video
from torch.utils._python_dispatch import TorchDispatchMode

from bt_adapter.towers import attention, cuda_graph, fp8, layers, rows
from bt_adapter.towers.tower import Tower
from bt_kernels import VisibleTokens, linear_add

towers = pytest.mark.parametrize("config", [SIZES, EVA], ids=["clip", "eva"])


@towers
def test_chunks_change_nothing(config):
    model = shake(make(config, depth=3)).double()
    pixels = video(5).double()
    whole = model(pixels), model.video_tokens(pixels), model.frame_mean_tokens(pixels)
    model.tower.optimize(chunk=3)
    parts = model(pixels), model.video_tokens(pixels), model.frame_mean_tokens(pixels)
    torch.testing.assert_close(parts[0].backbone_tokens, whole[0].backbone_tokens, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[0].video_embeds, whole[0].video_embeds, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts[1:], whole[1:], rtol=1e-12, atol=1e-12)


class LargestResult(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, (tuple, list)) else (result,)
        self.elements = max([self.elements, *(r.numel() for r in results if isinstance(r, torch.Tensor))])
        return result


@pytest.mark.parametrize("chunk", [1, 4])
def test_chunks_bound_what_a_layer_allocates(chunk):
    model = make(depth=2)
    model.tower.optimize(chunk=chunk)
    images = video(8, batch=4).flatten(0, 1)
    with LargestResult() as seen:
        model.tower.run(images, 2)
    state = images.shape[0] * 17 * 32
    assert seen.elements == max(state, chunk * 17 * 64)  # all states once, a chunk's MLP
    x = torch.randn(32, 17, 32)
    with LargestResult() as seen:
        assert model.tower.run_layer(2, x) is x
    assert seen.elements <= max(chunk * 17 * 64, x.numel())


@pytest.mark.parametrize("start_layer", [0, None])
def test_stored_features_are_left_as_they_are(start_layer):
    model = shake(make(depth=3))
    features = torch.randn(2, 4, 17, 32)
    before = features.clone()
    model.video_tokens(features=features, start_layer=start_layer)
    assert torch.equal(features, before)


def test_plain_layers_keep_what_the_tower_writes_over():
    model = shake(make(depth=3, fused=False))
    visible = VisibleTokens.tube(2, 16, 4, 0.5)
    output = model(video(), visible)
    output.branch_tokens.square().sum().backward()  # an in-place change would be an error here
    assert model.branch.merge_gate.grad.abs().sum() > 0


@pytest.mark.parametrize("branch", [True, False])
def test_progress_counts_every_chunk_of_every_layer(branch):
    model = make(depth=3)
    model.tower.optimize(chunk=3)
    seen = []
    encode = model.video_tokens if branch else model.frame_mean_tokens
    encode(video(4), progress=lambda done, total: seen.append((done, total)))
    total = 3 * 3 + (2 if branch else 0)  # 8 images, tower layers 0-2, branch layers 0-1
    assert seen == [(i + 1, total) for i in range(total)]


@towers
def test_half_precision_tower_beside_a_float32_branch(config):
    model = shake(make(config, depth=3))
    exact = model(video())
    model.tower.optimize(dtype=torch.bfloat16)
    output = model(video())
    assert output.backbone_tokens.dtype == torch.bfloat16 and output.branch_tokens.dtype == torch.float32
    similarity = F.cosine_similarity(output.video_embeds.float(), exact.video_embeds, dim=-1)
    assert similarity.min() > 0.999
    losses = model.pretraining_losses(output, torch.randn(2, 24))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.branch.parameters())


@towers
@pytest.mark.parametrize("batch", [1, 9], ids=["one chunk", "three chunks"])
def test_autocast_changes_nothing_in_a_frozen_tower(config, batch):
    tower = make(config, depth=3).tower
    tower.optimize(chunk=4)
    images = video(1, batch=batch).flatten(0, 1)
    expected = tower.run_layer(2, tower.run(images, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tower.run_layer(2, tower.run(images, 2)), expected)


@towers
def test_eight_bits(config, tmp_path):
    model = shake(make(config, depth=3))
    exact = model(video())
    stored = sum(p.numel() * p.element_size() for p in model.tower.layers.parameters())
    model.tower.optimize(dtype=torch.bfloat16, fp8=True)
    bytes_now = sum(t.numel() * t.element_size() for t in model.tower.layers.state_dict().values())
    assert bytes_now < 0.35 * stored
    assert not [n for n, p in model.tower.layers.named_parameters() if p.ndim == 2]
    output = model.to(torch.bfloat16)(video())
    similarity = F.cosine_similarity(output.video_embeds.float(), exact.video_embeds, dim=-1)
    assert 0.99 < similarity.min() < 0.999999
    scales = [buffer for name, buffer in model.tower.named_buffers() if name.endswith("scale_bits")]
    assert scales and all(scale.dtype == torch.int32 for scale in scales), "not rounded by .to(torch.bfloat16)"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="include_tower must be False"):
        model.save_pretrained(tmp_path, include_tower=True)


def test_eight_bits_need_sides_of_sixteen():
    model = make({**SIZES, "intermediate_size": 72})
    with pytest.raises(ValueError, match=r"multiples of 16, but is \[72, 32\]"):
        model.tower.optimize(fp8=True)
    assert not model.tower.is_fp8 and isinstance(model.tower.layers[0].attention.q_proj.weight, torch.nn.Parameter)


def test_eight_bits_quantise_an_input_once(monkeypatch):
    model = make(depth=3)
    model.tower.optimize(dtype=torch.bfloat16, fp8=True)
    inputs, quantise = [], fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda rows: inputs.append(rows.shape) or quantise(rows))
    model.tower.run_layer(3, torch.randn(2, 17, 32, dtype=torch.bfloat16))
    assert inputs == [(34, 32), (34, 32), (34, 32), (34, 64)], "of the two norms, out_proj and fc2"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_eight_bits_add_the_bias(dtype):
    """In the product or behind it: the product of what was quantised, plus the bias, rounded to bfloat16."""
    weight, x = fp8.Fp8Weight(torch.randn(48, 32)), torch.randn(2, 5, 32, dtype=dtype)
    bias = torch.randn(48, dtype=dtype)
    values, scale = fp8.quantize_rows(x.flatten(0, 1))
    of_weight = weight.get_buffer("bytes").view(torch.float8_e4m3fn).double()
    of_weight = of_weight * weight.get_buffer("scale_bits").view(torch.float32).t()
    exact = (values.double() * scale @ of_weight.t()).unflatten(0, (2, 5))
    for given, expected in ((bias, exact + bias), (None, exact)):
        got = weight.linear(x, given)
        assert got.dtype == dtype and got.shape == (2, 5, 48)
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=2**-7 * exact.abs().max().item())


def test_compiled_layers():
    model = shake(make(depth=3))
    expected = model.video_tokens(video())
    model.tower.optimize(compile=True)
    torch.testing.assert_close(model.video_tokens(video()), expected, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


def test_bad_options():
    tower = make().tower
    with pytest.raises(ValueError, match="chunk must be a positive int, but is 0"):
        tower.optimize(chunk=0)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="graphs needs the tower on a CUDA device, but it is on cpu"):
            tower.optimize(graphs=True)


@towers
@torch.no_grad()
def test_row_kernels_change_nothing(config, monkeypatch):
    model = make(config, depth=3).double()
    model.tower.optimize(chunk=3)
    pixels = video(5).double()
    expected = model(pixels).backbone_tokens
    monkeypatch.setattr(rows, "has_kernels", lambda x: True)
    torch.testing.assert_close(model(pixels).backbone_tokens, expected, rtol=1e-12, atol=1e-12)


@towers
@torch.no_grad()
def test_products_of_bt_kernels_change_nothing(config, monkeypatch):
    model = make(config, depth=3).double()
    model.tower.optimize(chunk=3)
    pixels = video(5).double()
    expected = model(pixels).backbone_tokens
    monkeypatch.setattr(rows, "has_kernels", lambda x: True)
    called = []
    monkeypatch.setattr(layers, "linear_add", lambda *args: called.append(args) or linear_add(*args))
    with monkeypatch.context() as patched:
        patched.setattr(Tower, "device", torch.device("cuda"))
        assert model.tower.optimize(products="bt_kernels").products == "bt_kernels"
    torch.testing.assert_close(model(pixels).backbone_tokens, expected, rtol=1e-12, atol=1e-12)
    assert len(called) == 4 * len(model.tower.layers), "each layer of each of four chunks"


def test_products_of_bt_kernels_are_obeyed_or_refused(monkeypatch):
    tower = make().tower
    with pytest.raises(ValueError, match="products must be 'torch' or 'bt_kernels', but is 'cublas'"):
        tower.optimize(products="cublas")
    with pytest.raises(ValueError, match="needs the tower on a GPU, but it is on the CPU"):
        tower.optimize(products="bt_kernels")
    monkeypatch.setattr(Tower, "device", torch.device("cuda"))
    for other in ("fp8", "compile"):
        with pytest.raises(ValueError, match=f"but {other} is set"):
            tower.optimize(products="bt_kernels", **{other: True})
    assert tower.products == "torch" and not tower.is_fp8 and all(map(layers.is_eager, tower.layers))
    tower.graphs = recorded = cuda_graph.GraphCache()
    tower.optimize(products="bt_kernels")
    assert tower.graphs is not recorded, "they recorded other products"
    with pytest.raises(ValueError, match="but compile is set"):
        tower.optimize(compile=True)
    tower.layers[0].fc1.register_forward_hook(lambda module, args, output: output)
    with pytest.raises(ValueError, match="unmodified tower layers"):
        tower.optimize(products="bt_kernels")
    other = make().tower
    for layer in other.layers:
        layer.products = "bt_kernels"
    with torch.no_grad(), pytest.raises(ValueError, match="products='bt_kernels' needs a GPU.* are on cpu"):
        other.run(video(2)[0], 2)


@torch.no_grad()
def test_joined_projections_are_the_parameters(monkeypatch):
    """They follow what is loaded or converted later, are saved apart, and take no memory of their own."""
    monkeypatch.setattr(rows, "has_kernels", lambda x: True)
    tower, x = make().tower, torch.randn(2, 17, 32)
    layer = tower.layers[0].attention
    with torch.inference_mode():
        weight, bias = layer.join_projections()
    assert weight.shape == (96, 32) and bias.shape == (96,)
    assert layer.join_projections()[0].data_ptr() == weight.data_ptr() == layer.q_proj.weight.data_ptr()
    layer.k_proj.load_state_dict({"weight": torch.ones(32, 32), "bias": torch.zeros(32)})
    q, k, v = layer.split(x)
    torch.testing.assert_close(k.flatten(2), x.sum(-1, keepdim=True).expand(-1, -1, 32), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(v.flatten(2), layer.v_proj(x))
    tower.double()
    torch.testing.assert_close(layer.split(x.double())[0].flatten(2), layer.q_proj(x.double()))
    assert layer.join_projections()[0].dtype == torch.float64
    copied = copy.deepcopy(tower).layers[0].attention
    copied.q_proj.weight.zero_()
    assert layer.q_proj.weight.abs().sum() > 0 and copied.join_projections()[0][:32].abs().sum() == 0


def test_attention_by_name():
    tower = make().tower
    assert tower.optimize(attention="sdpa").layers[0].attend is attention.sdpa
    cuda = torch.device("cuda")
    for name, device, dtype, message in [
        ("flash", cuda, torch.bfloat16, "must be 'sdpa', 'flash-attn' or 'xformers', but is 'flash'"),
        ("xformers", torch.device("cpu"), torch.bfloat16, "needs the tower on a CUDA device, but it is on cpu"),
        ("flash-attn", cuda, torch.float32, "needs a tower in float16 or bfloat16, but it is in torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention.find_attention(name, device, dtype)
    with pytest.raises(ValueError, match="attention='xformers' needs the tower on a CUDA device"):
        tower.optimize(attention="xformers")


@pytest.mark.parametrize(
    "name, module, function",
    [("flash-attn", "flash_attn", "flash_attn_func"), ("xformers", "xformers.ops", "memory_efficient_attention")],
)
def test_attention_of_a_package(name, module, function, monkeypatch):
    """The package's function gets q, k and v [n, s, H, E] of every layer, called or not; its absence is an error."""
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"attention='{name}' needs the package {name}, which cannot be imported"):
        attention.find_attention(name, torch.device("cuda"), torch.bfloat16)
    shapes = []

    def attend(q, k, v):
        shapes.append(q.shape)
        weights = torch.einsum("nshe,nthe->nhst", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("nhst,nthe->nshe", weights.softmax(-1), v)

    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{function: attend}))
    monkeypatch.setattr(sys.modules["bt_adapter.towers.tower"], "find_attention", lambda name, device, dtype:
                        attention.find_attention(name, torch.device("cuda"), torch.bfloat16))  # fmt: skip
    model = make(depth=3)
    expected = model(video()).backbone_tokens
    model.tower.optimize(attention=name)
    torch.testing.assert_close(model(video()).backbone_tokens, expected, rtol=1e-4, atol=1e-5)
    model.tower.layers[0].fc1.register_forward_hook(lambda *args: None)  # its layer is called
    torch.testing.assert_close(model(video()).backbone_tokens, expected, rtol=1e-4, atol=1e-5)
    assert shapes == [(8, 17, 2, 16)] * 8


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash-attn", "xformers"])
def test_attention_of_an_installed_package_changes_nothing(name):
    pytest.importorskip({"flash-attn": "flash_attn"}.get(name, name))
    model = shake(make(depth=3)).cuda()
    model.tower.optimize(dtype=torch.bfloat16)
    expected = model(video().cuda()).video_embeds
    model.tower.optimize(attention=name)
    torch.testing.assert_close(model(video().cuda()).video_embeds, expected, rtol=2e-2, atol=2e-2)


class PretendedGraphs:
    """Stands in for GraphCache without a GPU: runs a function once for each key and returns its results again."""

    def __init__(self):
        self.results = {}

    def __call__(self, name, function, x):
        key = (name, x.shape)
        if key not in self.results:
            self.results[key] = function(x)
        return self.results[key]


@torch.no_grad()
def test_tower_and_branch_are_one_graph():
    """One key for each shape and option, nothing recorded inside of it, and results that no later call overwrites."""
    model = shake(make(depth=3))
    expected = model.video_tokens(video()), model.video_tokens(video(), windows="reference")
    model.tower.graphs = PretendedGraphs()
    seen = []
    found = model.video_tokens(video(), progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(found, expected[0]) and seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(model.tower.graphs.results) == 1, "the tower inside records nothing of its own"
    assert torch.equal(model.video_tokens(video(), windows="reference"), expected[1])
    assert len(model.tower.graphs.results) == 2
    found.zero_()
    assert torch.equal(model.video_tokens(video()), expected[0])
    model.video_tokens(video(5))
    model.trained_steps = 2
    model.video_tokens(video())
    assert len(model.tower.graphs.results) == 4, "other shapes and configurations have graphs of their own"


def test_no_graph_where_python_code_would_be_left_out():
    model = shake(make(depth=3, drop_path=0.5))
    graphs = model.tower.graphs = PretendedGraphs()

    def whole():
        return [name for name, _ in graphs.results if isinstance(name, tuple) and name[0] == "video_tokens"]

    model.video_tokens(video()).sum().backward()  # with gradients
    with torch.no_grad():
        model.train().video_tokens(video())  # new draws each time
        with torch.autocast("cpu", torch.bfloat16):
            model.eval().video_tokens(video())
        handle = model.branch.temporal[0].fc.register_forward_hook(lambda *args: None)
        model.video_tokens(video())
        assert not whole()
        handle.remove()
        model.video_tokens(video())
        assert len(whole()) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("frames", [4, 5])
def test_cuda_graphs_change_nothing(frames):
    model = shake(make(depth=3)).cuda()
    pixels = video(frames).cuda()
    expected = model(pixels).video_embeds, model.video_tokens(pixels)
    model.tower.optimize(chunk=4, graphs=True)
    for _ in range(2):  # recorded, then replayed
        torch.testing.assert_close((model(pixels).video_embeds, model.video_tokens(pixels)), expected)
    other = video(frames, seed=2).cuda()
    seen = []
    tokens = model.video_tokens(other, progress=lambda done, total: seen.append((done, total)))
    assert not torch.allclose(tokens, expected[1])
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))] and seen[-1][0] == seen[-1][1]


@pytest.mark.gpu
def test_products_of_bt_kernels_change_little_on_a_gpu():
    """In float32 without TF32; of tower and branch, with gradients, and replayed."""
    pixels = video(5).cuda()
    results = []
    for products in ("torch", "bt_kernels"):
        model = shake(make(depth=3, products=products)).cuda()
        model.tower.optimize(chunk=3, products=products)
        output = model(pixels)
        output.branch_tokens.square().mean().backward()
        found = [output.backbone_tokens, output.branch_tokens, *(p.grad for p in model.branch.spatial[0].parameters())]
        model.tower.optimize(graphs=True)
        with torch.no_grad():
            results.append([*found, model.video_tokens(pixels), model.video_tokens(pixels)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_eight_bits_on_a_gpu_that_has_them():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    model = shake(make(depth=3)).cuda()
    exact = model(video().cuda()).video_embeds
    model.tower.optimize(dtype=torch.bfloat16, fp8=True)
    assert F.cosine_similarity(model(video().cuda()).video_embeds.float(), exact, dim=-1).min() > 0.99
