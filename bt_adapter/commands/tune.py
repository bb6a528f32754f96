"""``bt-adapter tune``."""

from __future__ import annotations

from bt_adapter.training.loop import until_stopped
from bt_adapter.tune.recipe import TuneRecipe


def run(recipe: TuneRecipe) -> int:
    """Tune. Returns 0, or 143 where the run was stopped and can be resumed."""
    from bt_adapter.tune.run import tune

    return until_stopped(lambda: tune(recipe))
