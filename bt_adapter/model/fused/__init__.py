"""The branch's layers as autograd functions with a backward pass written by hand, which keep and move fewer bytes.

They compute the same as the plain layers of ``bt_adapter.model.branch``, which define the results. ``temporal``,
``spatial`` and ``bt_adapter.towers.mlp`` each hold a forward and a backward function of one residual update; forward
returns the tensors that backward needs. ``layer`` combines the three into one autograd function, and its recompute
policy selects the tensors that are stored. ``gate`` merges the tower's tokens into the branch before every layer but
the first. Formulas: arXiv 2309.15785, section 3.1.
"""

from bt_adapter.model.fused.gate import merge
from bt_adapter.model.fused.layer import run_layer

__all__ = ["merge", "run_layer"]
