"""State what devices can do at most, in their makers' words, for least times (rooflines)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """Peaks of a device.

    Attributes:
        bandwidth: of its memory, in B/s.
        half: dense products of 16-bit operands, in FLOP/s.
        single: products of float32 operands without TF32, in FLOP/s.
        source: where the figures stand.
        multiplies_float8: whether it has products of float8 operands, at twice the rate of 16 bits.
    """

    bandwidth: float
    half: float
    single: float
    source: str
    multiplies_float8: bool = True

    def seconds(self, operations: int, moved: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Return the least time of a kernel: its operations at the peak or its bytes at the bandwidth."""
        peak = {1: 2 * self.half, 2: self.half}.get(dtype.itemsize, self.single)
        return max(operations / peak, moved / self.bandwidth)


DEVICES = {
    "A100 80GB SXM": Device(2.039e12, 312e12, 19.5e12, "NVIDIA A100 80GB PCIe and SXM data sheet, 2022", False),
    "H100 SXM": Device(3.35e12, 989e12, 67e12, "NVIDIA H100 data sheet, 2024"),
    "H200 SXM": Device(4.8e12, 989e12, 67e12, "NVIDIA H200 data sheet, 2024"),
    "B200": Device(8.0e12, 2250e12, 75e12, "NVIDIA DGX B200 data sheet, 2025, a GPU's share"),
}
