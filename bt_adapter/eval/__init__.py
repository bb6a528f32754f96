"""Zero-shot evaluation (arXiv 2309.15785, section 4): retrieval, recognition, and exact scores of answers.

``stack`` loads the model and its text encoder; ``features`` embeds clips on one or many processes, with ``cache`` on
disk; ``retrieval`` and ``recognition`` compute metrics; ``report`` writes them; ``run`` runs all of these in turn.
``qa`` reads records of question answering benchmarks and computes exact scores, without a model.
"""
