"""Make the contenders of ``bench/step.py``: the reference's structure in its forms, and ours under each policy.

On a GPU every contender runs under the same autocast to bfloat16, on a CPU none does. The device "meta" stands for a
GPU (``emulated_gpu.py``).
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import torch
from baseline import Baseline, Options
from torch import Tensor

from bt_adapter import BTAdapterConfig, BTAdapterVisionModel
from bt_adapter.model.adapter import BTAdapterOutput
from bt_adapter.model.losses import contrastive_losses
from bt_adapter.towers.config import TowerConfig
from bt_kernels import VisibleTokens

VIT_L = TowerConfig(1024, 4096, 24, 16, 224, 14, 768)
SMALL = TowerConfig(128, 256, 6, 2, 56, 14, 64)  # for rehearsals
DEPTH = 4
BASELINES = {
    "eager": Options(),
    "sdpa": Options(sdpa=True),
    "compiled": Options(),
    "checkpoint": Options(checkpoint=True),
}
POLICIES = ("none", "mlp", "layer")
# The same with the products of bt_kernels in tower and branch, which need a GPU or one that is emulated.
OWN = tuple(f"{policy} own" for policy in POLICIES)
# Ours with the tower run otherwise (``Tower.optimize``), under "mlp"; on a GPU it is in bfloat16 always.
TOWERS: dict[str, dict] = {"half": {"dtype": torch.bfloat16}}
GPU_TOWERS: dict[str, dict] = {
    "compiled tower": {"compile": True},
    "graphs": {"graphs": True},
    "fp8": {"fp8": True, "compile": True},
}
if torch.cuda.is_available():
    TOWERS = GPU_TOWERS
# A tower in 8 bits for a count: an emulated GPU compiles nothing.
COUNTED_TOWERS: dict[str, dict] = {"8 bits": {"fp8": True}}
OURS = (*POLICIES, "mlp own") if torch.cuda.is_available() else POLICIES
CONTENDERS = (*BASELINES, *OURS, *TOWERS)


@dataclass(frozen=True)
class Case:
    """What is run: "branch" and "step" forward and backward, "chat" forward."""

    part: str
    frames: int
    ratio: float
    batch: int
    timed: bool = True  # else memory alone

    @property
    def contenders(self) -> tuple[str, ...]:
        if self.part == "chat":
            return ("eager", "sdpa", "compiled", "none", *TOWERS)
        return CONTENDERS if self.part == "step" else (*BASELINES, *OURS)

    @property
    def name(self) -> str:
        return f"{self.part} T={self.frames} ratio {self.ratio} B={self.batch}"

    def mask(self, device: str) -> Tensor | None:
        """Bool ``[B, P·T]``, patch by patch, True = masked: true tubes."""
        if self.ratio == 0:
            return None
        generator = torch.Generator().manual_seed(0)
        order = torch.rand(self.batch, VIT_L.patches, generator=generator).argsort(1)
        tubes = order < int(self.ratio * VIT_L.patches)
        return tubes[:, :, None].expand(-1, -1, self.frames).flatten(1).to(device)

    def visible(self, device: str) -> VisibleTokens:
        mask = self.mask("cpu")
        if mask is None:
            return VisibleTokens.all(self.batch, VIT_L.patches, self.frames, device=device)
        return VisibleTokens.from_reference_mask(mask, self.frames).to(device)


class Contender:
    """A model in one of the forms, and its run of a case: ``run()``, then gradients in ``parameters``.

    Args:
        autocast: whether it runs under autocast to bfloat16; None: on every device but a CPU.
    """

    def __init__(
        self, name: str, model: BTAdapterVisionModel, case: Case, device: str, inputs: dict[str, Tensor],
        autocast: bool | None = None,
    ):  # fmt: skip
        self.name, self.case, self.device, self.inputs = name, case, device, inputs
        self.autocast = device != "cpu" if autocast is None else autocast
        self.visible = case.visible(device)
        self.mask = case.mask(device)
        if name in BASELINES:
            self.model = Baseline(model, BASELINES[name]).to(device)
            if name == "compiled":
                for layer in self.model.tower:
                    layer.compile(dynamic=False)
                self.model.branch = torch.compile(self.model.branch, dynamic=False)
        elif name in TOWERS | COUNTED_TOWERS:
            self.model = copy.deepcopy(model)
            self.model.tower.optimize(**(TOWERS | COUNTED_TOWERS)[name])
        elif name in OWN:
            self.model = copy.deepcopy(model)
            choose_form(self.model, name)
        else:
            self.model = model
        learning = self.model if name in BASELINES else self.model.branch
        self.parameters = [p for p in learning.parameters() if p.requires_grad]

    @property
    def product_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that its matrix products should have."""
        tower = {name: (options.get("dtype"),) for name, options in TOWERS.items() if "dtype" in options}
        if self.name == "fp8":
            tower["fp8"] = (torch.float8_e4m3fn,)
        return (torch.bfloat16 if self.autocast else torch.float32, *tower.get(self.name, ()))

    def run(self) -> Tensor:
        """Compute the case's result and set the gradients anew."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            out = getattr(self, self.case.part)()
        if out.requires_grad:
            out.backward()
        return out

    def branch(self) -> Tensor:
        states, cotangent = self.inputs["states"], self.inputs["cotangent"]
        if self.name in BASELINES:
            z = self.model.branch([x.flatten(0, 1) for x in states], self.case.frames, self.mask)
        else:
            choose_form(self.model, self.name)
            branch = self.model.branch
            z = branch.embed(states[0], self.model.tower.position, self.visible)
            for layer, x in enumerate(states):
                z = z if layer == 0 else branch.merge(x, z, self.visible)
                z = branch.run_layer(layer, z, self.visible, None)
        return (z * cotangent[:, : z.shape[1]]).sum()

    def step(self) -> Tensor:
        pixels, text = self.inputs["pixels"], self.inputs["text"]
        if self.name in BASELINES:
            losses = self.model(pixels, text, self.mask)
        else:
            choose_form(self.model, self.name)
            losses = self._pretraining_losses(self.model(pixels, self.visible), text)
        return sum(losses.values())

    def _pretraining_losses(self, output: BTAdapterOutput, text: Tensor) -> dict[str, Tensor]:
        """Compute the losses as ``bt_adapter.pretrain.step`` does."""
        videos = output.video_embeds, self.model.branch_embeds(output)
        vtc, mbca = contrastive_losses(videos, text, 0.01)
        return {"vtc": vtc, "mbca": 0.1 * mbca, "mbta": 0.1 * self.model.token_alignment(output)}

    @torch.no_grad()
    def chat(self) -> Tensor:
        return self.model.video_tokens(self.inputs["pixels"])

    def clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Of some weights that every form has alike."""
        spatial = self.model.spatial if self.name in BASELINES else self.model.branch.spatial
        own = self.model if self.name in BASELINES else self.model.branch
        return [spatial[0].fc1.weight.grad, spatial[-1].fc2.weight.grad, own.time.grad, own.merge_gate.grad]


def choose_form(model: BTAdapterVisionModel, name: str) -> None:
    """Let a model compute as the contender of a name, one of ours, does."""
    policy = "mlp" if name in TOWERS | COUNTED_TOWERS else name.removesuffix(" own")
    products = "bt_kernels" if name in OWN else "torch"
    model.branch.config = dataclasses.replace(model.branch.config, recompute=policy, products=products)
    if products != model.tower.products:
        model.tower.optimize(products=products)


def make_model(part: str, device: str) -> BTAdapterVisionModel:
    """For the branch alone, a tower of no more layers than it has."""
    torch.manual_seed(0)
    with torch.device(device):
        config = dataclasses.replace(VIT_L, num_hidden_layers=DEPTH) if part == "branch" else VIT_L
        model = BTAdapterVisionModel(config, BTAdapterConfig(depth=DEPTH)).eval()
    with torch.no_grad():
        for layer in model.branch.temporal:  # a fresh one adds nothing
            layer.fc.weight.normal_(0, 0.02)
    if device != "cpu":
        model.tower.optimize(dtype=torch.bfloat16)
    return model


def make_inputs(case: Case, device: str) -> dict[str, Tensor]:
    generator = None if device == "meta" else torch.Generator(device).manual_seed(1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if case.part == "branch":
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tokens, width = 1 + VIT_L.patches, VIT_L.hidden_size
        states = [draw(case.batch, case.frames, tokens, width).to(dtype) for _ in range(DEPTH)]
        return {"states": states, "cotangent": draw(case.batch, tokens * case.frames, width)}
    size = VIT_L.image_size
    pixels = draw(case.batch, case.frames, 3, size, size)
    if device != "cpu":
        pixels = pixels.to(torch.bfloat16)  # training normalises them in the tower's dtype
    return {"pixels": pixels, "text": draw(case.batch, VIT_L.projection_dim)}
