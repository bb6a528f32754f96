"""``bt-adapter tune``."""

from __future__ import annotations

import sys

from bt_adapter.tune.recipe import TuneRecipe


def run(recipe: TuneRecipe) -> int:
    """Tune. Returns 0, or 143 where the run was stopped and can go on."""
    from bt_adapter.tune.run import Stopped, tune

    try:
        tune(recipe)
    except Stopped as stopped:
        print(f"bt-adapter: {stopped}", file=sys.stderr)
        return 143
    return 0
