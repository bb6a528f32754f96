"""Pretraining of the branch on clips and captions (arXiv 2309.15785, section 3.2).

``recipe`` (what is asked for) → ``run`` (the loop) → ``step`` (losses and gradients of one batch) → ``checkpoint`` and
``log`` (what is written).
"""
