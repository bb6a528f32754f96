"""Configuration of the branch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

# Of BTAdapterConfig: choices of a process, not properties of a branch.
RUN_TIME_FIELDS = ("recompute", "fused", "products")
AlignLayer = Literal["last", "chat"]  # layer at which pretraining aligns the branch: see the model's `forward`


@dataclass(frozen=True)
class BTAdapterConfig:
    """Configuration of the branch (arXiv 2309.15785, section 3).

    ``recompute``, ``fused`` and ``products`` choose how a process computes the branch, not what it computes (up to
    rounding). They are not saved. Folders of earlier versions contain them: loading such a folder uses its values,
    saving leaves them out.

    Attributes:
        depth: d, number of branch layers; they read the tower's last d layers.
        drop_path: stochastic depth rate of the last branch layer; rates grow linearly from 0 at the first.
        merge_gate_slope: slope of the gate that mixes the tower into the branch; None: no gate, plain sum.
        output_gate_slope: slope of the gate that mixes the branch's CLS and the tower's; None: no gate, plain sum.
        max_frames: number of rows of the time table.
        trained_steps: number of trained rows: the time steps of the training videos. Videos of more frames are averaged
            down to this number of steps (``bt_adapter.model.time_steps``). None: not known; all rows are read.
        alignment_head: whether there is a head for masked branch token alignment.
        drop_block: apply stochastic depth also to a spatial layer's whole result, residual included, as EVA's reference
            does; for parity, off by default.
        recompute: activations that backward recomputes instead of storing: "none"; "mlp": each layer's first MLP
            product; "layer": each whole layer, of which only the input is stored (``model.fused``).
        fused: run the layers of ``model.fused`` if no part of a layer was replaced or wrapped (adapters, hooks);
            other layers are called as modules. False: always use the plain layers of ``bt_adapter.model.branch``, which
            support only recompute "none".
        products: library of the fused layers' products that can activate, or add onto the residual stream, before they
            write: "torch", whose products cannot, or "bt_kernels", on a GPU alone. See ``Tower.optimize``.
    """

    depth: int = 4
    drop_path: float = 0.1
    merge_gate_slope: float | None = 100.0
    output_gate_slope: float | None = 1e4
    max_frames: int = 64
    alignment_head: bool = True
    drop_block: bool = False
    recompute: str = "none"
    fused: bool = True
    trained_steps: int | None = None
    products: str = "torch"

    def __post_init__(self) -> None:
        for name in ("depth", "max_frames"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, but is {value!r}")
        steps = self.trained_steps
        if steps is not None and not (isinstance(steps, int) and 1 <= steps <= self.max_frames):
            raise ValueError(f"trained_steps must be None or in [1, {self.max_frames}] (max_frames), but is {steps!r}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must lie in [0, 1), but is {self.drop_path!r}")
        if self.recompute not in ("none", "mlp", "layer"):
            raise ValueError(f"recompute must be 'none', 'mlp' or 'layer', but is {self.recompute!r}")
        if self.recompute != "none" and not self.fused:
            raise ValueError(f"recompute must be 'none' if fused is False, but is {self.recompute!r}")
        if self.products not in ("torch", "bt_kernels"):
            raise ValueError(f"products must be 'torch' or 'bt_kernels', but is {self.products!r}")
        if self.products != "torch" and not self.fused:
            raise ValueError(f"products must be 'torch' if fused is False, but is {self.products!r}")

    def drop_rate(self, layer: int) -> float:
        """Return the stochastic depth rate of a branch layer, 0-based."""
        return self.drop_path * layer / max(self.depth - 1, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are saved with a branch as a dict for JSON: all but :data:`RUN_TIME_FIELDS`."""
        return {name: value for name, value in asdict(self).items() if name not in RUN_TIME_FIELDS}
