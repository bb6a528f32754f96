"""Pretraining of the branch on clips and captions (arXiv 2309.15785, section 3.2).

``recipe`` (options) → ``run`` (the loop) → ``step`` (losses and gradients of one batch) → ``checkpoint`` and ``log``
(files that are written).
"""
