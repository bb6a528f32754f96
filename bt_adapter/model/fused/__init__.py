"""The branch's layers as they run: the mathematics of ``bt_adapter.model.branch``, with their own backward.

Each of ``temporal``, ``spatial`` and ``mlp`` is one residual update as a pair of functions, forward and backward, that
share no state but what forward hands back to be kept. ``layer`` strings them together and chooses what is kept;
``gate`` stands before every layer but the first. Formulas: arXiv 2309.15785 section 3.1.
"""

from bt_adapter.model.fused.gate import merge
from bt_adapter.model.fused.layer import run_layer

__all__ = ["merge", "run_layer"]
