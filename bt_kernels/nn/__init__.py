"""Modules on the ops of ``bt_kernels``: divided space-time attention for any video transformer.

``import bt_kernels.nn``; nothing here needs more than torch. The tokens of a video are rows in patch-major order, the
frames of a patch next to each other, before them one CLS where a module takes it:

* :class:`TemporalAttention`: patch rows ``[B, N, D]``, **no CLS**.
* :class:`SpatialAttention`: ``[B, 1+N, D]``, **CLS first**.
* :class:`DividedSpaceTimeBlock`: ``[B, 1+N, D]``, **CLS first**; both of them and an MLP.
"""

from bt_kernels.nn.attention import SpatialAttention, TemporalAttention
from bt_kernels.nn.block import DividedSpaceTimeBlock

__all__ = ["DividedSpaceTimeBlock", "SpatialAttention", "TemporalAttention"]
