"""Zero-shot evaluation (arXiv 2309.15785, section 4): text-to-video retrieval and action recognition.

``stack`` (what is evaluated) and ``features`` (clips to vectors, by many processes) with ``cache`` (vectors on disk) →
``retrieval`` or ``recognition`` (vectors to figures) → ``report`` (figures to a file and a table). ``run`` joins them.
"""
