"""Modules on the ops of ``bt_kernels``: divided space-time attention for any video transformer.

``import bt_kernels.nn`` needs only torch. The tokens of a video are rows in patch-major order: the frames of a patch
are adjacent. Some modules take one CLS before them:

* :class:`TemporalAttention`: patch rows ``[B, N, D]``, **no CLS**.
* :class:`SpatialAttention`: ``[B, 1+N, D]``, **CLS first**.
* :class:`DividedSpaceTimeBlock`: ``[B, 1+N, D]``, **CLS first**; both attentions and an MLP.
"""

from bt_kernels.nn.attention import SpatialAttention, TemporalAttention
from bt_kernels.nn.block import DividedSpaceTimeBlock

__all__ = ["DividedSpaceTimeBlock", "SpatialAttention", "TemporalAttention"]
