"""What one would write without this package: plain PyTorch and the attention libraries, for regular grids.

``peers(function)`` gives ``{name: callable(inputs, visible)}``; each is checked against our result before it is timed.
Legend: B videos, T frames, P patches, N visible rows, S slots, K groups, H heads, E head width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

Peer = Callable[[dict, object], Tensor]


def _rows(tower: Tensor, visible) -> Tensor:
    """[B,T,1+P,D] at the visible places: [B,N,D]."""
    videos = torch.arange(tower.shape[0], device=tower.device)[:, None]
    return tower[videos, visible.index % visible.frames, 1 + visible.index // visible.frames]


def embed(inputs: dict, visible) -> Tensor:
    x, pos, time = inputs["backbone"], inputs["pos"], inputs["time"]
    cls = (x[:, :, 0].mean(1) + inputs["cls_token"] + pos[0]) / 2
    rows = _rows(x, visible) + pos[1 + visible.index // visible.frames] + time[visible.index % visible.frames]
    return torch.cat([cls[:, None], rows], 1)


def merge(inputs: dict, visible) -> Tensor:
    x, z, gate = inputs["backbone"], inputs["branch"], inputs["gate"]
    incoming = torch.cat([x[:, :, 0].mean(1, keepdim=True), _rows(x, visible)], 1)
    return z + incoming if gate is None else torch.lerp(z, incoming, gate)


def pool(inputs: dict, visible) -> Tensor:
    x, z = inputs["backbone"], inputs["branch"]
    if visible.tokens == visible.patches * visible.frames:
        rows = z[:, 1:].unflatten(1, (visible.patches, visible.frames)).mean(2)
    else:
        places = visible.index[:, :: visible.frames] // visible.frames  # tubes: a group is a patch
        means = z[:, 1:].unflatten(1, (visible.groups, visible.frames)).mean(2)
        rows = z.new_zeros(len(z), visible.patches, z.shape[2])
        rows = rows.scatter(1, places[:, :, None].expand_as(means), means)
    patches = (x[:, :, 1:].mean(1) + rows) / 2
    cls = (x[:, :, 0].mean(1) + z[:, 0]) / 2
    return torch.cat([patches, cls[:, None]], 1)


def alignment(inputs: dict, visible) -> Tensor:
    i = inputs
    a = F.linear(i["branch"][:, 1:], i["head_weight"], i["head_bias"])
    a = F.layer_norm(a, a.shape[-1:], i["head_norm_weight"], i["head_norm_bias"], 1e-5)
    b = _rows(i["target"], visible)
    b = F.layer_norm(b, b.shape[-1:], i["target_norm_weight"], i["target_norm_bias"], 1e-5)
    b = F.linear(b, i["target_projection"], i["target_projection_bias"])
    return (2 - 2 * F.cosine_similarity(a, b, dim=-1)).mean()


def residual(inputs: dict, visible) -> Tensor:
    x, update = inputs["x"], inputs["update"]
    summed = x if update is None else x + update
    return torch.cat([summed, F.layer_norm(summed, summed.shape[-1:], inputs["weight"], inputs["bias"], 1e-5)], 1)


def quick_gelu(inputs: dict, visible) -> Tensor:
    y = inputs["x"] + inputs["bias"]
    return y * torch.sigmoid(1.702 * y)


def quantised(inputs: dict, visible) -> tuple[Tensor, Tensor]:
    rows = inputs["rows"]
    scale = rows.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
    return (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def add_linear(inputs: dict, visible) -> Tensor:
    return inputs["stream"] + F.linear(inputs["x"], inputs["weight"], inputs["bias"])


def mlp(inputs: dict, visible) -> Tensor:
    y = F.linear(inputs["x"], inputs["fc1_weight"], inputs["fc1_bias"])
    return inputs["stream"] + F.linear(y * torch.sigmoid(1.702 * y), inputs["fc2_weight"], inputs["fc2_bias"])


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., H, L, E] each, by matrix products."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def _temporal(core: Callable) -> Peer:
    def run(inputs: dict, visible) -> Tensor:
        qkv = inputs["qkv"].unflatten(1, (visible.groups, visible.slots))  # [B, K, S, 3, H, E]
        out = core(*qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2))  # [B·K, H, S, E]
        return out.unflatten(0, (-1, visible.groups)).transpose(2, 3).flatten(1, 2)

    return run


def _spatial(core: Callable) -> Peer:
    def run(inputs: dict, visible) -> Tensor:
        qkv, weight = inputs["qkv"], inputs["frame_weight"]
        rows = qkv[:, 1:].unflatten(1, (visible.groups, visible.slots)).transpose(1, 2)  # [B, S, K, 3, H, E]
        x = torch.cat([qkv[:, None, :1].expand(-1, visible.slots, -1, -1, -1, -1), rows], 2)
        out = core(*x.permute(3, 0, 1, 4, 2, 5).flatten(1, 2))  # [B·S, H, 1+K, E]
        out = out.unflatten(0, (-1, visible.slots)).transpose(2, 3)
        cls = out[:, :, 0]
        cls = (
            cls.mean(1, keepdim=True)
            if weight is None
            else torch.einsum("bs,bshe->bhe", weight.to(cls.dtype), cls)[:, None]
        )
        return torch.cat([cls, out[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)

    return run


@cache
def _flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All sequences end to end with a block-diagonal mask, as xformers wants many short ones."""
    from xformers.ops import fmha, memory_efficient_attention

    batch, _, length, _ = q.shape
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens([length] * batch)
    flat = [t.transpose(1, 2).flatten(0, 1)[None] for t in (q, k, v)]  # [1, B·L, H, E]
    out = memory_efficient_attention(*flat, attn_bias=bias)
    return out[0].unflatten(0, (batch, length)).transpose(1, 2)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    batch, _, length, _ = q.shape
    ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    out = flash_attn_varlen_func(*flat, ends, ends, length, length)
    return out.unflatten(0, (batch, length)).transpose(1, 2)


def _compiled(peer: Peer) -> Peer:
    torch.compiler.reset()
    return torch.compile(peer, dynamic=False)


def peers(function: str, device: str, dtype: torch.dtype) -> dict[str, Peer]:
    """Every peer of an op that can run here, by name."""
    plain = {"gather_embed": embed, "gather_merge": merge, "pool_video_tokens": pool, "alignment_loss": alignment}
    plain |= {"residual_norm": residual, "bias_gelu": quick_gelu, "quantize_rows": quantised}
    plain |= {"linear_add": add_linear, "mlp": mlp}
    if function in plain:
        eager = plain[function]
        return {"eager": eager, "compiled": _compiled(eager)}
    around = {"temporal_attention": _temporal, "spatial_attention": _spatial}[function]
    cores = {"sdpa": F.scaled_dot_product_attention}
    if device == "cuda":
        cores["flex"] = lambda q, k, v: _flex()(q, k, v)
        if importlib.util.find_spec("xformers"):
            cores["xformers"] = _xformers
        if importlib.util.find_spec("flash_attn") and dtype in (torch.float16, torch.bfloat16):
            cores["flash-attn"] = _flash
    eager = around(_softmax)
    return {"eager": eager, "compiled": _compiled(eager), **{name: around(core) for name, core in cores.items()}}
