"""Zero-shot evaluation (arXiv 2309.15785, section 4): text-to-video retrieval and action recognition.

``stack`` loads the model and its text encoder; ``features`` embeds clips on one or many processes, with ``cache`` on
disk; ``retrieval`` and ``recognition`` compute metrics; ``report`` writes them; ``run`` runs all of these in turn.
"""
